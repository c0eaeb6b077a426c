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
    first, c = len(request.prompt_token_ids), request.coefficient
    tokens = [*request.prompt_token_ids, *given]
    logprobs: list[float] = []
    r = next_logits(reference, tokens)[first - 1 :]
    for policy, until in stages:
        # One forward gives every row, because no row sees the tokens behind it.
        h = next_logits(policy, tokens)[first - 1 :]
        own, mixed = h.log_softmax(-1), ((1 + c) * h - c * r).log_softmax(-1)
        while len(logprobs) < until and END not in given[: len(logprobs)]:
            position = len(logprobs)
            assert_drawn(own[position], mixed[position], given[position], seed=request.seed, position=position)
            logprobs.append(mixed[position, given[position]].item())
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


def assert_records(response: SampledResponse, request: GenerationRequest, models: Sequence[torch.nn.Module]) -> None:
    """Mixed responses say what each network alone gave their tokens; ``models``: policy, reference."""
    if not request.coefficient:
        assert response.policy_logprobs is response.reference_logprobs is None
        return
    first = len(request.prompt_token_ids)
    tokens = [*request.prompt_token_ids, *response.token_ids]
    places = torch.tensor(response.token_ids).unsqueeze(1)
    for model, found in zip(models, (response.policy_logprobs, response.reference_logprobs), strict=True):
        expected = next_logits(model, tokens)[first - 1 : -1].log_softmax(-1).gather(1, places).squeeze(1)
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=0)


def assert_likeliest(
    response: SampledResponse, request: GenerationRequest, models: Sequence[torch.nn.Module], *, length: int
) -> None:
    """Each token is the mixture's likeliest, until the end or ``length`` tokens; ``models``: policy, reference."""
    first = len(request.prompt_token_ids)
    tokens = [*request.prompt_token_ids, *response.token_ids]
    rows = mixed_logprobs(*models, tokens, request.coefficient)[first - 1 : -1]
    assert rows.argmax(-1).tolist() == list(response.token_ids)
    torch.testing.assert_close(torch.tensor(response.logprobs), rows.max(-1).values, atol=1e-3, rtol=0)
    ends = [place for place, token in enumerate(response.token_ids, start=1) if token == END] or [length]
    assert len(response.token_ids) == ends[0]


@torch.no_grad()
def second_token(models: Sequence[torch.nn.Module], prompt: Sequence[int], coefficient: float) -> torch.Tensor:
    """Probability of each token at the second place behind ``prompt``, (vocab,), given that the first did not end it.

    Summed over all first ones; ``models``: policy, reference.
    """
    first = mixed_logprobs(*models, prompt, coefficient)[-1].double().exp()
    sides = []
    for model in models:
        cache = model(torch.tensor([list(prompt)])).past_key_values
        cache.batch_repeat_interleave(len(first))
        sides.append(model(torch.arange(len(first)).unsqueeze(1), past_key_values=cache).logits[:, -1])
    rows = ((1 + coefficient) * sides[0] - coefficient * sides[1]).softmax(-1).double()
    first[END] = 0.0
    return (first @ rows) / first.sum()


def chi_square_z(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Standard normal deviate of Pearson's statistic, by Wilson and Hilferty's cube root; rare tokens count as one."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    rare = [] if common.all() else [~common]
    observed, expected = (
        torch.cat([values[common], *(values[few].sum().view(1) for few in rare)]) for values in (counts, expected)
    )
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = len(observed) - 1
    assert degrees > 30
    spread = 2 / (9 * degrees)
    return float(((statistic / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5)


def alike(values: torch.Tensor, rank: torch.Tensor, *, weights: torch.Tensor, groups: int) -> torch.Tensor:
    """Sums of ``values``, (vocab,), over groups of tokens of about the same ``weights`` and neighbours in ``rank``.

    A difference that follows ``rank`` shows after fewer draws than one between single tokens.
    """
    order = rank.argsort()
    group = torch.empty(len(values), dtype=torch.long)
    group[order] = (weights[order].cumsum(0) * groups).long().clamp_max(groups - 1)
    return torch.zeros(groups, dtype=values.dtype).index_add(0, group, values)
