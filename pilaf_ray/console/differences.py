"""What two responses do not share, and what single tokens say about policy and reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from pathlib import Path
from re import findall

from tokenizers import Tokenizer

from pilaf_ray.types import SampledResponse

MAX_WORDS = 1500
"""Longer texts are shown without marks: comparing takes the product of their lengths."""
SHADES = 5
FULL_SHADE_NATS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of text, and whether the other text lacks it."""

    text: str
    differs: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadedToken:
    """A token's text, its log π − log π_ref in nats, and the shade from −5 to 5."""

    text: str
    log_ratio: float
    shade: int


def word_differences(a: str, b: str) -> tuple[list[Segment], list[Segment]]:
    """Both texts cut where they part, word by word; white space belongs to the word before it."""
    words_a, words_b = (findall(r"\s*\S+\s*?|\s+", text) for text in (a, b))
    if max(len(words_a), len(words_b)) > MAX_WORDS:
        return [Segment(text=a, differs=False)], [Segment(text=b, differs=False)]
    matcher = SequenceMatcher(a=[w.strip() for w in words_a], b=[w.strip() for w in words_b], autojunk=False)
    same_a, same_b = [False] * len(words_a), [False] * len(words_b)
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            same_a[block.a + offset] = same_b[block.b + offset] = True
    return _segments(words_a, same_a), _segments(words_b, same_b)


def _segments(words: Sequence[str], same: Sequence[bool]) -> list[Segment]:
    grouped = groupby(zip(words, same, strict=True), key=lambda item: item[1])
    return [Segment(text="".join(word for word, _ in group), differs=not shared) for shared, group in grouped]


def shaded_tokens(response: SampledResponse, tokenizer: Tokenizer | None) -> list[ShadedToken] | None:
    """The response token by token; None where the sampler did not see both networks apart."""
    if response.policy_logprobs is None or response.reference_logprobs is None or tokenizer is None:
        return None
    pieces = _pieces(tokenizer, response.token_ids)
    ratios = [p - r for p, r in zip(response.policy_logprobs, response.reference_logprobs, strict=True)]
    return [
        ShadedToken(text=text, log_ratio=ratio, shade=_shade(ratio)) for text, ratio in zip(pieces, ratios, strict=True)
    ]


def _shade(log_ratio: float) -> int:
    """One of 2·5 + 1 steps, full from ±2 nats on."""
    return max(-SHADES, min(SHADES, round(SHADES * log_ratio / FULL_SHADE_NATS)))


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Text of each token; what only several tokens together spell appears with the last of them."""
    pieces: list[str] = []
    start, shown = 0, ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[start:end]), skip_special_tokens=False)
        if text.endswith("�") and end - start < 8:
            pieces.append("")
            continue
        pieces.append(text[len(shown) :])
        # Decoding from a fixed start keeps the space that some tokenizers drop from a first token.
        if end - start >= 32:
            start, shown = end, ""
        else:
            shown = text
    return pieces


def load_tokenizer(run: Path, policy: str) -> Tokenizer | None:
    """The policy's tokenizer from its own folder, or from the run's newest checkpoint; None where neither is here."""
    newest = sorted((run / "checkpoints").glob("step-*/**/tokenizer.json"), reverse=True)
    for file in (Path(policy) / "tokenizer.json", *newest):
        if file.is_file():
            return Tokenizer.from_file(str(file))
    return None
