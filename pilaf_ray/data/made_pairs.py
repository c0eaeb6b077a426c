"""Labelled pairs that no generator sampled, for tests and benchmarks of learners: on policy, of given tokens."""

from collections.abc import Sequence

from pilaf_ray.types import (
    FinishReason,
    LabeledPair,
    PairPlan,
    PreferenceLabel,
    Prompt,
    ReferenceLogprobs,
    ResponsePair,
    SampledResponse,
    VersionSpan,
)


def made_response(token_ids: Sequence[int], *, text: str = "", logprobs: Sequence[float] = ()) -> SampledResponse:
    """A response of version 0 that the length limit ended; its log-probabilities are 0 where none are given."""
    return SampledResponse(
        token_ids=tuple(token_ids),
        text=text,
        coefficient=0.0,
        logprobs=tuple(logprobs) or (0.0,) * len(token_ids),
        versions=(VersionSpan(version=0, start=0, end=len(token_ids)),),
        finish_reason=FinishReason.LENGTH,
    )


def made_pair(
    index: int,
    prompt: Sequence[int],
    a: Sequence[int],
    b: Sequence[int],
    *,
    probability: float,
    reference: tuple[float, float] = (0.0, 0.0),
) -> LabeledPair:
    """A pair whose number is its name, from token ids.

    Args:
        probability: that a is preferred.
        reference: log π_ref of a and of b.

    Example: ``made_pair(0, prompt=[5, 6], a=[7, 8], b=[9], probability=1.0, reference=(-8.0, -4.0))``
    """
    name = str(index)
    plan = PairPlan(
        pair_id=name,
        index=index,
        prompt=Prompt(prompt_id=name, text="", token_ids=tuple(prompt)),
        branch="on_policy",
        coefficient_a=0.0,
        coefficient_b=0.0,
        seed_a=0,
        seed_b=0,
        present_b_first=False,
        label_seed=0,
    )
    return LabeledPair(
        pair=ResponsePair(plan=plan, a=made_response(a), b=made_response(b)),
        label=PreferenceLabel(pair_id=name, probability=probability, source="made"),
        reference=ReferenceLogprobs(pair_id=name, a=reference[0], b=reference[1]),
    )
