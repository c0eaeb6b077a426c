"""What a cursor over prompts gives."""

from dataclasses import dataclass
from typing import Protocol

from pilaf_ray.types import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTurn:
    """A prompt at a position of a run.

    Example: ``PromptTurn(epoch=0, draw=0, prompt=Prompt(prompt_id="a1", text="Hi", token_ids=(5,)))``
    """

    epoch: int
    draw: int
    """Which time the prompt is asked within the epoch: with epoch and prompt, what makes a pair."""
    prompt: Prompt


class PromptCursorPort(Protocol):
    """An endless order of prompts: a function of the position, whatever was asked before."""

    def at(self, position: int) -> PromptTurn:
        """The turn at ``position``, from 0."""
        ...


class PromptSource(Protocol):
    """Prompts to learn from, in memory or not."""

    @property
    def count(self) -> int:
        """Prompts of an epoch."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal where the order for a seed is."""
        ...

    def cursor(self, *, seed: int) -> PromptCursorPort:
        """Their order for ``seed``."""
        ...
