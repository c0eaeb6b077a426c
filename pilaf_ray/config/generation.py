"""Settings of the generators."""

from typing import Self

from pydantic import Field, model_validator

from pilaf_ray.config.base import CpuThreads, Section
from pilaf_ray.config.elastic import ElasticSection


class SpeculationSection(Section):
    """How far the policy drafts ahead before the reference is asked."""

    tokens: int = Field(default=8, ge=2, le=64)
    """Most tokens a request and step."""
    adaptive: bool = True
    """Draft fewer where mixtures replace many of the policy's tokens."""


class GenerationSection(Section):
    """Sampling and the vLLM engine."""

    max_new_tokens: int = Field(ge=1)
    """Longest response, in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Applied after the mixing. The theory needs 1."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """The theory needs 1."""
    replicas: int = Field(default=1, ge=1)
    """Number of engines."""
    elastic: ElasticSection | None = None
    """Let their number follow the cluster: nodes that come, go, are drained or preempted."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Devices an engine."""
    max_num_seqs: int = Field(default=32, ge=1)
    """Sequences in one batch."""
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    """Tokens in one forward."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Key-value cache of an engine, of policy and reference together, in GiB; of each GPU, with several an engine."""
    cpu_threads: CpuThreads = 1
    """Threads of an engine on CPUs; auto: as many as others leave cores."""
    enforce_eager: bool = True
    """Do not compile or capture graphs."""
    share_base: bool = True
    """With model.lora, policy and reference are computed by one network: one device an engine, nothing compiled."""
    speculation: SpeculationSection | None = None
    """The policy drafts ahead, and the reference judges several tokens at once: changes no response. CPUs only."""

    @model_validator(mode="after")
    def _can_speculate(self) -> Self:
        if self.speculation is not None and (self.tensor_parallel_size > 1 or not self.enforce_eager):
            raise ValueError(
                "generation.speculation works with tensor_parallel_size: 1 and enforce_eager: true only; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _workers_of_one_engine_keep_step(self) -> Self:
        if self.cpu_threads == "auto" and self.tensor_parallel_size > 1:
            raise ValueError(
                "generation.cpu_threads: auto is for engines of one worker: set a number, or tensor_parallel_size: 1"
            )
        return self
