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


def assert_drawn(row: torch.Tensor, token: int, *, seed: int, position: int) -> None:
    """``token`` is where the cumulated probability passes the number of (seed, position); in numpy."""
    word = int.from_bytes(hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest(), "big")
    cumulated = np.cumsum(np.exp(row.double().numpy()))
    number = (word // 2048) / 2**53 * cumulated[-1]
    below = cumulated[token - 1] if token else 0.0
    assert below - ROUNDING <= number < cumulated[token] + ROUNDING, (position, token, below, number, cumulated[token])


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
            row = mixed_logprobs(policy, reference, tokens, request.coefficient)[-1]
            assert_drawn(row, given[position], seed=request.seed, position=position)
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
            row = ((1 + c) * policy_side.next(tokens) - c * reference_side.next(tokens)).log_softmax(-1)
            assert_drawn(row, given[position], seed=request.seed, position=position)
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
