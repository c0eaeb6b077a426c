"""Settings of the reward model r̂ that trains beside the policy."""

from typing import Literal

from pydantic import Field

from pilaf_ray.config.base import CpuThreads, Dtype, ModelName, Section


class ReplayConfig(Section):
    """Which labelled pairs r̂ is trained on, and how often."""

    window_pairs: int = Field(default=512, ge=1)
    """The newest so many pairs, held-out ones aside."""
    uses: int = Field(default=4, ge=1)
    """A pair is trained on at most so many times."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of the pairs, by their identity, that r̂ never trains on; it is measured on them."""


class RewardHealthConfig(Section):
    """When r̂ counts as collapsed, diverged or misled, on pairs it had not trained on."""

    window_pairs: int = Field(default=64, ge=8)
    """Accuracy, calibration and spread are those of the newest so many; nothing is judged before there are as many."""
    min_spread: float = Field(default=1e-3, ge=0)
    """Smaller standard deviation of r̂'s margins: collapsed to a constant."""
    max_spread: float = Field(default=50.0, gt=0)
    """Larger standard deviation of r̂'s margins, in log-odds: diverged."""
    action: Literal["warn", "stop"] = "warn"
    """What follows: one warning in the log and the events, or the end of the run."""


class RewardModelSection(Section):
    """The reward model r̂, trained by Bradley–Terry maximum likelihood on the labelled pairs."""

    path: ModelName | None = None
    """Reward model or language model to start from; model.policy with a new scalar head when left out."""
    ranks: int = Field(default=1, ge=1)
    """Processes of the group."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage; on one rank in fp32, 0 takes the least memory."""
    precision: Dtype = "auto"
    """Compute format; master weights are fp32 either way, and float16 scales the loss."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """After the warm-up; constant."""
    head_learning_rate: float | None = Field(default=1e-3, gt=0)
    """Of the scalar head, which starts from nothing; null for that of the rest."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up, in r̂'s own steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moments."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping."""
    heads: int = Field(default=1, ge=1, le=64)
    """Scalar heads on one trunk, each with a bootstrap of the pairs of its own; r̂ is their mean."""
    centering: float = Field(default=0.0, ge=0)
    """Strength of the penalty on r̂(a) + r̂(b), which pulls the open constant of each prompt to 0."""
    layers: int | None = Field(default=None, ge=1)
    """Keep only so many of the first layers; all when left out. Fewer are faster."""
    trainable_layers: int | None = Field(default=None, ge=0)
    """Train only so many of the last layers and the head; all when left out."""
    pooling: Literal["last_token", "mean"] = "last_token"
    """Where a response is scored: at its last token, as reward models are usually published, or the mean over all
    its tokens."""
    batch_pairs: int = Field(default=8, ge=1)
    """Pairs of one step of r̂."""
    steps_per_batch: int = Field(default=2, ge=1)
    """Most steps of r̂ for one step of the policy; fewer while the window has too few pairs with uses left."""
    micro_batch_tokens: int = Field(default=1024, ge=1)
    """Padded tokens of one forward and backward."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    cpu_threads: CpuThreads = 1
    """Threads of a rank on CPUs; auto: as many as others leave cores, so that sums may round differently."""
    replay: ReplayConfig = ReplayConfig()
    health: RewardHealthConfig = RewardHealthConfig()
