"""The policy learner: DeepSpeed ZeRO 0–3 on preference losses."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pilaf_ray.data.pair_batches import PairBatches
from pilaf_ray.engines.finite_check import FiniteCheck
from pilaf_ray.engines.learner_rank import LearnerRank
from pilaf_ray.engines.lora_checks import LoraSettings
from pilaf_ray.engines.loss_scale import float16_hint
from pilaf_ray.engines.scoring import sum_by_sequence
from pilaf_ray.engines.trained_models import TrainedPolicy
from pilaf_ray.engines.zero_options import NO_OFFLOAD, OffloadSettings
from pilaf_ray.losses.preference import LOSSES, LossOutputs, PreferenceInputs
from pilaf_ray.types import LabeledPair, StepResult, TokenPair

logger = logging.getLogger(__name__)


class PolicyLearner(LearnerRank):
    """One rank of the policy learner; every method is called on all ranks together.

    Each rank is given the whole batch and takes its share, so results do not depend on
    the number of ranks: the loss is the mean over all pairs of the batch.

    Args:
        place: of :class:`pilaf_ray.engines.learner_rank.LearnerRank`; the rest are settings of the configuration's
            ``learner`` and ``algorithm``.
    """

    def __init__(
        self,
        *,
        model_path: str,
        zero_stage: int,
        precision: str,
        loss: str,
        beta: float,
        label_smoothing: float,
        learning_rate: float,
        lr_schedule: str,
        warmup_steps: int,
        total_steps: int,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        max_grad_norm: float = 1.0,
        micro_batch_tokens: int,
        logprob_chunk_tokens: int = 128,
        gradient_checkpointing: bool = False,
        share_prompts: bool = True,
        lora: LoraSettings | None = None,
        sequence_parallel: int = 1,
        offload: OffloadSettings = NO_OFFLOAD,
        hybrid_ranks: int = 1,
        **place: Any,
    ) -> None:
        super().__init__("learner", **place)
        self._loss, self._beta, self._smoothing = LOSSES[loss], beta, label_smoothing
        self._hint = float16_hint(precision, setting="learner.precision")
        self._engine = TrainedPolicy(
            model_path,
            logprob_chunk_tokens=logprob_chunk_tokens,
            gradient_checkpointing=gradient_checkpointing,
            lora=lora,
            sequence_parallel=sequence_parallel,
            offload=offload,
            hybrid_ranks=hybrid_ranks,
            rank=self._rank,
            world_size=self._world_size,
            zero_stage=zero_stage,
            precision=precision,
            learning_rate=learning_rate,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            weight_decay=weight_decay,
            betas=betas,
            max_grad_norm=max_grad_norm,
        )
        share = share_prompts and self._engine.shares_prompts()
        self._batches = PairBatches(share=share, max_tokens=micro_batch_tokens)

    def train_step(self, step: int, batch: Sequence[LabeledPair]) -> StepResult:
        """One optimiser step on the mean loss of ``batch``.

        Raises:
            NonFiniteLossError: on every rank, before any weight changes; the batch is saved. Gradients
                of earlier micro-batches may be left behind, so the learner must be rebuilt.
        """
        with self._clock.busy():
            check = self._check(step, batch)
            self._engine.train()
            groups = self._engine.share(self._batches.groups([item.pair for item in batch]))
            totals: defaultdict[str, float] = defaultdict(float)
            for number, group in enumerate(groups):
                outputs = self._forward([batch[i] for i in group] or [batch[0]])
                # A rank without work in this round still takes part in the collectives, with weight zero.
                weight = 1.0 if group else 0.0
                check("loss", outputs.loss)
                total = outputs.loss.sum() * weight
                self._engine.backward(total / len(batch), last=number == len(groups) - 1)
                totals["loss"] += float(total.detach())
                for name, values in outputs.metrics.items():
                    totals[name] += float(values.sum()) * weight
            learning_rate = self._engine.learning_rate
            taken = self._engine.step()
            check(taken.gradient, taken.norm)
            means = {name: value / len(batch) for name, value in self._engine.total(totals).items()}
        metrics = {name: value for name, value in means.items() if name != "loss"}
        metrics |= {"learning_rate": learning_rate, **taken.metrics()}
        return StepResult(step=step, loss=means["loss"], metrics=metrics)

    def _forward(self, pairs: Sequence[LabeledPair]) -> LossOutputs:
        self._cores.adapt()
        batch = self._batches.collate([item.pair for item in pairs]).to(self._engine.device)
        sums = sum_by_sequence(self._engine(batch), batch)

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=sums.device)

        inputs = PreferenceInputs(
            policy_a=sums[0::2],
            policy_b=sums[1::2],
            reference_a=column([item.reference.a for item in pairs]),
            reference_b=column([item.reference.b for item in pairs]),
            length_a=column([len(item.pair.a.token_ids) for item in pairs]),
            length_b=column([len(item.pair.b.token_ids) for item in pairs]),
            probability=column([item.probability for item in pairs]),
            weight=column([item.pair.loss_weight for item in pairs]),
        )
        return self._loss(inputs, beta=self._beta, label_smoothing=self._smoothing)

    def _check(self, step: int, batch: Sequence[LabeledPair]) -> FiniteCheck:
        return FiniteCheck(
            engine=self._engine,
            batch=batch,
            path=self._dump_folder / f"step-{step}.json",
            step=f"step {step}",
            outcome="no weight was changed, the batch is in",
            remedy=f"Lower learner.learning_rate or look at the batch's log-probabilities{self._hint}",
        )

    @property
    def adapter_scale(self) -> float | None:
        """Of what :meth:`sent_weights` gives; see TrainedPolicy."""
        return self._engine.adapter_scale

    def sent_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What generators need of the policy's weights, by name; see TrainedPolicy."""
        return self._engine.sent_weights()

    def policy_logprobs(self, items: Sequence[TokenPair]) -> list[list[float]]:
        """Per-token log-probabilities of (prompt, response) pairs under the current weights."""
        return self._engine.response_logprobs(items)

    def rest(self) -> None:
        """Leave the device to others until :meth:`resume`."""
        freed = self._engine.rest()
        logger.info("the learner rests: %.1f MiB left its device", freed / 2**20)

    def resume(self) -> None:
        """Come back to the device, the same to the last bit."""
        self._engine.resume()
        logger.info("the learner is back")

    def save(self, folder: Path) -> None:
        """DeepSpeed's native checkpoint, the RNG state, and a Hugging Face folder ``hf/``."""
        self._engine.save(folder)

    def load(self, folder: Path) -> None:
        """Restore what :meth:`save` wrote, with whatever number of ranks."""
        self._engine.load(folder)
