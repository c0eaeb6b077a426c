"""The report's figure: reward above, KL below, against the learner step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# From the Okabe–Ito palette, which stays apart under the common colour-vision deficiencies.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Values by learner step; ``standard_errors`` may be empty (no band) or hold NaN."""

    steps: Sequence[int]
    means: Sequence[float]
    standard_errors: Sequence[float] = field(default_factory=tuple)


def draw_curves(path: Path, *, reward: Curve, kl: Curve, batch_reward: Curve, batch_kl: Curve) -> None:
    """Write the figure as PNG.

    Thick lines with 95 % bands are held-out evaluations, thin grey ones the training
    batches (of sampled pairs, so not the same distribution: for orientation).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(7.0, 6.0), sharex=True, layout="constrained")
    _panel(axes[0], reward, batch_reward, colour=BLUE, marker="o", label="reward (log-odds)")
    _panel(axes[1], kl, batch_kl, colour=ORANGE, marker="s", label="KL to the reference (nats)")
    axes[0].set_title("Held-out prompts, mean and 95 % interval", loc="left", fontsize=11)
    axes[1].set_xlabel("learner step")
    axes[1].axhline(0.0, color=GREY, linewidth=0.8, linestyle=":")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axis: Any, held_out: Curve, batches: Curve, *, colour: str, marker: str, label: str) -> None:
    axis.plot(batches.steps, batches.means, color=GREY, linewidth=0.9, alpha=0.7)
    axis.plot(held_out.steps, held_out.means, color=colour, linewidth=2.2, marker=marker, markersize=5)
    if held_out.standard_errors:
        errors = [0.0 if math.isnan(error) else 1.96 * error for error in held_out.standard_errors]
        low = [mean - error for mean, error in zip(held_out.means, errors, strict=True)]
        high = [mean + error for mean, error in zip(held_out.means, errors, strict=True)]
        axis.fill_between(held_out.steps, low, high, color=colour, alpha=0.18, linewidth=0)
    # Labels at the ends of the lines: no legend to match colours with.
    ends = [(held_out, "held-out", colour)]
    if batches.steps:
        ends.append((batches, "training\nbatches", GREY))
    heights = _apart([curve.means[-1] for curve, _, _ in ends], axis.get_ylim())
    for (curve, text, ink), height in zip(ends, heights, strict=True):
        axis.annotate(
            text,
            xy=(curve.steps[-1], height),
            xytext=(8, 0),
            textcoords="offset points",
            color=ink,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
    axis.set_ylabel(label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25, linewidth=0.6)
    axis.margins(x=0.02)


def _apart(heights: list[float], limits: tuple[float, float]) -> list[float]:
    """Heights of at most two labels, moved apart where they would overlap."""
    gap = 0.14 * (limits[1] - limits[0])
    if len(heights) < 2 or abs(heights[0] - heights[1]) >= gap:
        return heights
    middle = (heights[0] + heights[1]) / 2
    up = heights[0] >= heights[1]
    return [middle + gap / 2, middle - gap / 2] if up else [middle - gap / 2, middle + gap / 2]
