"""An independent account of what the engine should produce: two plain Hugging Face models."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pilaf_ray.types import GenerationRequest, SampledResponse

END = 2


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def next_logits(model: torch.nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """Logits behind every token, (tokens, vocab), without a cache."""
    return model(torch.tensor([list(tokens)])).logits[0]


def mixed_logprobs(
    policy: torch.nn.Module, reference: torch.nn.Module, tokens: Sequence[int], coefficient: float
) -> torch.Tensor:
    """log softmax((1 + c)·policy − c·reference) behind every token."""
    h, r = next_logits(policy, tokens), next_logits(reference, tokens)
    return ((1 + coefficient) * h - coefficient * r).log_softmax(-1)


ROUNDING = 1e-4
"""By how much a cumulated probability may differ between two float32 implementations."""


def number(text: str) -> float:
    """The number in [0, 1) that belongs to ``text``."""
    return (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") // 2048) / 2**53


def inverted(weights: np.ndarray, at: float) -> set[int]:
    """Tokens at which the cumulated weight may pass the part ``at`` of the whole."""
    above = np.cumsum(weights)
    place, below = at * above[-1], above - weights
    return set(np.flatnonzero((below - ROUNDING <= place) & (place < above + ROUNDING)).tolist())


def assert_drawn(policy: torch.Tensor, mixed: torch.Tensor, token: int, *, seed: int, position: int) -> None:
    """``token`` is the policy's, kept or replaced, by the numbers of (seed, position); log-probabilities, in numpy."""
    p, q = (np.exp(side.double().numpy()) for side in (policy, mixed))
    drafts = inverted(p, number(f"{seed}/{position}"))
    keep = number(f"{seed}/{position}/keep")
    possible = {draft for draft in drafts if keep < q[draft] / p[draft] + 10 * ROUNDING}
    if any(keep >= q[draft] / p[draft] - 10 * ROUNDING for draft in drafts) and not np.array_equal(p, q):
        possible |= inverted(np.maximum(q - p, 0.0), number(f"{seed}/{position}/redraw"))
    assert token in possible, (position, token, possible)


def replay(
    stages: Sequence[tuple[torch.nn.Module, int]],
    reference: torch.nn.Module,
    request: GenerationRequest,
    given: Sequence[int],
) -> list[float]:
    """Log-probabilities by hand, each given token checked against the documented rule; ``stages``: (policy, until)."""
    tokens = list(request.prompt_token_ids)
    logprobs: list[float] = []
    for policy, until in stages:
        while len(logprobs) < until and (not logprobs or tokens[-1] != END):
            position = len(logprobs)
            own = next_logits(policy, tokens)[-1].log_softmax(-1)
            row = mixed_logprobs(policy, reference, tokens, request.coefficient)[-1]
            assert_drawn(own, row, given[position], seed=request.seed, position=position)
            tokens.append(given[position])
            logprobs.append(row[tokens[-1]].item())
    return logprobs


class CachedModel:
    """Next-token logits with a KV cache, which can be handed on to another model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._cache = None
        self._seen = 0

    @torch.no_grad()
    def next(self, tokens: Sequence[int]) -> torch.Tensor:
        out = self.model(torch.tensor([list(tokens[self._seen :])]), past_key_values=self._cache, use_cache=True)
        self._cache, self._seen = out.past_key_values, len(tokens)
        return out.logits[0, -1]


def replay_with_kept_caches(
    stages: Sequence[tuple[torch.nn.Module, int]],
    reference: torch.nn.Module,
    request: GenerationRequest,
    given: Sequence[int],
) -> list[float]:
    """As :func:`replay`, but a new policy goes on with the KV that the old one left."""
    tokens = list(request.prompt_token_ids)
    logprobs: list[float] = []
    policy_side, reference_side = CachedModel(stages[0][0]), CachedModel(reference)
    for policy, until in stages:
        policy_side.model = policy
        while len(logprobs) < until and (not logprobs or tokens[-1] != END):
            c, position = request.coefficient, len(logprobs)
            logits = policy_side.next(tokens)
            row = ((1 + c) * logits - c * reference_side.next(tokens)).log_softmax(-1)
            assert_drawn(logits.log_softmax(-1), row, given[position], seed=request.seed, position=position)
            tokens.append(given[position])
            logprobs.append(row[tokens[-1]].item())
    return logprobs


def assert_replayed(
    response: SampledResponse,
    request: GenerationRequest,
    stages: Sequence[tuple[torch.nn.Module, int]],
    reference: torch.nn.Module,
    *,
    kept_caches: bool = False,
) -> None:
    """The response is, token for token, what the two models give by hand."""
    logprobs = (replay_with_kept_caches if kept_caches else replay)(stages, reference, request, response.token_ids)
    assert len(response.token_ids) == len(logprobs)
    torch.testing.assert_close(torch.tensor(response.logprobs), torch.tensor(logprobs), atol=1e-3, rtol=0)
