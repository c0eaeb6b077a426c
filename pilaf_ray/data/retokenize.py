"""The same conversation in another model's tokens, by way of its text."""

from typing import Any

from pilaf_ray.data.prompts import render
from pilaf_ray.errors import ModelError
from pilaf_ray.types import TokenPair


class Retokenizer:
    """Renders prompts and responses with the tokenizer and chat template of ``path``.

    A response ends with that tokenizer's end of sequence, whether the policy stopped or
    was cut: where it ends is what a reward model reads.

    Raises:
        ModelError: there is no tokenizer, or it has no end-of-sequence token.
    """

    def __init__(self, path: str, *, system_prompt: str | None, max_length: int) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ModelError(f"reward_model.path: no tokenizer in '{path}': {str(error).splitlines()[0]}") from error
        if self._tokenizer.eos_token_id is None:
            raise ModelError(f"reward_model.path: the tokenizer of '{path}' has no end-of-sequence token to score at")
        self._system_prompt = system_prompt
        self._max_length = max_length

    def __call__(self, prompt: str, response: str) -> TokenPair:
        """(prompt tokens, response tokens); a prompt too long for ``max_length`` loses its beginning."""
        chat = self._tokenizer.chat_template is not None
        before = render(self._tokenizer, prompt, system_prompt=self._system_prompt, chat_template=chat)
        after = [*self._tokenizer(response, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]
        after = after[-(self._max_length - 1) :]
        return tuple(before[-(self._max_length - len(after)) :]), tuple(after)
