"""Held-out evaluation of the policy that the generators serve now."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from pilaf_ray.evaluation.report import EvaluationResult
from pilaf_ray.pipeline.ports import GeneratorPort
from pilaf_ray.sampling.identity import derive_seed, pair_identity
from pilaf_ray.types import GenerationRequest, Prompt, SampledResponse

logger = logging.getLogger(__name__)


class ResponseScorer(Protocol):
    """log π_ref of single responses."""

    async def score_responses(self, items: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[float]:
        """Sequence log-probabilities of (prompt, response) token pairs, in order."""
        ...


class TextScorer(Protocol):
    """The gold reward of single responses."""

    async def score_texts(self, prompts: list[str], responses: list[str]) -> list[float]:
        """One reward a response, on the Bradley–Terry log-odds scale."""
        ...


class Evaluator:
    """Samples one response a held-out prompt from π and measures reward and KL.

    The KL estimate of a response is Σ_t log π_θ(y_t) − log π_ref(y_t) on y ∼ π_θ,
    unbiased for KL(π_θ ‖ π_ref) at temperature 1. The seeds depend on the prompt
    only, so two evaluations differ by the weights and by nothing else.
    """

    def __init__(
        self,
        *,
        prompts: Sequence[Prompt],
        generator: GeneratorPort,
        reference: ResponseScorer,
        oracle: TextScorer,
        seed: int,
        batch_responses: int = 16,
    ) -> None:
        self._prompts = list(prompts)
        self._generator = generator
        self._reference = reference
        self._oracle = oracle
        self._seed = seed
        self._batch = batch_responses

    async def evaluate(self, step: int) -> EvaluationResult:
        """Evaluate the served policy; ``step`` only labels the result."""
        started = time.monotonic()
        responses = list(await asyncio.gather(*(self._sample(prompt) for prompt in self._prompts)))
        references = await self._reference_logprobs(responses)
        rewards = await self._oracle.score_texts(
            [prompt.text for prompt in self._prompts], [response.text for response in responses]
        )
        result = EvaluationResult(
            step=step,
            prompts=[prompt.text for prompt in self._prompts],
            responses=[response.text for response in responses],
            rewards=rewards,
            kls=[sum(r.logprobs) - reference for r, reference in zip(responses, references, strict=True)],
            lengths=[len(response.token_ids) for response in responses],
        )
        logger.info("evaluated step %d in %.1f s", step, time.monotonic() - started)
        return result

    async def _sample(self, prompt: Prompt) -> SampledResponse:
        identity = pair_identity(self._seed, 0, prompt.prompt_id, 0)
        return await self._generator.generate(
            GenerationRequest(
                request_id=f"evaluation-{identity}",
                prompt_token_ids=prompt.token_ids,
                coefficient=0.0,
                seed=derive_seed(identity, "evaluation"),
            )
        )

    async def _reference_logprobs(self, responses: Sequence[SampledResponse]) -> list[float]:
        items = [
            (prompt.token_ids, response.token_ids) for prompt, response in zip(self._prompts, responses, strict=True)
        ]
        chunks = [items[start : start + self._batch] for start in range(0, len(items), self._batch)]
        scored = await asyncio.gather(*(self._reference.score_responses(chunk) for chunk in chunks))
        return [logprob for chunk in scored for logprob in chunk]
