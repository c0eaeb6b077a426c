"""Typed messages to and from the ledger's JSON columns."""

from typing import Any, TypeVar

from pydantic import TypeAdapter

from pilaf_ray.store.tables import PairRow
from pilaf_ray.types import (
    LabeledPair,
    PairDraw,
    PairPlan,
    PreferenceLabel,
    ReferenceLogprobs,
    ResponsePair,
    SampledResponse,
)

T = TypeVar("T")


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {
    kind: TypeAdapter(kind) for kind in (PairDraw, PairPlan, PreferenceLabel, ReferenceLogprobs, SampledResponse)
}


def encode(message: Any) -> str:
    """JSON text of a message of :mod:`pilaf_ray.types`."""
    return _ADAPTERS[type(message)].dump_json(message).decode()


def decode(kind: type[T], text: str | None) -> T:
    """The message that :func:`encode` wrote."""
    assert text is not None, f"the ledger holds no {kind.__name__} here"
    message: T = _ADAPTERS[kind].validate_json(text)
    return message


def decode_pair(row: PairRow) -> ResponsePair:
    """A sampled pair."""
    return ResponsePair(
        plan=decode(PairPlan, row.plan),
        a=decode(SampledResponse, row.response_a),
        b=decode(SampledResponse, row.response_b),
        draw=None if row.draw is None else decode(PairDraw, row.draw),
    )


def decode_labeled(row: PairRow) -> LabeledPair:
    """A labelled pair."""
    return LabeledPair(
        pair=decode_pair(row),
        label=decode(PreferenceLabel, row.label),
        reference=decode(ReferenceLogprobs, row.reference),
    )
