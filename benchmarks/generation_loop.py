"""Interpolated decoding as one would write it with transformers: two models, two caches, a batch padded on the left.

Run by `benchmarks.generation` in a process of its own. Both models see every row, and the batch goes on until its
longest response has ended, as `generate` does it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.workers import Commands


class Loop:
    """Policy and reference with what decoding needs of them."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        dtype = getattr(torch, arguments["dtype"])
        self._models: list[Any] = [
            AutoModelForCausalLM.from_pretrained(arguments[side], dtype=dtype).eval()
            for side in ("policy", "reference")
        ]
        tokenizer: Any = AutoTokenizer.from_pretrained(arguments["policy"])
        self._end = int(tokenizer.eos_token_id)
        self._limit, self._temperature = arguments["max_new_tokens"], arguments["temperature"]

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Sequence[int]], coefficients: Sequence[float], seed: int) -> int:
        """Tokens of all responses, their ends included."""
        draw = torch.Generator().manual_seed(seed)
        longest = max(map(len, prompts))
        tokens = torch.tensor([[self._end] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        weight = torch.tensor(coefficients).unsqueeze(1)
        caches = [DynamicCache() for _ in self._models]
        alive, total = torch.ones(len(prompts), dtype=torch.bool), 0
        for _ in range(self._limit):
            policy, reference = (
                self._last_logits(model, cache, tokens, mask) for model, cache in zip(self._models, caches, strict=True)
            )
            mixed = (1 + weight) * policy - weight * reference
            drawn = torch.multinomial((mixed / self._temperature).softmax(-1), 1, generator=draw)
            total += int(alive.sum())
            alive &= drawn.squeeze(1) != self._end
            if not alive.any():
                break
            tokens, mask = drawn, torch.cat((mask, torch.ones_like(drawn)), dim=1)
        return total

    def _last_logits(self, model: Any, cache: DynamicCache, tokens: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits


def main() -> None:
    """Answer each command with the number of tokens."""
    commands = Commands()
    torch.set_num_threads(commands.arguments["threads"])
    loop = Loop(commands.arguments)
    for command in commands:
        tokens = loop.sample(command["prompts"], command["coefficients"], command["seed"])
        commands.answer({"tokens": tokens})


if __name__ == "__main__":
    main()
