"""Prompts: reading, rendering, and a resumable order."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pilaf_ray.data.prompt_files import read_prompts
from pilaf_ray.errors import ModelError, PromptError
from pilaf_ray.types import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """Prompts that fit, and how many did not."""

    prompts: tuple[Prompt, ...]
    dropped: int
    truncated: int


def load_prompts(
    *,
    path: str,
    column: str,
    split: str,
    limit: int | None,
    tokenizer_path: str,
    system_prompt: str | None,
    chat_template: bool,
    max_prompt_tokens: int,
    overlong: str,
) -> PromptSet:
    """Read, render and tokenise; duplicates are kept once. Raises PromptError or ModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"model.policy: no tokenizer in '{tokenizer_path}': {reason}") from error
    texts = list(dict.fromkeys(read_prompts(path, column=column, split=split)))[:limit]
    if not texts:
        raise PromptError(f"{path}: no prompts in column '{column}'")
    prompts, dropped, truncated = [], 0, 0
    for text in texts:
        tokens = render(tokenizer, text, system_prompt=system_prompt, chat_template=chat_template)
        if len(tokens) > max_prompt_tokens:
            if overlong == "error":
                raise PromptError(
                    f"{path}: a prompt has {len(tokens)} tokens, prompts.max_prompt_tokens is "
                    f"{max_prompt_tokens}: raise it, or set prompts.overlong: drop; it begins '{text[:40]}'"
                )
            if overlong == "drop":
                dropped += 1
                continue
            truncated += 1
            # The end holds the question and the template's turn marker, so the beginning goes.
            tokens = tokens[-max_prompt_tokens:]
        prompts.append(Prompt(prompt_id=prompt_identity(text), text=text, token_ids=tuple(tokens)))
    if not prompts:
        raise PromptError(
            f"{path}: all {dropped} prompts are longer than prompts.max_prompt_tokens={max_prompt_tokens}: raise it"
        )
    return PromptSet(prompts=tuple(prompts), dropped=dropped, truncated=truncated)


def prompt_identity(text: str) -> str:
    """A prompt's name, from its text alone."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def render(tokenizer: Any, text: str, *, system_prompt: str | None, chat_template: bool) -> list[int]:
    """Token ids of one user turn, ready for the model's answer."""
    if not chat_template:
        return list(tokenizer(text)["input_ids"])
    messages = [{"role": "user", "content": text}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


class PromptCursor:
    """An endless, reproducible order: each epoch is a permutation drawn from (seed, epoch).

    The position alone is the state, so any position can be asked for at any time.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        self._prompts = list(prompts)
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def at(self, position: int) -> tuple[int, Prompt]:
        """(epoch, prompt) at ``position``, from 0."""
        epoch, offset = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(len(self._prompts)))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
        return epoch, self._prompts[self._order[offset]]
