"""The engines that `benchmarks.generation` compares; each samples a list of requests when told to."""

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.workers import Worker
from pilaf_ray.engines.engine_environment import prepare_environment
from pilaf_ray.engines.generator import Generator
from pilaf_ray.engines.lora_checks import LoraSettings
from pilaf_ray.engines.weight_tickets import WeightUpdate
from pilaf_ray.threads import starting_threads
from pilaf_ray.types import DraftCounts, GenerationRequest

ADAPTER_DEVIATION = 0.01
"""Of the random entries of A and B: adapters that are small beside the weights, as after some training."""

NO_COUNTS = DraftCounts(drafted=0, judged=0, kept=0, passes=0)


class Engine(Protocol):
    """What a row of the table is measured with."""

    async def start(self) -> None: ...

    async def sample(self, requests: Sequence[GenerationRequest]) -> int:
        """Tokens of the responses; nothing of earlier calls is reused."""
        ...

    async def counts(self) -> DraftCounts: ...

    async def stop(self) -> None: ...


class Ours:
    """A run's generator, with random adapters where the policy has some."""

    def __init__(self, arguments: dict[str, Any], lora: LoraSettings | None) -> None:
        self._generator, self._lora = Generator(**arguments), lora
        self._path = arguments["policy_path"]

    async def start(self) -> None:
        await self._generator.start()
        if self._lora is not None:
            with tempfile.TemporaryDirectory() as folder:
                ticket = _publish_adapters(self._path, self._lora, Path(folder))
                await self._generator.update_weights(ticket, deadline_seconds=300)

    async def sample(self, requests: Sequence[GenerationRequest]) -> int:
        self._generator.forget_prefixes()
        responses = await asyncio.gather(*(self._generator.generate(request) for request in requests))
        return sum(len(response.token_ids) for response in responses)

    async def counts(self) -> DraftCounts:
        return await self._generator.draft_counts()

    async def stop(self) -> None:
        await self._generator.stop()


def _publish_adapters(path: str, lora: LoraSettings, folder: Path) -> WeightUpdate:
    import torch

    from pilaf_ray.engines.lora import adapter_parameters, add_adapters
    from pilaf_ray.engines.scoring import load_network
    from pilaf_ray.engines.weight_publishers import make_publisher

    network = load_network(path, dtype=torch.float32)
    add_adapters(network, lora)
    draw = torch.Generator().manual_seed(0)
    for _, parameter in adapter_parameters(network):
        parameter.data.normal_(std=ADAPTER_DEVIATION, generator=draw)
    publisher = make_publisher(transport="filesystem", folder=folder, timeout_seconds=60)
    return publisher.publish(1, adapter_parameters(network), adapter_scale=lora.scale)


class PlainVllm:
    """vLLM with the policy alone, as a run's generator is set up otherwise: what wrapping it costs plain requests."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._calls = 0

    async def start(self) -> None:
        prepare_environment(cpu_threads=self._arguments["cpu_threads"], enforce_eager=self._arguments["enforce_eager"])
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from pilaf_ray.engines.cpu_options import cpu_options
        from pilaf_ray.engines.in_process_executor import THREADS_KEY, choose_executor

        same = ("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "seed")
        arguments = AsyncEngineArgs(
            model=self._arguments["policy_path"],
            # Half of what policy and reference have together.
            kv_cache_memory_bytes=int(self._arguments["kv_cache_gib"] * 2**29),
            **{key: self._arguments[key] for key in same},
            **cpu_options(),
            distributed_executor_backend=choose_executor(1),
            additional_config={THREADS_KEY: self._arguments["cpu_threads"]},
            generation_config="vllm",
            disable_log_stats=True,
        )
        self._engine = AsyncLLM.from_engine_args(arguments)

    async def sample(self, requests: Sequence[GenerationRequest]) -> int:
        self._calls += 1
        return sum(await asyncio.gather(*(self._sample(request) for request in requests)))

    async def _sample(self, request: GenerationRequest) -> int:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        room = self._arguments["max_model_len"] - len(request.prompt_token_ids)
        params = SamplingParams(
            temperature=self._arguments["temperature"],
            # With seeds vLLM draws for each request by itself, and slower.
            max_tokens=min(self._arguments["max_new_tokens"], room),
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt: Any = {"prompt_token_ids": list(request.prompt_token_ids), "cache_salt": str(self._calls)}
        outputs = [output async for output in self._engine.generate(prompt, params, request.request_id)]
        return len(outputs[-1].outputs[0].token_ids)

    async def counts(self) -> DraftCounts:
        return NO_COUNTS

    async def stop(self) -> None:
        self._engine.shutdown()


class HuggingFaceLoop:
    """Two models of transformers, a token at a time, in a process of its own (`benchmarks.generation_loop`)."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = {
            "policy": arguments["policy_path"],
            "reference": arguments["reference_path"],
            "dtype": arguments["dtype"],
            "max_new_tokens": arguments["max_new_tokens"],
            "temperature": arguments["temperature"],
            "threads": starting_threads(arguments["cpu_threads"]),
        }

    async def start(self) -> None:
        threads = str(self._arguments["threads"])
        environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._worker = Worker("benchmarks.generation_loop", self._arguments, environment=environment)

    async def sample(self, requests: Sequence[GenerationRequest]) -> int:
        answer = self._worker.ask(
            prompts=[request.prompt_token_ids for request in requests],
            coefficients=[request.coefficient for request in requests],
            seed=requests[0].seed,
        )
        return int(answer["tokens"])

    async def counts(self) -> DraftCounts:
        return NO_COUNTS

    async def stop(self) -> None:
        self._worker.close()
