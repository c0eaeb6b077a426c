"""The policy learner against a reward model: PPO, RLOO and GRPO, with PPO's value model in the same process."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pilaf_ray.data.response_batches import ResponseBatches
from pilaf_ray.engines.finite_check import FiniteCheck
from pilaf_ray.engines.learner_rank import LearnerRank
from pilaf_ray.engines.lora_checks import LoraSettings
from pilaf_ray.engines.loss_scale import float16_hint
from pilaf_ray.engines.rollout_batches import Places, TokenRows
from pilaf_ray.engines.trained_models import TrainedPolicy, TrainedScalarHead
from pilaf_ray.engines.training_engine import TrainingEngine
from pilaf_ray.losses.policy_gradient import (
    AdaptiveKlController,
    Aggregation,
    KlEstimator,
    PolicyGradientInputs,
    clipped_surrogate,
    clipped_value_loss,
    kl_to_reference,
)
from pilaf_ray.losses.rollout_targets import (
    AdvantageSettings,
    RolloutBatch,
    RolloutTargets,
    rollout_targets,
    token_weights,
)
from pilaf_ray.types import ScoredGroup, StepResult, TokenPair

_COUNTED = {"skipped", "value_skipped"}
"""Metrics that are sums over a step's optimiser steps; others are those of the last."""


class RolloutLearner(LearnerRank):
    """One rank; every method is called on all ranks together, and each is given the whole batch.

    One step is ``epochs`` × ``mini_batches`` optimiser steps on the same rollouts. With a
    single one the old policy is the policy itself, so its log-probabilities need no forward of their own.

    Args:
        advantages: how advantages are made.
        kl_coefficient: at the start; ``kl_target`` and ``kl_horizon`` make it adaptive.
        kl_estimator: of the KL in the loss, where it is not in the reward.
        importance_cap: truncation of π_old/μ; None leaves stale rollouts uncorrected.
        value: PPO's value model: ``model_path``, ``learning_rate``, ``head_learning_rate``, ``clip``, ``layers``
            and ``trainable_layers``.
        optimizer: further settings of :func:`pilaf_ray.engines.learner_setup.make_engine`.
        place: of :class:`pilaf_ray.engines.learner_rank.LearnerRank`.
    """

    def __init__(
        self,
        *,
        model_path: str,
        zero_stage: int,
        precision: str,
        advantages: AdvantageSettings,
        kl_coefficient: float,
        kl_target: float | None,
        kl_horizon: float,
        kl_estimator: KlEstimator,
        clip_low: float,
        clip_high: float,
        importance_cap: float | None,
        aggregation: Aggregation,
        epochs: int,
        mini_batches: int,
        value: Mapping[str, Any] | None,
        optimizer: Mapping[str, Any],
        micro_batch_tokens: int,
        logprob_chunk_tokens: int,
        gradient_checkpointing: bool,
        share_prompts: bool,
        lora: LoraSettings | None = None,
        sequence_parallel: int = 1,
        **place: Any,
    ) -> None:
        super().__init__("learner", **place)
        self._advantages, self._aggregation, self._estimator = advantages, aggregation, kl_estimator
        self._clips, self._importance_cap = (clip_low, clip_high), importance_cap
        self._kl_coefficient, self._kl_target, self._kl_horizon = kl_coefficient, kl_target, kl_horizon
        self._epochs, self._mini_batches = epochs, mini_batches
        self._hint = float16_hint(precision, setting="learner.precision")
        common: dict[str, Any] = {
            "rank": self._rank,
            "world_size": self._world_size,
            "zero_stage": zero_stage,
            "precision": precision,
            "gradient_checkpointing": gradient_checkpointing,
        }
        self._policy = TrainedPolicy(
            model_path,
            logprob_chunk_tokens=logprob_chunk_tokens,
            lora=lora,
            sequence_parallel=sequence_parallel,
            **common,
            **optimizer,
        )
        self._value: TrainedScalarHead | None = None
        self._value_clip: float | None = None
        if value is not None:
            self._value_clip = value["clip"]
            self._value = TrainedScalarHead(
                value["model_path"],
                setting="algorithm.value",
                layers=value["layers"],
                trainable_layers=value["trainable_layers"],
                head_learning_rate=value["head_learning_rate"],
                **common,
                **{**optimizer, "learning_rate": value["learning_rate"], "lr_schedule": "constant"},
            )
        trained = [engine for engine in (self._policy, self._value) if engine is not None]
        share = share_prompts and all(engine.shares_prompts() for engine in trained)
        self._batches = ResponseBatches(share=share, max_tokens=micro_batch_tokens)

    def train_rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> StepResult:
        """One step on the rollouts of ``groups``; none where all of them got the same score.

        Raises:
            NonFiniteLossError: on every rank, before the weights take the bad step; the rollouts are saved.
        """
        with self._clock.busy():
            rows = TokenRows(groups, self._policy.device)
            if bool((rows.scores == rows.scores[0]).all()):
                return self._stay(step)
            check = self._check(step, groups)
            single = self._epochs * self._mini_batches == 1
            old = None if single else self._look(self._policy, rows)
            values = None if self._value is None else self._look(self._value, rows)
            batch = RolloutBatch(
                scores=rows.scores,
                behaviour_logprobs=rows.behaviour,
                reference_logprobs=rows.reference,
                mask=rows.mask,
                values=values,
            )
            targets = rollout_targets(batch, self._advantages, kl_coefficient=self._kl_coefficient)
            metrics: dict[str, float] = {}
            skipped: Counter[str] = Counter()
            learning_rate = self._policy.learning_rate
            for chosen in self._plan(len(rows)):
                metrics = self._update_policy(rows, chosen, targets, old, check)
                if self._value is not None and values is not None:
                    metrics |= self._update_value(rows, chosen, targets, values, check)
                for name in _COUNTED & metrics.keys():
                    skipped[name] += int(metrics[name])
                metrics |= skipped
            metrics |= {"learning_rate": learning_rate, "kl_coefficient": self._kl_coefficient}
            metrics["advantage_spread"] = float(targets.advantages[rows.mask].std(correction=0))
            self._move_coefficient(float(targets.sequence_kl.mean()), len(rows))
        return StepResult(step=step, loss=metrics.pop("loss"), metrics=metrics)

    def _stay(self, step: int) -> StepResult:
        """No step: r̂ prefers nothing, as before its own first step. What is left of the gradient is
        rounding, and Adam would make a full step of it."""
        metrics = {"learning_rate": self._policy.learning_rate, "kl_coefficient": self._kl_coefficient}
        return StepResult(step=step, loss=0.0, metrics=metrics | {"grad_norm": 0.0, "advantage_spread": 0.0})

    def _plan(self, responses: int) -> Iterator[list[int]]:
        """Which rows each optimiser step takes: whole groups, in order."""
        size = responses // self._mini_batches
        for _ in range(self._epochs):
            for start in range(0, size * self._mini_batches, size):
                yield list(range(start, start + size))

    def _update_policy(
        self,
        rows: TokenRows,
        chosen: list[int],
        targets: RolloutTargets,
        old: Tensor | None,
        check: FiniteCheck,
    ) -> dict[str, float]:
        """One optimiser step on the rows ``chosen``; metrics are means over their tokens."""
        engine = self._policy
        engine.train()
        weights = token_weights(rows.mask[chosen], how=self._aggregation)
        tokens = float(rows.mask[chosen].sum())
        totals: defaultdict[str, float] = defaultdict(float)
        for places, weight, last in self._micro_batches(engine, rows, chosen):
            logprobs = engine.per_token(rows.collate(self._batches, places.rows))
            before = logprobs.detach() if old is None else places.of(old)
            mask = torch.ones_like(logprobs, dtype=torch.bool)
            capped = self._importance_cap is not None
            surrogate = clipped_surrogate(
                PolicyGradientInputs(
                    logprobs=logprobs,
                    old_logprobs=before,
                    advantages=places.of(targets.advantages),
                    mask=mask,
                    behaviour_logprobs=places.of(rows.behaviour) if capped else None,
                ),
                clip_low=self._clips[0],
                clip_high=self._clips[1],
                importance_cap=self._importance_cap,
            )
            loss = surrogate.loss
            if not self._advantages.kl_in_reward:
                kl = kl_to_reference(logprobs, places.of(rows.reference), mask, estimator=self._estimator)
                loss = loss + self._kl_coefficient * kl
            check("loss", loss)
            total = (loss * places.of(weights, chosen)).sum() * weight
            engine.backward(total, last=last)
            totals["loss"] += float(total.detach())
            gap = (logprobs.detach() - places.of(rows.behaviour)).abs()
            for name, value in {**surrogate.metrics, "logprob_gap": gap}.items():
                totals[name] += float(value.sum()) * weight / tokens
        taken = engine.step()
        check(taken.gradient, taken.norm)
        return engine.total(totals) | taken.metrics()

    def _update_value(
        self,
        rows: TokenRows,
        chosen: list[int],
        targets: RolloutTargets,
        old: Tensor,
        check: FiniteCheck,
    ) -> dict[str, float]:
        """The value model's step on the same rows: mean over tokens."""
        engine = self._value
        assert engine is not None and targets.returns is not None, "only PPO has a value model"
        engine.train()
        tokens = float(rows.mask[chosen].sum())
        totals: defaultdict[str, float] = defaultdict(float)
        for places, weight, last in self._micro_batches(engine, rows, chosen):
            values = engine.per_token(rows.collate(self._batches, places.rows))
            returns, mask = places.of(targets.returns), torch.ones_like(values, dtype=torch.bool)
            loss = clipped_value_loss(values, places.of(old), returns, mask, clip=self._value_clip).loss
            check("value loss", loss)
            total = loss.sum() * weight / tokens
            engine.backward(total, last=last)
            totals["value_loss"] += float(total.detach())
            error = (values.detach() - returns).square()
            totals["value_error"] += float(error.sum()) * weight / tokens
        taken = engine.step()
        check(f"value model's {taken.gradient}", taken.norm)
        found = engine.total(totals)
        # 1 − residual/variance of the returns: 1 is perfect, 0 is a constant.
        spread = float(targets.returns[rows.mask].var(correction=0))
        explained = 1.0 - found.pop("value_error") / spread if spread else 0.0
        return {
            "value_loss": found["value_loss"],
            "value_explained": explained,
            **taken.metrics("value_"),
        }

    def _micro_batches(
        self, engine: TrainingEngine, rows: TokenRows, chosen: Sequence[int]
    ) -> Iterator[tuple[Places, float, bool]]:
        """This rank's share: places, weight 0 where it only takes part in the collectives, whether it is the last."""
        items = [rows.items[row] for row in chosen]
        shares = engine.share(self._batches.groups(items))
        for number, share in enumerate(shares):
            self._cores.adapt()
            taken = [chosen[index] for index in share] or [chosen[0]]
            yield rows.places(taken), 1.0 if share else 0.0, number == len(shares) - 1

    @torch.no_grad()
    def _look(self, engine: TrainingEngine, rows: TokenRows) -> Tensor:
        """One number a token of every row, without gradient, from all ranks; shape (responses, tokens)."""
        engine.eval()
        found = torch.zeros(rows.mask.shape, dtype=torch.float64, device=rows.mask.device)
        for places, weight, _ in self._micro_batches(engine, rows, range(len(rows))):
            values = engine.per_token(rows.collate(self._batches, places.rows))
            if weight:
                found[places.row_of_token, places.token] = values.double()
        return engine.summed(found).float()

    def _move_coefficient(self, kl: float, responses: int) -> None:
        if self._kl_target is not None:
            controller = AdaptiveKlController(
                coefficient=self._kl_coefficient, target=self._kl_target, horizon=self._kl_horizon
            )
            self._kl_coefficient = controller.update(kl, responses=responses)

    def _check(self, step: int, groups: Sequence[ScoredGroup]) -> FiniteCheck:
        return FiniteCheck(
            engine=self._policy,
            batch=groups,
            path=self._dump_folder / f"step-{step}.json",
            step=f"step {step}",
            outcome="the step was not taken, its rollouts are in",
            remedy=f"Lower learner.learning_rate or set algorithm.reward_clip{self._hint}",
        )

    @property
    def adapter_scale(self) -> float | None:
        """Of what :meth:`sent_weights` gives; see TrainedPolicy."""
        return self._policy.adapter_scale

    def sent_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What generators need of the policy's weights, by name; see TrainedPolicy."""
        return self._policy.sent_weights()

    def policy_logprobs(self, items: Sequence[TokenPair]) -> list[list[float]]:
        """Per-token log-probabilities of (prompt, response) pairs under the current weights."""
        return self._policy.response_logprobs(items)

    def save(self, folder: Path) -> None:
        """The policy as :class:`PolicyLearner` saves it, the KL coefficient, and ``value/`` beside."""
        self._policy.save(folder, state={"kl_coefficient": self._kl_coefficient})
        if self._value is not None:
            (folder / "value").mkdir(exist_ok=True)
            self._value.save(folder / "value")

    def load(self, folder: Path) -> None:
        """Restore what :meth:`save` wrote, with whatever number of ranks."""
        if self._value is not None:
            self._value.load(folder / "value")
        self._kl_coefficient = float(self._policy.load(folder)["kl_coefficient"])
