"""An independent account of what the engine should produce: two plain Hugging Face models."""

from collections.abc import Sequence
from pathlib import Path

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


def replay(
    stages: Sequence[tuple[torch.nn.Module, int]],
    reference: torch.nn.Module,
    request: GenerationRequest,
) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities by the documented rule; ``stages``: (policy, tokens until)."""
    generator = torch.Generator().manual_seed(request.seed)
    tokens = list(request.prompt_token_ids)
    sampled: list[int] = []
    logprobs: list[float] = []
    for policy, until in stages:
        while len(sampled) < until and (not sampled or sampled[-1] != END):
            row = mixed_logprobs(policy, reference, tokens, request.coefficient)[-1]
            noise = torch.empty(row.shape, dtype=torch.float64).exponential_(generator=generator)
            token = int((row.softmax(-1) * noise.reciprocal()).argmax())
            tokens.append(token)
            sampled.append(token)
            logprobs.append(row[token].item())
    return sampled, logprobs


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
    stages: Sequence[tuple[torch.nn.Module, int]], reference: torch.nn.Module, request: GenerationRequest
) -> tuple[list[int], list[float]]:
    """As :func:`replay`, but a new policy goes on with the KV that the old one left."""
    generator = torch.Generator().manual_seed(request.seed)
    tokens = list(request.prompt_token_ids)
    first = len(tokens)
    logprobs: list[float] = []
    policy_side, reference_side = CachedModel(stages[0][0]), CachedModel(reference)
    for policy, until in stages:
        policy_side.model = policy
        while len(tokens) - first < until and (len(tokens) == first or tokens[-1] != END):
            c = request.coefficient
            row = ((1 + c) * policy_side.next(tokens) - c * reference_side.next(tokens)).log_softmax(-1)
            noise = torch.empty(row.shape, dtype=torch.float64).exponential_(generator=generator)
            tokens.append(int((row.softmax(-1) * noise.reciprocal()).argmax()))
            logprobs.append(row[tokens[-1]].item())
    return tokens[first:], logprobs


def assert_replayed(
    response: SampledResponse,
    request: GenerationRequest,
    stages: Sequence[tuple[torch.nn.Module, int]],
    reference: torch.nn.Module,
    *,
    kept_caches: bool = False,
) -> None:
    """The response is, token for token, what the two models give by hand."""
    tokens, logprobs = (replay_with_kept_caches if kept_caches else replay)(stages, reference, request)
    assert list(response.token_ids) == tokens
    torch.testing.assert_close(torch.tensor(response.logprobs), torch.tensor(logprobs), atol=1e-3, rtol=0)
