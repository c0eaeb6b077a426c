"""The reward model r̂: Bradley–Terry maximum likelihood with DeepSpeed, and scores for whoever asks."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pilaf_ray.data.collate import micro_batches
from pilaf_ray.data.response_batches import ResponseBatches
from pilaf_ray.data.retokenize import Retokenizer
from pilaf_ray.engines.finite_check import FiniteCheck
from pilaf_ray.engines.learner_rank import LearnerRank
from pilaf_ray.engines.loss_scale import float16_hint
from pilaf_ray.engines.scalar_head import response_mean, same_vocabulary
from pilaf_ray.engines.trained_models import TrainedScalarHead
from pilaf_ray.errors import NonFiniteLossError
from pilaf_ray.losses.bradley_terry import bootstrapped_loss
from pilaf_ray.sampling.identity import bootstrap_weights
from pilaf_ray.types import LabeledPair, Prompt, RewardScores, RewardStepResult, ScoringItem, TokenPair


class RewardLearner(LearnerRank):
    """One rank of r̂; every method is called on all ranks together.

    A response is scored at its last token, or by the mean over its tokens. With the policy's
    vocabulary r̂ reads the tokens that were sampled; a reward model with a tokenizer of its own
    gets prompt and response as text, in its own chat template
    (:class:`pilaf_ray.data.retokenize.Retokenizer`).

    Args:
        model_path: a language model, which gets a new scalar head, or a reward model.
        policy_path: whose tokens responses are given in.
        head_learning_rate: of the scalar head; that of the rest when left out.
        heads: on one trunk, each with a bootstrap of the pairs of its own; scores are their means.
        centering: strength of the penalty on r̂(a) + r̂(b), see ``losses/bradley_terry.py``.
        pooling: score at the last token, or the mean over a response's tokens.
        layers: keep only so many of the first layers.
        trainable_layers: train only so many of the last layers and the head; all when left out.
        max_length: longest conversation that is read where it is tokenised anew.
        place: of :class:`pilaf_ray.engines.learner_rank.LearnerRank`.
    """

    def __init__(
        self,
        *,
        model_path: str,
        policy_path: str,
        zero_stage: int,
        precision: str,
        learning_rate: float,
        head_learning_rate: float | None = None,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        max_grad_norm: float = 1.0,
        micro_batch_tokens: int,
        heads: int = 1,
        centering: float = 0.0,
        pooling: Literal["last_token", "mean"] = "last_token",
        layers: int | None = None,
        trainable_layers: int | None = None,
        gradient_checkpointing: bool = False,
        share_prompts: bool = True,
        system_prompt: str | None = None,
        max_length: int = 1024,
        **place: Any,
    ) -> None:
        super().__init__("reward", **place)
        self._pooling = pooling
        self._hint = float16_hint(precision, setting="reward_model.precision")
        self._version, self._heads, self._centering = 0, heads, centering
        self._retokenize = (
            None
            if same_vocabulary(policy_path, model_path)
            else Retokenizer(model_path, system_prompt=system_prompt, max_length=max_length)
        )
        self._engine = TrainedScalarHead(
            model_path,
            setting="reward_model",
            layers=layers,
            trainable_layers=trainable_layers,
            head_learning_rate=head_learning_rate,
            heads=heads,
            gradient_checkpointing=gradient_checkpointing,
            rank=self._rank,
            world_size=self._world_size,
            zero_stage=zero_stage,
            precision=precision,
            learning_rate=learning_rate,
            lr_schedule="constant",
            warmup_steps=warmup_steps,
            total_steps=0,
            weight_decay=weight_decay,
            betas=betas,
            max_grad_norm=max_grad_norm,
        )
        share = share_prompts and self._engine.shares_prompts()
        self._batches = ResponseBatches(share=share, max_tokens=micro_batch_tokens)
        self._max_tokens = micro_batch_tokens

    def train_step(self, batch: Sequence[LabeledPair]) -> RewardStepResult:
        """One optimiser step on the mean of ``batch``'s losses, each times its pair's ``loss_weight``.

        Raises:
            NonFiniteLossError: on every rank, before any weight changes; the batch is saved.
        """
        with self._clock.busy():
            check = self._check(batch)
            self._engine.train()
            items = [self._tokens(i.pair.plan.prompt, r.token_ids, r.text) for i in batch for r in (i.pair.a, i.pair.b)]
            groups = self._engine.share(self._pair_groups(items))
            places: list[int] = []
            margins: list[float] = []
            loss = 0.0
            for number, group in enumerate(groups):
                # A rank without work in this round still takes part in the collectives, with weight zero.
                pairs, weight = group or [0], 1.0 if group else 0.0
                rewards = self._forward([items[side] for pair in pairs for side in (2 * pair, 2 * pair + 1)])
                probability = rewards.new_tensor([batch[pair].probability for pair in pairs])
                drawn = rewards.new_tensor([bootstrap_weights(batch[pair].pair_id, self._heads) for pair in pairs])
                pair_loss = bootstrapped_loss(rewards, probability, drawn, centering=self._centering)
                check("loss", pair_loss)
                importance = rewards.new_tensor([batch[pair].pair.loss_weight for pair in pairs])
                total = (pair_loss * importance).sum() * weight / len(batch)
                self._engine.backward(total, last=number == len(groups) - 1)
                loss += float(total.detach())
                places += group
                margins += (rewards[0::2] - rewards[1::2]).mean(dim=1).tolist()[: len(group)]
            taken = self._engine.step()
            check(taken.gradient, taken.norm)
            self._version += 1
            return RewardStepResult(
                version=self._version,
                loss=self._engine.total({"loss": loss})["loss"],
                margins=tuple(self._engine.gather(places, margins, count=len(batch))),
                grad_norm=float(taken.norm),
                loss_scale=taken.loss_scale,
                skipped=taken.skipped,
            )

    @torch.no_grad()
    def score(self, items: Sequence[ScoringItem]) -> RewardScores:
        """r̂ of each response, in order; raises NonFiniteLossError where one is NaN or infinite."""
        with self._clock.busy():
            self._engine.eval()
            tokens = [self._tokens(item.prompt, item.token_ids, item.text) for item in items]
            places: list[int] = []
            values: list[float] = []
            for group in self._engine.share(self._batches.groups(tokens)):
                rows = self._forward([tokens[i] for i in group or [0]])[: len(group)]
                values += rows.flatten().tolist()
                places += [item * self._heads + head for item in group for head in range(self._heads)]
            scores = self._engine.gather(places, values, count=len(items) * self._heads)
        if not all(map(math.isfinite, scores)):
            raise NonFiniteLossError(
                f"reward model, version {self._version}: a score is not finite. Lower reward_model.learning_rate"
            )
        heads = tuple(tuple(scores[i : i + self._heads]) for i in range(0, len(scores), self._heads))
        means = tuple(sum(row) / self._heads for row in heads)
        return RewardScores(version=self._version, values=means, heads=heads if self._heads > 1 else ())

    def _pair_groups(self, items: Sequence[TokenPair]) -> list[list[int]]:
        """Micro-batches of pairs: their two sides stand next to each other in ``items``."""
        sides = list(zip(items[0::2], items[1::2], strict=True))
        if self._batches.share:
            lengths = [len(a[0]) + len(a[1]) + len(b[1]) for a, b in sides]
            return micro_batches(lengths, rows_per_item=1, max_tokens=self._max_tokens)
        lengths = [max(len(prompt) + len(response) for prompt, response in pair) for pair in sides]
        return micro_batches(lengths, rows_per_item=2, max_tokens=self._max_tokens)

    def _forward(self, tokens: Sequence[TokenPair]) -> Tensor:
        """Scores of responses, shape (responses, heads)."""
        self._cores.adapt()
        batch = self._batches.collate(tokens).to(self._engine.device)
        if self._pooling == "mean":
            return response_mean(self._engine, batch).view(-1, self._heads)
        return self._engine(batch, batch.end_row, batch.end_position).view(-1, self._heads)

    def _tokens(self, prompt: Prompt, token_ids: tuple[int, ...], text: str) -> TokenPair:
        if self._retokenize is None:
            return prompt.token_ids, token_ids
        return self._retokenize(prompt.text, text)

    def _check(self, batch: Sequence[LabeledPair]) -> FiniteCheck:
        return FiniteCheck(
            engine=self._engine,
            batch=batch,
            path=self._dump_folder / f"reward-version-{self._version}.json",
            step=f"reward model, step {self._version + 1}",
            outcome="no weight was changed, the batch is in",
            remedy=f"Lower reward_model.learning_rate{self._hint}",
        )

    def save(self, folder: Path) -> None:
        """DeepSpeed's native checkpoint with the version, the RNG state, and a Hugging Face folder ``hf/``."""
        self._engine.save(folder, state={"version": self._version})

    def load(self, folder: Path) -> None:
        """Restore what :meth:`save` wrote, with whatever number of ranks."""
        self._version = int(self._engine.load(folder)["version"])
