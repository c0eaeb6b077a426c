"""Labels spent against the labels that the run is to spend, and when they will be."""

from dataclasses import dataclass

from pilaf_ray.console.records import RunRecords

RECENT_STEPS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Pace and end of a run at the pace of its last steps."""

    steps: int
    max_steps: int | None
    labels: int
    budget: int | None
    pairs_per_second: float | None
    tokens_per_second: float | None
    """Generated tokens, candidates included."""
    seconds_left: float | None
    """None before the first step, without a limit of labels, and once the run has ended."""


def forecast(records: RunRecords, counts: dict[str, int], *, now: float) -> Forecast:
    """The pace over the last 20 steps, continued; a step takes the learner's waits, train and push."""
    recent = records.metrics[-RECENT_STEPS:]
    parts = ("time/wait", "time/train", "time/push", "time/evaluation")
    seconds = sum(row.get(key) or 0.0 for row in recent for key in parts)
    pace = len(recent) / seconds if seconds > 0 else None
    tokens = sum(row.get("cost/generated_tokens") or 0.0 for row in recent)
    steps = int(records.latest.get("step", 0))
    running = records.state(now) == "running"
    labels = sum(counts.get(state, 0) for state in ("labeled", "trained"))
    budget, trained = records.label_budget, counts.get("trained", 0)
    left = None if budget is None else max(0, budget - trained) / records.batch_pairs
    return Forecast(
        steps=steps,
        max_steps=records.max_steps,
        labels=labels,
        budget=budget,
        pairs_per_second=pace * records.batch_pairs if pace else None,
        tokens_per_second=tokens / seconds if pace and tokens else None,
        seconds_left=left / pace if pace and running and left is not None else None,
    )
