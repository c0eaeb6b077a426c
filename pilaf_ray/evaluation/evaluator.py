"""Held-out evaluation of the policy that the generators serve now."""

import asyncio
import logging
import math
import time
from collections.abc import Sequence

from pilaf_ray.evaluation.report import EvaluationResult
from pilaf_ray.pipeline.ports import GeneratorPort, TextScorer, TokenScorer
from pilaf_ray.sampling.identity import derive_seed, pair_identity
from pilaf_ray.types import GenerationRequest, Prompt, SampledResponse, TokenPair

logger = logging.getLogger(__name__)


class Evaluator:
    """Samples responses to held-out prompts from π and measures reward and KL.

    The KL estimate of a response is Σ_t log π_θ(y_t) − log π_ref(y_t) on y ∼ π_θ,
    unbiased for KL(π_θ ‖ π_ref) at temperature 1; :func:`kl_control` goes with it. The seeds
    depend on the prompt only, so two evaluations differ by the weights and by nothing else.

    Args:
        samples: responses to each prompt.
        batch_responses: go to the reference together.
        batches_at_once: under way there; as many as replicas, so that other work has its turn between them.
    """

    def __init__(
        self,
        *,
        prompts: Sequence[Prompt],
        generator: GeneratorPort,
        reference: TokenScorer,
        oracle: TextScorer,
        seed: int,
        samples: int = 1,
        batch_responses: int = 16,
        batches_at_once: int = 1,
    ) -> None:
        self._prompts = [prompt for prompt in prompts for _ in range(samples)]
        self._generator = generator
        self._reference = reference
        self._oracle = oracle
        self._seed = seed
        self._samples = samples
        self._batch = batch_responses
        self._room = asyncio.Semaphore(batches_at_once)

    async def evaluate(self, step: int, *, coefficient: float = 0.0) -> EvaluationResult:
        """Evaluate the served policy, or with coefficient −1 the reference; ``step`` only labels the result."""
        return await self.score(step, await self.sample(coefficient=coefficient))

    async def sample(self, *, coefficient: float = 0.0) -> list[SampledResponse]:
        """Responses of the served policy, or with coefficient −1 of the reference, in the order of the prompts."""
        started = time.monotonic()
        numbered = [(prompt, number % self._samples) for number, prompt in enumerate(self._prompts)]
        responses = list(await asyncio.gather(*(self._respond(*item, coefficient) for item in numbered)))
        logger.info("sampled %d held-out responses in %.1f s", len(responses), time.monotonic() - started)
        return responses

    async def score(self, step: int, responses: Sequence[SampledResponse]) -> EvaluationResult:
        """Measure what :meth:`sample` gave; ``step`` only labels the result."""
        started = time.monotonic()
        references = await self._reference_logprobs(responses)
        rewards = await self._oracle.score_texts(
            [prompt.text for prompt in self._prompts], [response.text for response in responses]
        )
        scored = [(response.logprobs, row) for response, row in zip(responses, references, strict=True)]
        result = EvaluationResult(
            step=step,
            prompts=[prompt.text for prompt in self._prompts],
            responses=[response.text for response in responses],
            rewards=rewards,
            kls=[sum(policy) - sum(reference) for policy, reference in scored],
            lengths=[len(response.token_ids) for response in responses],
            kl_controls=[kl_control(policy, reference) for policy, reference in scored],
            token_ids=[list(response.token_ids) for response in responses],
            samples=self._samples,
        )
        logger.info("scored step %d in %.1f s", step, time.monotonic() - started)
        return result

    async def _respond(self, prompt: Prompt, draw: int, coefficient: float) -> SampledResponse:
        identity = pair_identity(self._seed, 0, prompt.prompt_id, draw)
        return await self._generator.generate(
            GenerationRequest(
                request_id=f"evaluation-{identity}-{coefficient:g}",
                prompt_token_ids=prompt.token_ids,
                coefficient=coefficient,
                seed=derive_seed(identity, "evaluation"),
            )
        )

    async def _reference_logprobs(self, responses: Sequence[SampledResponse]) -> list[list[float]]:
        items = [
            (prompt.token_ids, response.token_ids) for prompt, response in zip(self._prompts, responses, strict=True)
        ]
        chunks = [items[start : start + self._batch] for start in range(0, len(items), self._batch)]
        scored = await asyncio.gather(*(self._score_chunk(chunk) for chunk in chunks))
        return [logprobs for chunk in scored for logprobs in chunk]

    async def _score_chunk(self, chunk: Sequence[TokenPair]) -> list[list[float]]:
        async with self._room:
            return await self._reference.score_tokens(chunk)


def kl_control(policy: Sequence[float], reference: Sequence[float]) -> float:
    """Σ_t (u_t − 1) with u_t = π_ref(y_t)/π_θ(y_t), from per-token log-probabilities.

    Given the tokens before it, each term has mean 0 under π_θ, so any multiple of the sum may be added to
    the plain KL estimate; the multiple 1 gives the estimator of Schulman 2020, "Approximating KL divergence".
    """
    return sum(math.expm1(r - p) for p, r in zip(policy, reference, strict=True))
