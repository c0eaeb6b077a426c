"""The section ``prompts``: where they come from and how they are rendered."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pilaf_ray.config.base import Section


class PromptSourceConfig(Section):
    """Where prompts come from."""

    path: str
    """A file (.jsonl, .csv, .parquet), glob, URL or hub data set; or builtin:reviews/train, …/evaluation, …/final."""
    column: str = "prompt"
    """Column that holds the prompt text."""
    split: str = "train"
    """Split of a hub data set."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many."""
    stream: bool = False
    """Read .parquet or .jsonl files, or a folder of them, a piece at a time while the run goes on; train only."""


class PromptsSection(Section):
    """Prompts and how they are rendered."""

    train: PromptSourceConfig
    """Prompts to learn from."""
    evaluation: PromptSourceConfig
    """Held-out prompts; never trained on."""
    system_prompt: str | None = None
    """System message; the template's own default when left out."""
    chat_template: bool = True
    """Render prompts with the tokenizer's chat template."""
    max_prompt_tokens: int = Field(ge=1)
    """Longest rendered prompt, in tokens."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a longer prompt; dropped and truncated ones are counted."""

    @model_validator(mode="after")
    def _held_out_prompts_are_kept(self) -> Self:
        if self.evaluation.stream:
            raise ValueError(
                "prompts.evaluation.stream: the held-out prompts are read once and kept: leave stream out, and say "
                "with evaluation.prompts how many are read"
            )
        return self
