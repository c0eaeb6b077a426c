"""What the reference is still asked for when the sampler has seen it."""

from collections.abc import Sequence
from dataclasses import replace

from pairs import pair

from pilaf_ray.pipeline.reference_reuse import ReusingReference
from pilaf_ray.types import ReferenceLogprobs, ResponsePair, TokenPair


class Recorder:
    """A reference that notes what it is asked: pairs get −1 and −2, lone responses −3."""

    def __init__(self) -> None:
        self.pairs: list[str] = []
        self.sides: list[TokenPair] = []
        self.pairs_of_sides: list[str] = []

    async def score(self, pairs: Sequence[ResponsePair]) -> list[ReferenceLogprobs]:
        self.pairs += [item.plan.pair_id for item in pairs]
        return [ReferenceLogprobs(pair_id=item.plan.pair_id, a=-1.0, b=-2.0) for item in pairs]

    async def score_responses(self, items: Sequence[TokenPair], *, pairs: Sequence[str] = ()) -> list[float]:
        self.sides += items
        self.pairs_of_sides += pairs
        return [-3.0] * len(items)


def seen(item: ResponsePair, *, a: tuple[float, ...] | None, b: tuple[float, ...] | None) -> ResponsePair:
    return replace(item, a=replace(item.a, reference_logprobs=a), b=replace(item.b, reference_logprobs=b))


async def test_only_what_the_sampler_did_not_see_is_scored_and_the_order_is_kept() -> None:
    reference = Recorder()
    pairs = [
        seen(pair(0), a=(-0.5, -0.25), b=(-2.0, -4.0)),
        pair(1),
        seen(pair(2), a=None, b=(-1.5, -0.125)),
        pair(3),
    ]
    found = await ReusingReference(reference).score(pairs)
    assert [(item.pair_id, item.a, item.b) for item in found] == [
        ("pair-0", -0.75, -6.0),
        ("pair-1", -1.0, -2.0),
        ("pair-2", -3.0, -1.625),
        ("pair-3", -1.0, -2.0),
    ]
    assert reference.pairs == ["pair-1", "pair-3"]
    assert reference.sides == [((1, 2), pairs[2].a.token_ids)]
    assert reference.pairs_of_sides == ["pair-2"], "so that a pair that kills the reference is found"


async def test_mixed_pairs_alone_leave_the_reference_in_peace() -> None:
    reference = Recorder()
    await ReusingReference(reference).score([seen(pair(0), a=(-1.0,), b=(-1.0,))])
    assert (reference.pairs, reference.sides) == ([], [])
