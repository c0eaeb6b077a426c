"""What the engine's scheduler did, counted as it reports it."""

from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import StatLoggerBase

from pilaf_ray.observability.progress import PROGRESS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats


class PreemptionCounter(StatLoggerBase):
    """Counts requests that lost their cache to others and were computed again. An instance is its own factory.

    Steps that got somewhere are the generator's progress.
    """

    def __init__(self) -> None:
        self.preemptions = 0
        self._cached = 0.0

    def __call__(self, vllm_config: "VllmConfig", engine_index: int = 0) -> "PreemptionCounter":
        """What vLLM asks of a factory."""
        return self

    def record(
        self,
        scheduler_stats: "SchedulerStats | None",
        iteration_stats: "IterationStats | None",
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """One step of the engine."""
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs
        # A step that gives no token may have read a part of a long prompt, or, where nothing fits, have done nothing.
        cached = self._cached if scheduler_stats is None else scheduler_stats.kv_cache_usage
        if iteration_stats is not None or cached != self._cached:
            PROGRESS.advance()
        self._cached = cached

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
