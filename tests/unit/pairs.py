"""Small messages for tests."""

from pilaf_ray.types import (
    FinishReason,
    PairPlan,
    PreferenceLabel,
    Prompt,
    ReferenceLogprobs,
    ResponsePair,
    SampledResponse,
    VersionSpan,
)


def plan(index: int) -> PairPlan:
    return PairPlan(
        pair_id=f"pair-{index}",
        index=index,
        prompt=Prompt(prompt_id=f"prompt-{index}", text=f"prompt {index}", token_ids=(1, 2)),
        branch="on_policy",
        coefficient_a=0.0,
        coefficient_b=0.0,
        seed_a=index,
        seed_b=index + 1000,
        present_b_first=index % 2 == 1,
        label_seed=index,
    )


def response(text: str, *, version: int = 0, coefficient: float = 0.0) -> SampledResponse:
    return SampledResponse(
        token_ids=(5, 6),
        text=text,
        coefficient=coefficient,
        logprobs=(-0.5, -0.25),
        versions=(VersionSpan(version=version, start=0, end=2),),
        finish_reason=FinishReason.STOP,
    )


def pair(index: int, *, version: int = 0, a: str = "a", b: str = "b") -> ResponsePair:
    return ResponsePair(plan=plan(index), a=response(a, version=version), b=response(b, version=version))


def label(index: int, probability: float | None = 1.0, source: str = "function") -> PreferenceLabel:
    return PreferenceLabel(pair_id=f"pair-{index}", probability=probability, source=source)


def reference(index: int) -> ReferenceLogprobs:
    return ReferenceLogprobs(pair_id=f"pair-{index}", a=-1.0, b=-2.0)
