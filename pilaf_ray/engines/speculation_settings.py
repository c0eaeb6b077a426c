"""How the settings of speculation reach the parts of vLLM that need them."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_KEY = "pilaf_speculation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Speculation:
    """The policy drafts up to ``tokens`` ahead; ``adaptive``: fewer where mixtures replace many drafts."""

    tokens: int = 8
    adaptive: bool = True


def speculation_arguments(speculation: Speculation | None) -> dict[str, Any]:
    """vLLM's arguments for an engine that drafts ahead; none without ``speculation``."""
    if speculation is None:
        return {}
    return {
        "additional_config": {_KEY: asdict(speculation)},
        "worker_cls": "pilaf_ray.engines.speculative_worker.SpeculativeCPUWorker",
        "scheduler_cls": "pilaf_ray.engines.speculative_scheduler.SpeculativeScheduler",
    }


def speculation_of(vllm_config: "VllmConfig") -> Speculation:
    """What :func:`speculation_arguments` put there."""
    settings: Any = vllm_config.additional_config
    return Speculation(**settings[_KEY])
