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


def assert_replayed(
    response: SampledResponse,
    request: GenerationRequest,
    stages: Sequence[tuple[torch.nn.Module, int]],
    reference: torch.nn.Module,
) -> None:
    """The response is, token for token, what the two models give by hand."""
    tokens, logprobs = replay(stages, reference, request)
    assert list(response.token_ids) == tokens
    torch.testing.assert_close(torch.tensor(response.logprobs), torch.tensor(logprobs), atol=1e-3, rtol=0)
