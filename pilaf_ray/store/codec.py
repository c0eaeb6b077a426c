"""Messages to and from the ledger's binary columns, as MessagePack.

Half the size of JSON and several times faster, and floats come back bit for bit. Any message of
:mod:`pilaf_ray.types` goes through; a field that is added later needs a default.
"""

from typing import Any, TypeVar

import msgspec

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

encode = msgspec.msgpack.Encoder().encode
"""Bytes of a message."""


def decode(kind: type[T], data: bytes | None) -> T:
    """The message that :func:`encode` wrote."""
    assert data is not None, f"the ledger holds no {kind.__name__} here"
    return msgspec.msgpack.decode(data, type=kind)


def decode_pair(row: Any) -> ResponsePair:
    """A sampled pair, from a row with the columns of ``plans`` and ``responses``."""
    return ResponsePair(
        plan=decode(PairPlan, row.plan),
        a=decode(SampledResponse, row.response_a),
        b=decode(SampledResponse, row.response_b),
        draw=None if row.draw is None else decode(PairDraw, row.draw),
    )


def decode_label(row: Any) -> PreferenceLabel:
    """The label that a pair carries, from a row of :data:`pilaf_ray.store.queries.CONTENTS`."""
    return PreferenceLabel(
        pair_id=row.pair_id,
        probability=row.probability,
        source=row.source,
        reward_a=row.reward_a,
        reward_b=row.reward_b,
        reason=row.label_reason,
    )


def decode_reference(row: Any) -> ReferenceLogprobs:
    """log π_ref of a labelled pair's sides, from a row of ``pairs``."""
    return ReferenceLogprobs(pair_id=row.pair_id, a=row.reference_a, b=row.reference_b)


def decode_labeled(row: Any) -> LabeledPair:
    """A labelled pair, from a row of :data:`pilaf_ray.store.queries.CONTENTS`."""
    return LabeledPair(pair=decode_pair(row), label=decode_label(row), reference=decode_reference(row))
