"""How vLLM's engine is set up to serve an interpolated model."""

from collections.abc import Mapping
from typing import Any

from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from pilaf_ray.engines.cpu_options import cpu_options
from pilaf_ray.engines.in_process_executor import THREADS_KEY, choose_executor
from pilaf_ray.engines.interpolated_model import ARCHITECTURE_KEY, REFERENCE_KEY
from pilaf_ray.engines.speculation_settings import Speculation, speculation_arguments
from pilaf_ray.engines.vllm_plugin import ADAPTED_ARCHITECTURE, ARCHITECTURE, WEIGHT_ENGINE
from pilaf_ray.errors import ConfigError
from pilaf_ray.threads import Threads


def engine_arguments(
    settings: Mapping[str, Any],
    *,
    architecture: str,
    reference_path: str,
    speculation: Speculation | None,
    shares_base: bool,
    cpu_threads: Threads,
) -> AsyncEngineArgs:
    """vLLM's arguments from the generator's own ``settings``, which carry vLLM's names already.

    Args:
        architecture: the one that policy and reference share.
        speculation: how far the policy drafts ahead, if it does.
        shares_base: the policy is the reference with adapters.
        cpu_threads: of a worker on CPUs.

    Raises:
        ConfigError: this machine's engine cannot draft ahead.
    """
    if speculation is not None and not current_platform.is_cpu():
        raise ConfigError("generation.speculation works with vLLM on CPUs only: leave it out")
    drafting = speculation_arguments(speculation)
    own = {THREADS_KEY: cpu_threads, **drafting.pop("additional_config", {})}
    return AsyncEngineArgs(
        **settings,
        **cpu_options(),
        **drafting,
        distributed_executor_backend=choose_executor(settings["tensor_parallel_size"]),
        hf_overrides={
            "architectures": [ADAPTED_ARCHITECTURE if shares_base else ARCHITECTURE],
            ARCHITECTURE_KEY: architecture,
            REFERENCE_KEY: reference_path,
        },
        logits_processors=["pilaf_ray.engines.mixing_processor:MixingProcessor"],
        # The processor hands over log-probabilities, so that nothing is left to process.
        logprobs_mode="processed_logits",
        worker_extension_cls="pilaf_ray.engines.worker_extension.WorkerExtension",
        additional_config=own,
        weight_transfer_config=WeightTransferConfig(backend=WEIGHT_ENGINE),
        # Not the sampling defaults that a model folder may carry.
        generation_config="vllm",
        disable_log_stats=True,
    )
