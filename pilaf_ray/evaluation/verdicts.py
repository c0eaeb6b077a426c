"""Two policies' responses as pairs that any preference oracle can judge."""

from pilaf_ray.evaluation.report import EvaluationResult
from pilaf_ray.sampling.identity import derive_seed, pair_identity
from pilaf_ray.types import FinishReason, PairPlan, Prompt, ResponsePair, SampledResponse, VersionSpan


def verdict_pairs(ours: EvaluationResult, theirs: EvaluationResult) -> tuple[list[ResponsePair], list[ResponsePair]]:
    """Our responses as side a and theirs as side b: shown a first, and shown b first."""

    def pairs(b_first: bool) -> list[ResponsePair]:
        columns = zip(ours.prompts, _sides(ours), _sides(theirs), strict=True)
        return [
            ResponsePair(plan=_plan(index, prompt, b_first), a=a, b=b) for index, (prompt, a, b) in enumerate(columns)
        ]

    return pairs(False), pairs(True)


def _plan(index: int, prompt: str, b_first: bool) -> PairPlan:
    name = pair_identity(0, 0, prompt, index)
    return PairPlan(
        pair_id=name,
        index=index,
        prompt=Prompt(prompt_id=name, text=prompt, token_ids=()),
        branch="verdict",
        coefficient_a=0.0,
        coefficient_b=0.0,
        seed_a=0,
        seed_b=0,
        present_b_first=b_first,
        label_seed=derive_seed(name, "label"),
    )


def _sides(result: EvaluationResult) -> list[SampledResponse]:
    return [
        SampledResponse(
            token_ids=tuple(tokens),
            text=text,
            coefficient=0.0,
            logprobs=(),
            versions=(VersionSpan(version=0, start=0, end=len(tokens)),),
            finish_reason=FinishReason.STOP,
        )
        for text, tokens in zip(result.responses, result.token_ids, strict=True)
    ]
