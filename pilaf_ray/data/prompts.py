"""Prompts: reading, rendering, and a resumable order."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pilaf_ray.data.prompt_files import read_prompts
from pilaf_ray.data.prompt_shards import PromptShards
from pilaf_ray.data.prompt_stream import StreamCursor
from pilaf_ray.data.prompt_turns import PromptTurn
from pilaf_ray.errors import ModelError, PromptError
from pilaf_ray.types import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """Prompts that fit, and how many did not."""

    prompts: tuple[Prompt, ...]
    dropped: int
    truncated: int

    @property
    def count(self) -> int:
        """Prompts of an epoch."""
        return len(self.prompts)

    @property
    def fingerprint(self) -> str:
        """Equal where the prompts and their order are."""
        return hashlib.sha256("\n".join(prompt.prompt_id for prompt in self.prompts).encode()).hexdigest()

    def cursor(self, *, seed: int) -> "PromptCursor":
        """Their order for ``seed``."""
        return PromptCursor(self.prompts, seed=seed)


class PromptRenderer:
    """Makes prompts of texts, and counts those that are too long.

    Args:
        path: the source, for messages.
        overlong: ``drop``, ``truncate`` or ``error``.

    Raises:
        ModelError: there is no tokenizer.
    """

    def __init__(
        self,
        path: str,
        *,
        tokenizer_path: str,
        system_prompt: str | None,
        chat_template: bool,
        max_prompt_tokens: int,
        overlong: str,
    ) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_path)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"model.policy: no tokenizer in '{tokenizer_path}': {reason}") from error
        self._path, self._limit, self._overlong = path, max_prompt_tokens, overlong
        self._system_prompt, self._chat_template = system_prompt, chat_template
        self.dropped = 0
        self.truncated = 0

    def __call__(self, text: str) -> Prompt | None:
        """The prompt; None where it is too long and dropped. Raises PromptError where that is an error."""
        tokens = render(self._tokenizer, text, system_prompt=self._system_prompt, chat_template=self._chat_template)
        if len(tokens) > self._limit:
            if self._overlong == "error":
                raise PromptError(
                    f"{self._path}: a prompt has {len(tokens)} tokens, prompts.max_prompt_tokens is "
                    f"{self._limit}: raise it, or set prompts.overlong: drop; it begins '{text[:40]}'"
                )
            if self._overlong == "drop":
                self.dropped += 1
                return None
            self.truncated += 1
            # The end holds the question and the template's turn marker, so the beginning goes.
            tokens = tokens[-self._limit :]
        return Prompt(prompt_id=prompt_identity(text), text=text, token_ids=tuple(tokens))


def load_prompts(
    *, path: str, column: str, split: str, limit: int | None, max_prompt_tokens: int, **rendering: Any
) -> PromptSet:
    """Read, render and tokenise; duplicates are kept once. Raises PromptError or ModelError.

    Args:
        rendering: further arguments of :class:`PromptRenderer`.
    """
    make = PromptRenderer(path, max_prompt_tokens=max_prompt_tokens, **rendering)
    # A dictionary keeps the order of what is new to it.
    texts: dict[str, None] = {}
    for text in read_prompts(path, column=column, split=split):
        texts[text] = None
        if len(texts) == limit:
            break
    if not texts:
        raise PromptError(f"{path}: no prompts in column '{column}'")
    prompts = tuple(prompt for prompt in map(make, texts) if prompt is not None)
    if not prompts:
        raise PromptError(
            f"{path}: all {make.dropped} prompts are longer than prompts.max_prompt_tokens={max_prompt_tokens}: "
            "raise it"
        )
    return PromptSet(prompts=prompts, dropped=make.dropped, truncated=make.truncated)


class StreamedPrompts:
    """Prompts that are read as they are asked for: a :class:`pilaf_ray.data.prompt_turns.PromptSource`.

    Args:
        rendering: further arguments of :class:`PromptRenderer`.

    Raises:
        PromptError: the files cannot be listed or read, or no prompt of the first window fits.
        ModelError: there is no tokenizer.
    """

    def __init__(self, *, path: str, column: str, limit: int | None, **rendering: Any) -> None:
        self._shards = PromptShards(path, column=column, limit=limit)
        self._render = PromptRenderer(path, **rendering)

    @property
    def count(self) -> int:
        """Prompts of an epoch; those that are too long among them."""
        return self._shards.rows

    @property
    def fingerprint(self) -> str:
        """Equal where the files are; see PromptShards."""
        return self._shards.fingerprint

    def cursor(self, *, seed: int) -> StreamCursor:
        """Their order for ``seed``."""
        return StreamCursor(self._shards, seed=seed, render=self._render)


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

    def at(self, position: int) -> PromptTurn:
        """What is asked at ``position``, from 0."""
        epoch, offset = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(len(self._prompts)))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
        return PromptTurn(epoch=epoch, draw=0, prompt=self._prompts[self._order[offset]])
