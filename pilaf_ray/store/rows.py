"""What the ledger writes of a pair, column by column."""

from typing import Any

from pilaf_ray.store import codec
from pilaf_ray.store.records import LabelKind
from pilaf_ray.types import PreferenceLabel, ResponsePair


def contents(plan_index: int, pair: ResponsePair) -> dict[str, Any]:
    """The row of a pair's responses."""
    return {
        "plan_index": plan_index,
        "response_a": codec.encode(pair.a),
        "response_b": codec.encode(pair.b),
        "draw": None if pair.draw is None else codec.encode(pair.draw),
    }


def verdict(label: PreferenceLabel, row: Any, now: int) -> dict[str, Any]:
    """The event of the label that a pair carries from now on."""
    return {
        "key": f"{label.pair_id}/{row.sampling}",
        "plan_index": row.plan_index,
        "sampling": row.sampling,
        "kind": LabelKind.VERDICT.value,
        "source": label.source,
        "annotator": None,
        "probability": label.probability,
        "reason": label.reason,
        "reward_a": label.reward_a,
        "reward_b": label.reward_b,
        "withdraws": None,
        "details": None,
        "late": False,
        "created_at": now,
    }
