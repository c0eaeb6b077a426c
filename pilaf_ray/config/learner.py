"""The section ``learner``: how the policy is trained, and how that is spread over ranks and memory."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pilaf_ray.config.base import CpuThreads, Dtype, Section


class OffloadSection(Section):
    """What of the learner leaves its device between uses."""

    optimizer: Literal["cpu", "nvme"] | None = None
    """Master weights, the optimiser's state and its step: on the host (ZeRO 1 to 3), or on a disk (ZeRO-3)."""
    parameters: Literal["cpu", "nvme"] | None = None
    """The weights of the forward, fetched layer by layer; ZeRO-3."""
    nvme_path: str | None = None
    """Folder on a local disk of every node with a learner rank, for what is on nvme."""

    @model_validator(mode="after")
    def _disks_have_a_folder(self) -> Self:
        if "nvme" in (self.optimizer, self.parameters) and self.nvme_path is None:
            raise ValueError("offload to nvme needs a folder on a local disk: set learner.offload.nvme_path")
        return self


class LearnerSection(Section):
    """The DeepSpeed policy learner."""

    ranks: int = Field(default=1, ge=1)
    """Processes of the group."""
    sequence_parallel: int = Field(default=1, ge=1)
    """So many ranks compute the same rows together, each a part of them (Ulysses); the rest is data-parallel."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage; on one rank in fp32, 0 takes the least memory and time."""
    hybrid_ranks: int = Field(default=1, ge=1)
    """ZeRO-3: so many neighbours, e.g. a node's, keep weights among themselves for the backward; 1: all ranks do."""
    offload: OffloadSection = OffloadSection()
    """What leaves the device between uses; nothing when left out."""
    precision: Dtype = "auto"
    """Compute format; master weights are fp32 either way, and float16 scales the loss."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moments."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping."""
    batch_pairs: int = Field(ge=1)
    """Pairs of one step, over all ranks."""
    micro_batch_tokens: int = Field(default=2048, ge=1)
    """Padded tokens of one forward and backward; with sequence_parallel, of the ranks that compute it together."""
    logprob_chunk_tokens: int = Field(default=128, ge=1)
    """Response tokens whose logits exist at one time."""
    share_prompts: bool = True
    """Compute a prompt once for both of its responses, in learner and reference, where the model allows it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    cpu_threads: CpuThreads = 1
    """Threads of a rank on CPUs; auto: as many as others leave cores, so that sums may round differently."""

    @model_validator(mode="after")
    def _groups_of_ranks_are_whole(self) -> Self:
        for name in ("sequence_parallel", "hybrid_ranks"):
            if self.ranks % (size := getattr(self, name)):
                raise ValueError(
                    f"learner.{name} = {size} does not divide learner.ranks = {self.ranks}: set learner.ranks to a "
                    f"multiple, e.g. {-(-self.ranks // size) * size}, or lower learner.{name}"
                )
        return self

    @model_validator(mode="after")
    def _stages_can_do_it(self) -> Self:
        if self.zero_stage == 0 and self.offload.optimizer:
            raise ValueError(
                "learner.offload.optimizer needs an optimiser that ZeRO keeps: set learner.zero_stage: 1, 2 or 3"
            )
        if self.offload.optimizer == "nvme" and self.zero_stage != 3:
            # DeepSpeed takes the word, and keeps the state on the host.
            raise ValueError(
                "learner.offload.optimizer: nvme is for ZeRO-3 only: set learner.zero_stage: 3, or "
                "learner.offload.optimizer: cpu"
            )
        for name, asked in (("offload.parameters", self.offload.parameters), ("hybrid_ranks", self.hybrid_ranks > 1)):
            if asked and self.zero_stage != 3:
                raise ValueError(
                    f"learner.{name} needs weights that are parted among ranks: set learner.zero_stage: 3, or leave "
                    f"learner.{name} out"
                )
        return self
