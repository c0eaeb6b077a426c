"""The page and the numbers of a comparison of samplers."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pilaf_ray.evaluation.comparison import AXES, Band, Curve, SamplerResult, band
from pilaf_ray.evaluation.figures import COLOURS, Series, line_figure
from pilaf_ray.evaluation.html_pages import Table, render_page
from pilaf_ray.evaluation.statistics import Interval

_AXIS_TITLES = {"labels": "labels", "generated_tokens": "generated tokens", "seconds": "seconds of training"}


def comparison_json(
    results: Sequence[SamplerResult], curves: Sequence[Curve], settings: dict[str, Any]
) -> dict[str, Any]:
    """Plain data: the results and the curves' means."""
    return {
        "settings": settings,
        "results": [asdict(result) for result in results],
        "curves": [
            {
                "sampler": curve.sampler,
                "seed": curve.seed,
                **{axis: getattr(curve, axis).tolist() for axis in AXES},
                **{name: curve.means(name).tolist() for name in ("rewards", "kls", "objectives")},
            }
            for curve in curves
        ],
    }


def comparison_page(
    results: Sequence[SamplerResult],
    curves: Sequence[Curve],
    *,
    baseline: str,
    title: str,
    missing: Sequence[str],
) -> str:
    """The page as HTML text; ``missing`` names runs that are not there yet."""
    samplers = [result.sampler for result in results]
    partial = [f"Partial: not finished yet: {', '.join(missing)}"] if missing else []
    return render_page(
        "comparison.html.j2",
        figures=("curves",),
        title=title,
        subtitle=f"{', '.join(samplers)}; seeds {', '.join(map(str, sorted({curve.seed for curve in curves})))}",
        partial=partial,
        result=_result_table(results, baseline),
        result_note=(
            f"β = {curves[0].beta:g}, J = R − β·KL on {curves[0].rewards.shape[1]} held-out responses a run. Brackets: "
            "95 % intervals over seeds, with the held-out prompts as they are: Student's, and for the label saving the "
            f"savings that Student's test does not rule out. The saving is the share of {baseline}'s labels that a "
            f"sampler does not need for {baseline}'s final J; negative where it never gets there, 100 % where all "
            "begin there."
        ),
        costs=_cost_table(results),
        curves=_figures(curves, samplers),
    )


def _result_table(results: Sequence[SamplerResult], baseline: str) -> Table:
    head = ["sampler", "R", "KL", "J", "gain in J", f"J less {baseline}'s", f"labels saved at {baseline}'s J"]
    body = [
        [
            result.sampler,
            *(_text(value) for value in (result.reward, result.kl, result.objective, result.gain, result.advantage)),
            _share(result.label_saving),
        ]
        for result in results
    ]
    return Table(head=head, body=body, colours=_colours(len(results)))


def _cost_table(results: Sequence[SamplerResult]) -> Table:
    head = ["sampler", "gain in J", "labels", "forwards", "scoring forwards", "tokens", "seconds", "gain a 100 labels"]
    body = [
        [
            result.sampler,
            f"{result.gain.value:.3f}",
            f"{result.labels:.0f}",
            f"{result.forwards:.0f}",
            f"{result.scoring_forwards:.0f}",
            f"{result.generated_tokens:.0f}",
            f"{result.seconds:.0f}",
            f"{100 * result.gain.value / result.labels:.3f}" if result.labels else "–",
        ]
        for result in results
    ]
    return Table(head=head, body=body, colours=_colours(len(results)))


def _figures(curves: Sequence[Curve], samplers: Sequence[str]) -> list[str]:
    frontier = [
        _series(band(curves, name, x=lambda c: c.means("kls"), y=lambda c: c.means("rewards")), number, shaded=False)
        for number, name in enumerate(samplers)
    ]
    figures = [line_figure(frontier, title="Frontier: reward against KL", x_label="KL to the reference, nats")]
    for measure, name in (("Gold reward R", "rewards"), ("Objective J = R − β·KL", "objectives")):
        for axis in AXES:
            bands = [_axis_band(curves, sampler, axis, name) for sampler in samplers]
            series = [_series(found, number, shaded=True) for number, found in enumerate(bands)]
            figures.append(
                line_figure(series, title=f"{measure} against {_AXIS_TITLES[axis]}", x_label=_AXIS_TITLES[axis])
            )
    return figures


def _axis_band(curves: Sequence[Curve], sampler: str, axis: str, name: str) -> Band:
    return band(curves, sampler, x=lambda curve: getattr(curve, axis), y=lambda curve: curve.means(name))


def _series(found: Band, number: int, *, shaded: bool) -> Series:
    return Series(
        label=found.sampler,
        x=found.x.tolist(),
        y=found.y.tolist(),
        low=found.low.tolist() if shaded else None,
        high=found.high.tolist() if shaded else None,
        style=number,
        hollow_start=not shaded,
    )


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _text(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    if not math.isfinite(interval.low):
        return f"{interval.value:.3f}"
    return str(interval)


def _share(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    if math.isnan(interval.low):
        return _percent(interval.value)
    return f"{_percent(interval.value)} [{_percent(interval.low)}, {_percent(interval.high)}]"


def _percent(value: float) -> str:
    return "never" if value == -math.inf else f"{100 * value:.0f} %"
