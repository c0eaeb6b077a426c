"""What the overview draws: groups of metrics with a line that helps to read them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pilaf_ray.observability.metric_table import METRICS

MAX_POINTS = 1500


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Some keys of metrics.jsonl in one picture."""

    title: str
    keys: tuple[str, ...]
    unit: str
    caption: str
    bound: float | None = None
    """A level that is drawn as a line."""
    folded: bool = False
    """Whether it stands with the less important ones."""


CHARTS: tuple[Chart, ...] = (
    Chart(title="Reward", keys=("reward/policy",), unit="log-odds",
          caption="The oracle's reward of the policy's own answers, batch by batch; it should rise."),
    Chart(title="KL to the reference", keys=("kl/policy",), unit="nats",
          caption="How far the policy has moved. Reward that rises with little KL is cheap; "
          "a KL that runs away alone is over-optimisation."),
    Chart(title="Loss", keys=("loss",), unit="nats", caption="DPO starts at log 2 ≈ 0.693 and falls slowly."),
    Chart(title="Margin", keys=("train/margin",), unit="nats",
          caption="Implicit reward of the chosen answer minus the rejected one's."),
    Chart(title="Accuracy", keys=("train/accuracy",), unit="share",
          caption="Share of pairs that the policy ranks as the label does; 1.0 for long is over-fitting."),
    Chart(title="Chosen and rejected log-probability", keys=("train/chosen_logprob", "train/rejected_logprob"),
          unit="nats",
          caption="Both may fall: the loss sees only their difference, so probability moves to answers that are in "
          "neither column. It is a worry when the chosen one falls as fast as the rejected one."),
    Chart(title="Chosen and rejected implicit reward", keys=("train/chosen_reward", "train/rejected_reward"),
          unit="nats", caption="β·(log π − log π_ref) of each side."),
    Chart(title="Z⁺, Z⁻ and their product", keys=("z/plus", "z/minus", "z/product"), unit="",
          caption="Z⁺Z⁻ is 1 where the implicit reward is constant; its logarithm is about the reward's variance "
          "under the policy. Far from 1 the fair coin and T-PILAF's exact weights part."),
    Chart(title="Reward model's accuracy", keys=("reward_model/accuracy", "reward_model/held_out_accuracy"),
          unit="share",
          caption="On pairs that r̂ had not trained on; held-out ones it never trains on. Rises from 0.5."),
    Chart(title="Reward model's calibration", keys=("reward_model/calibration_error", "reward_model/brier_skill"),
          unit="",
          caption="The error compares r̂'s chances with the labels, bin by bin, and should stay small; the skill rises "
          "from 0 with chances that are both sharp and right."),
    Chart(title="Response length", keys=("response/tokens",), unit="tokens",
          caption="A steady drift is length hacking."),
    Chart(title="Learner's time", keys=("time/train", "time/wait", "time/push", "time/evaluation"),
          unit="s a step",
          caption="Long waits mean that pairs come too slowly; long pushes that weights move too slowly; evaluations "
          "hold it up by what they take beyond a step."),
    Chart(title="Utilisation", keys=("busy/generator", "busy/reference", "busy/oracle", "busy/learner", "busy/reward"),
          unit="share",
          caption="Share of each step's time in which the role had a call under way."),
    Chart(title="Age of the trained pairs", keys=("age/mean", "age/max"), unit="steps",
          caption="Policy versions between sampling and training; never above the bound."),
    Chart(title="Pairs in flight", keys=("pairs/in_flight",), unit="pairs",
          caption="Admitted by the staleness gate and not yet trained."),
)  # fmt: skip


def charts_for(known: Iterable[str], *, bound: int, in_flight: int) -> list[Chart]:
    """The charts whose keys the run writes, then one for every other key that it writes."""
    present = [key for key in known if key != "step"]
    bounds = {"Age of the trained pairs": float(bound), "Pairs in flight": float(in_flight)}
    shown = []
    for chart in CHARTS:
        keys = tuple(key for key in chart.keys if key in present)
        if keys:
            shown.append(
                Chart(title=chart.title, keys=keys, unit=chart.unit, caption=chart.caption,
                      bound=bounds.get(chart.title))
            )  # fmt: skip
    drawn = {key for chart in shown for key in chart.keys}
    definitions = {d.key: d for d in METRICS}
    for key in present:
        if key not in drawn:
            d = definitions.get(key)
            caption = f"{d.formula}. Healthy: {d.healthy}.".replace("`", "") if d else ""
            shown.append(Chart(title=key, keys=(key,), unit=d.unit if d else "", caption=caption, folded=True))
    return shown


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Rows turned into one list a key, thinned to at most 1500 points; the newest row is always there."""
    stride = max(1, -(-len(rows) // MAX_POINTS))
    kept = rows[::-stride][::-1] if rows else []
    keys = list(dict.fromkeys(key for row in kept for key in row))
    return {key: [_number(row.get(key)) for row in kept] for key in keys}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
