"""Settings of the losses: preference optimisation on pairs, and policy optimisation against a reward model."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pilaf_ray.config.base import ModelName, Section


class DpoConfig(Section):
    """Direct preference optimisation."""

    type: Literal["dpo"] = "dpo"
    """Discriminator."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the KL term."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Conservative DPO: share of labels assumed to be flipped."""


class IpoConfig(Section):
    """Identity preference optimisation."""

    type: Literal["ipo"] = "ipo"
    """Discriminator."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the regularisation."""


class FixedKlConfig(Section):
    """The KL coefficient stays at algorithm.beta."""

    type: Literal["fixed"] = "fixed"
    """Discriminator."""


class AdaptiveKlConfig(Section):
    """The KL coefficient starts at algorithm.beta and moves so that the measured KL stays near a target."""

    type: Literal["adaptive"] = "adaptive"
    """Discriminator."""
    target: float = Field(gt=0)
    """KL of a whole response, in nats."""
    horizon: float = Field(default=1000.0, gt=0)
    """Responses over which a KL 20 % off target moves the coefficient by about 20 %."""


KlControllerConfig = Annotated[FixedKlConfig | AdaptiveKlConfig, Field(discriminator="type")]


class RolloutAlgorithm(Section):
    """What optimising the policy against the reward model has in common."""

    beta: float = Field(default=0.05, gt=0)
    """KL coefficient, and β of J = R − β·KL in the report."""
    batch_prompts: int = Field(default=4, ge=1)
    """Prompts of one step; each is answered group_size times, on policy."""
    group_size: int = Field(default=4, ge=1)
    """Responses to a prompt."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether the KL to the reference is taken off the reward, or added to the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator a token: k1 = log π − log π_ref for the reward; k2 or k3 for the loss."""
    kl_controller: KlControllerConfig = FixedKlConfig()
    """Fixed or adaptive coefficient."""
    clip: float = Field(default=0.2, gt=0, lt=1)
    """The probability ratio is clipped to 1 ± this."""
    clip_high: float | None = Field(default=None, gt=0)
    """Another upper limit, 1 + this."""
    importance_cap: float | None = Field(default=2.0, ge=1)
    """Truncation of π_old/μ, which corrects for stale rollouts; null to leave them uncorrected."""
    reward_clip: float | None = Field(default=None, gt=0)
    """Bound of |r̂| as the policy sees it; r̂ itself is trained on its own scale."""
    whiten_advantages: bool = False
    """Advantages at zero mean and unit variance over the batch."""
    aggregation: Literal["token_mean", "response_mean", "response_sum"] = "token_mean"
    """How token losses become one: each token alike, each response alike, or sums over responses."""
    epochs: int = Field(default=1, ge=1)
    """Passes over a step's rollouts."""
    mini_batches: int = Field(default=1, ge=1)
    """Optimiser steps of one pass."""

    @model_validator(mode="after")
    def _estimator_fits(self) -> Self:
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "algorithm.kl_in: loss with algorithm.kl_estimator: k1 has a gradient of mean zero: "
                "set algorithm.kl_estimator: k3 or k2, or algorithm.kl_in: reward"
            )
        return self

    @model_validator(mode="after")
    def _mini_batches_divide(self) -> Self:
        if self.batch_prompts % self.mini_batches:
            raise ValueError(
                f"algorithm.mini_batches = {self.mini_batches} does not divide algorithm.batch_prompts = "
                f"{self.batch_prompts}: change one of them"
            )
        return self

    @model_validator(mode="after")
    def _horizon_holds_a_batch(self) -> Self:
        controller, responses = self.kl_controller, self.batch_prompts * self.group_size
        if isinstance(controller, AdaptiveKlConfig) and controller.horizon < responses:
            raise ValueError(
                f"algorithm.kl_controller.horizon = {controller.horizon:g} is shorter than a batch of "
                f"algorithm.batch_prompts × algorithm.group_size = {responses} responses: raise it"
            )
        return self

    @property
    def batch_responses(self) -> int:
        """Rollouts of one step."""
        return self.batch_prompts * self.group_size


class ValueModelConfig(Section):
    """PPO's value model: a network of its own with a scalar for each token."""

    path: ModelName | None = None
    """Model to start from; model.policy with a new scalar head when left out."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Constant."""
    head_learning_rate: float | None = Field(default=1e-3, gt=0)
    """Of the scalar head, which starts from nothing; null for that of the rest."""
    clip: float | None = Field(default=0.2, gt=0)
    """A value may move so far from its old one before its loss stops falling; null for the plain squared error."""
    layers: int | None = Field(default=None, ge=1)
    """Keep only so many of the first layers; all when left out. Fewer are faster."""
    trainable_layers: int | None = Field(default=None, ge=0)
    """Train only so many of the last layers and the head; all when left out."""


class PpoConfig(RolloutAlgorithm):
    """Proximal policy optimisation against the reward model, with a value model."""

    type: Literal["ppo"] = "ppo"
    """Discriminator."""
    batch_prompts: int = Field(default=16, ge=1)
    """Prompts of one step; each is answered group_size times, on policy."""
    group_size: int = Field(default=1, ge=1)
    """Responses to a prompt."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount a token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Trace decay of the generalised advantages."""
    whiten_rewards: bool = False
    """Token rewards at unit variance over the batch, their mean kept."""
    whiten_advantages: bool = True
    """Advantages at zero mean and unit variance over the batch."""
    value: ValueModelConfig = ValueModelConfig()


class RlooConfig(RolloutAlgorithm):
    """REINFORCE with the mean of the other responses to the prompt as baseline."""

    type: Literal["rloo"] = "rloo"
    """Discriminator."""
    group_size: int = Field(default=4, ge=2)
    """Responses to a prompt."""
    aggregation: Literal["token_mean", "response_mean", "response_sum"] = "response_sum"
    """How token losses become one: each token alike, each response alike, or sums over responses."""


class GrpoConfig(RolloutAlgorithm):
    """Advantages relative to the group, KL in the loss."""

    type: Literal["grpo"] = "grpo"
    """Discriminator."""
    group_size: int = Field(default=4, ge=2)
    """Responses to a prompt."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Whether the KL to the reference is taken off the reward, or added to the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator a token: k1 = log π − log π_ref for the reward; k2 or k3 for the loss."""
    scale: bool = True
    """Divide by the group's standard deviation; false only takes the mean off (Dr. GRPO)."""
    aggregation: Literal["token_mean", "response_mean", "response_sum"] = "response_mean"
    """How token losses become one: each token alike, each response alike, or sums over responses."""


AlgorithmConfig = Annotated[DpoConfig | IpoConfig | PpoConfig | RlooConfig | GrpoConfig, Field(discriminator="type")]
