"""Figures as inline SVG: a colour-blind-safe palette, labels beside the lines, nothing else.

The colours are those of Okabe and Ito (2008) that hold on white paper. Text stays text, so
a figure is sharp and searchable at any size.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9")
_DASHES = ("-", "--", ":")
_WIDTH, _HEIGHT = 5.0, 3.3
_LABEL_GAP = 0.075
"""Least distance of two line labels, as a share of the panel's height."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line, its band or error bars, and the label at its end."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: int = 0
    """Number of the colour; the same run has the same one in every figure."""
    markers: bool = True
    hollow_start: bool = False
    """Mark where the line begins, for lines that do not run from left to right."""


def line_figure(series: Sequence[Series], *, title: str, x_label: str, limit: tuple[float, str] | None = None) -> str:
    """Lines over a common axis; ``limit`` draws a named horizontal line."""
    figure, panel = _panel(title, x_label)
    for line in series:
        colour, dash = _style(line.style)
        if line.low is not None and line.high is not None:
            panel.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        panel.plot(line.x, line.y, dash, color=colour, marker="o" if line.markers else "", markersize=4, linewidth=1.5)
        if line.hollow_start and len(line.x):
            panel.plot(line.x[:1], line.y[:1], "o", color=colour, markerfacecolor="white", markersize=6)
    if limit is not None:
        panel.axhline(limit[0], color="#777777", linewidth=0.8, linestyle=(0, (2, 2)))
        panel.annotate(
            limit[1], (0, limit[0]), (2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
            color="#555555", fontsize=8,
        )  # fmt: skip
    _label_ends(panel, series)
    return _svg(figure, title)


def bar_figure(rows: Sequence[tuple[str, str, float, int]], *, title: str, x_label: str, unit: str) -> str:
    """Horizontal bars (group, bar, value, style), the value written at each bar's end."""
    figure, panel = _panel(title, x_label, height=0.9 + 0.24 * len(rows) + 0.15 * len({row[0] for row in rows}))
    places, names, position, last = [], [], 0.0, None
    for group, name, value, style in rows:
        position += 1.0 if last in (None, group) else 1.6
        panel.barh(position, value, color=_style(style)[0], height=0.75)
        panel.annotate(
            f"{value:.0f}{unit}", (value, position), (3, 0), textcoords="offset points", va="center", fontsize=8
        )
        places.append(position)
        names.append(name if len({row[1] for row in rows}) == len(rows) else f"{group} · {name}")
        last = group
    panel.set_yticks(places, names, fontsize=8)
    panel.invert_yaxis()
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.margins(x=0.12)
    return _svg(figure, title)


def _panel(title: str, x_label: str, height: float = _HEIGHT) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    panel = figure.add_subplot()
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_xlabel(x_label, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    return figure, panel


def _style(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)]


def _label_ends(panel: Any, series: Sequence[Series]) -> None:
    """Each line's name at its last point, moved up or down until no two overlap."""
    shown = [line for line in series if line.label and len(line.x)]
    if not shown:
        return
    from matplotlib.patheffects import withStroke

    panel.autoscale_view()
    to_share = panel.transAxes.inverted()
    ends = [to_share.transform(panel.transData.transform((line.x[-1], line.y[-1]))) for line in shown]
    order = sorted(range(len(shown)), key=lambda number: ends[number][1])
    heights = spread([float(ends[number][1]) for number in order], gap=_LABEL_GAP)
    for number, height in zip(order, heights, strict=True):
        panel.annotate(
            shown[number].label, (float(ends[number][0]), height), (6, 0), xycoords="axes fraction",
            textcoords="offset points", va="center", color=_style(shown[number].style)[0], fontsize=8,
            annotation_clip=False, path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Ascending heights with at least ``gap`` between neighbours, moved as one block around their centre."""
    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and _bottom(blocks[-1], gap) - _top(blocks[-2], gap) < gap:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [_bottom(block, gap) + gap * number for block in blocks for number in range(len(block))]


def _bottom(block: Sequence[float], gap: float) -> float:
    return sum(block) / len(block) - gap * (len(block) - 1) / 2


def _top(block: Sequence[float], gap: float) -> float:
    return sum(block) / len(block) + gap * (len(block) - 1) / 2


def _svg(figure: Any, title: str) -> str:
    import matplotlib

    # Identifiers differ from figure to figure, because all of them end up in one page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
