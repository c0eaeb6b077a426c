"""A sequence-classification model as oracle."""

from collections.abc import Sequence
from typing import Any

import torch

from pilaf_ray.errors import ModelError
from pilaf_ray.observability.progress import PROGRESS
from pilaf_ray.observability.usage import UsageClock
from pilaf_ray.oracle.label_rules import LabelRule
from pilaf_ray.types import PreferenceLabel, ResponsePair, RoleUsage


class RewardModelOracle:
    """Rewards by a Hugging Face model with one output; batched, on any device."""

    def __init__(
        self,
        *,
        path: str,
        dtype: str,
        device: str,
        max_length: int,
        micro_batch_size: int,
        cpu_threads: int,
        use_chat_template: bool,
        rule: LabelRule,
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.set_num_threads(cpu_threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
            model: Any = AutoModelForSequenceClassification.from_pretrained(path, dtype=getattr(torch, dtype))
        except (OSError, ValueError) as error:
            raise ModelError(f"oracle.path: cannot load '{path}': {str(error).splitlines()[0]}") from error
        if model.config.num_labels != 1:
            raise ModelError(f"oracle.path: '{path}' has {model.config.num_labels} outputs; a reward model has 1")
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self._tokenizer.pad_token_id
        self._model = model.to(device).eval()
        self._device = device
        self._max_length = max_length
        self._micro_batch = micro_batch_size
        self._chat = use_chat_template
        self._rule = rule
        self._clock = UsageClock("oracle")

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        """One label a pair."""
        prompts = [pair.plan.prompt.text for pair in pairs]
        rewards = await self.score_texts(
            prompts + prompts, [pair.a.text for pair in pairs] + [pair.b.text for pair in pairs]
        )
        return [
            PreferenceLabel(
                pair_id=pair.plan.pair_id,
                probability=self._rule(a - b, pair.plan.label_seed),
                source="reward_model",
                reward_a=a,
                reward_b=b,
            )
            for pair, a, b in zip(pairs, rewards[: len(pairs)], rewards[len(pairs) :], strict=True)
        ]

    @torch.no_grad()
    async def score_texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Rewards of single responses, in order."""
        texts = [self._render(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        rewards = [0.0] * len(texts)
        with self._clock.busy():
            for start in range(0, len(order), self._micro_batch):
                chosen = order[start : start + self._micro_batch]
                inputs = self._tokenizer(
                    [texts[index] for index in chosen],
                    padding=True,
                    truncation=True,
                    max_length=self._max_length,
                    return_tensors="pt",
                ).to(self._device)
                for index, value in zip(chosen, self._model(**inputs).logits[:, 0].tolist(), strict=True):
                    rewards[index] = float(value)
                PROGRESS.advance()
        return rewards

    def _render(self, prompt: str, response: str) -> str:
        if not self._chat:
            return f"{prompt}\n{response}"
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False))

    def usage(self) -> RoleUsage:
        """Busy time and peak memory."""
        return self._clock.usage()
