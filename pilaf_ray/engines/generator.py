"""Samples responses from the interpolation of policy and reference, with vLLM."""

import asyncio
import logging
import resource
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pilaf_ray.engines.engine_end import end_engine
from pilaf_ray.engines.engine_environment import prepare_environment
from pilaf_ray.engines.engine_requests import final_output, sampled_response, sampling_params
from pilaf_ray.engines.generator_checks import check_lengths, check_models, check_plugin, check_speculation
from pilaf_ray.engines.speculation_settings import Speculation
from pilaf_ray.engines.token_records import Record
from pilaf_ray.engines.vllm_plugin import register
from pilaf_ray.engines.weight_tickets import WeightUpdate
from pilaf_ray.engines.weight_updates import WeightUpdater, version_label
from pilaf_ray.errors import ConfigError, PilafError, PromptError
from pilaf_ray.observability.busy import BusyMeter
from pilaf_ray.observability.usage import peak_mib
from pilaf_ray.threads import Threads
from pilaf_ray.types import DraftCounts, GenerationRequest, RoleUsage, SampledResponse

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    from pilaf_ray.engines.engine_stats import PreemptionCounter

logger = logging.getLogger(__name__)


class Generator:
    """One vLLM engine that serves policy and reference together.

    Example: ``generator = Generator(policy_path="policy", reference_path="ref",
    dtype="float32", max_model_len=512, max_new_tokens=64); await generator.start()``

    Args:
        policy_path: folder or hub id of the policy at start, in Hugging Face form.
        reference_path: folder of the fixed reference; same architecture and sizes.
        dtype: of weights and caches, e.g. ``"bfloat16"``; logits are mixed in fp32.
        max_model_len: prompt and response together, in tokens.
        max_new_tokens: response length limit, in tokens.
        temperature: of the mixed distribution; 0 is greedy.
        top_p: below 1, behaviour log-probabilities are those of the truncated distribution.
        max_num_seqs: requests decoded together.
        max_num_batched_tokens: tokens of one forward pass, at least ``max_num_seqs``; longer prompts come in chunks.
        kv_cache_gib: memory of both models' KV caches together.
        cpu_threads: of the engine on CPUs; ``auto``: as many as other processes leave.
        tensor_parallel_size: workers that share each of the two models.
        seed: of the engine; responses depend on their own seeds only.
        enforce_eager: no compilation; starts faster, decodes slower on GPUs.
        initial_version: version number of the weights in ``policy_path``.
        enable_prefix_caching: reuse the KV of shared prompt beginnings.
        speculation: the policy drafts several tokens ahead, and the reference judges them in one forward; it changes
            when a response is done, not what it is. One CPU worker without compilation only.
        recompute_caches: after a weight update, compute the KV of running requests anew under the
            new weights; otherwise they keep what the old ones left, and only new requests start afresh.
        takes_turns: the learner uses the same device while this engine rests.
        shares_base: the policy is the reference with adapters, which is all that updates bring: one network computes
            both. One worker without compilation only.

    Raises:
        ConfigError: a limit is wrong, or the engine cannot draft ahead.
        ModelError: a folder is no model, or the two models do not fit each other.
    """

    def __init__(
        self,
        *,
        policy_path: str,
        reference_path: str,
        dtype: str,
        max_model_len: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 2048,
        kv_cache_gib: float = 1.0,
        cpu_threads: Threads = 1,
        tensor_parallel_size: int = 1,
        seed: int = 0,
        enforce_eager: bool = True,
        initial_version: int = 0,
        enable_prefix_caching: bool = True,
        recompute_caches: bool = False,
        takes_turns: bool = False,
        speculation: Speculation | None = None,
        shares_base: bool = False,
    ) -> None:
        check_lengths(max_model_len=max_model_len, max_new_tokens=max_new_tokens)
        check_speculation(speculation, tensor_parallel_size=tensor_parallel_size, enforce_eager=enforce_eager)
        if shares_base and policy_path != reference_path:
            raise ConfigError("a policy that shares the reference's weights starts as the reference: name one folder")
        self._architecture = check_models(policy_path, reference_path, max_model_len=max_model_len)
        # vLLM's workers may start in another folder; a hub id stays what it is.
        local = Path(reference_path)
        self._reference_path = str(local.resolve()) if local.is_dir() else reference_path
        self._engine_arguments: dict[str, Any] = {
            "model": str(policy_path),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max(max_num_batched_tokens, max_num_seqs),
            "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
            "tensor_parallel_size": tensor_parallel_size,
            "seed": seed,
            "enforce_eager": enforce_eager,
            "enable_prefix_caching": enable_prefix_caching,
        }
        self._takes_turns = takes_turns
        self._sleeps = False
        self._max_model_len, self._max_new_tokens = max_model_len, max_new_tokens
        self._temperature, self._top_p = temperature, top_p
        self._cpu_threads = cpu_threads
        self._speculation, self._shares_base = speculation, shares_base
        self._engine: AsyncLLM | None = None
        self._weights = WeightUpdater(
            lambda: self._live_engine, initial_version=initial_version, recompute_caches=recompute_caches
        )
        self._meter = BusyMeter()
        self._score_ids = count()
        self._peak_memory_mib = 0.0
        self._scheduling: PreemptionCounter | None = None

    @property
    def version(self) -> int:
        """Version of the policy weights now served."""
        return self._weights.version

    @property
    def preemptions(self) -> int:
        """How often a request lost its cache to others and was computed again; more of ``kv_cache_gib`` avoids it."""
        return self._scheduling.preemptions if self._scheduling else 0

    async def start(self) -> None:
        """Load both models and start the engine's processes (seconds to minutes).

        Raises:
            ConfigError: this package is not installed, so vLLM cannot find the plug-in.
        """
        check_plugin()
        prepare_environment(cpu_threads=self._cpu_threads, enforce_eager=self._engine_arguments["enforce_eager"])
        from vllm.v1.engine.async_llm import AsyncLLM

        register()
        from pilaf_ray.engines.engine_arguments import engine_arguments
        from pilaf_ray.engines.engine_rest import can_sleep
        from pilaf_ray.engines.engine_stats import PreemptionCounter

        self._scheduling = PreemptionCounter()
        self._sleeps = self._takes_turns and can_sleep()
        arguments = engine_arguments(
            {**self._engine_arguments, "enable_sleep_mode": self._sleeps},
            architecture=self._architecture,
            reference_path=self._reference_path,
            speculation=self._speculation,
            shares_base=self._shares_base,
            cpu_threads=self._cpu_threads,
        )
        self._engine = AsyncLLM.from_engine_args(arguments, stat_loggers=[self._scheduling])
        await self._engine.update_weight_version(version_label(self.version))
        logger.info("serving policy version %d (%s)", self.version, self._architecture)

    async def generate(self, request: GenerationRequest) -> SampledResponse:
        """Sample one response; returns as soon as it is finished.

        Sampling can be replayed outside vLLM: token t is what :func:`pilaf_ray.sampling.draw.draw_mixed_tokens`
        gives for the policy's and the mixed distribution at temperature and top-p, the seed and t.

        Raises:
            PromptError: the prompt leaves no room for a token.
        """
        length = len(request.prompt_token_ids)
        room = self._max_model_len - length
        if room < 1 or not length:
            raise PromptError(
                f"request {request.request_id}: a prompt of {length} tokens does not fit "
                f"max_model_len={self._max_model_len}; it needs 1 to {self._max_model_len - 1}"
            )
        draw = {
            "seed": request.seed,
            "temperature": self._temperature,
            "top_p": self._top_p,
            "record": request.request_id,
        }
        params = sampling_params(
            coefficient=request.coefficient,
            draw=draw if self._temperature else None,
            max_tokens=min(self._max_new_tokens, room),
            logprobs=0,
        )
        with self._meter.call():
            output = await self._run(request.prompt_token_ids, params, request.request_id)
            records = await self._token_records(request) if request.coefficient and self._temperature else None
        return sampled_response(request, output, records)

    async def _token_records(self, request: GenerationRequest) -> Record:
        """(log π, log π_ref) of each token of a finished mixed response."""
        answers = await self._live_engine.collective_rpc("take_token_records", args=(request.request_id,))
        for answer in answers:
            if answer:
                return [(policy, reference) for policy, reference in answer]
        raise PilafError(f"request {request.request_id}: no worker kept a record of its tokens")

    async def score(
        self,
        prompt_token_ids: Sequence[int],
        response_token_ids: Sequence[int],
        coefficient: float = 0.0,
    ) -> list[float]:
        """Log-probability of each response token under the weights now served, temperature 1.

        With ``coefficient`` 0 it is one request; a mixture needs one request a token.
        """
        prompt, response = list(prompt_token_ids), list(response_token_ids)
        tokens = prompt + response
        if not prompt or not response or len(tokens) > self._max_model_len:
            raise PromptError(
                f"cannot score a prompt of {len(prompt)} and a response of {len(response)} tokens: "
                f"both must be non-empty and fit max_model_len={self._max_model_len}"
            )
        with self._meter.call():
            if coefficient:
                ends = range(len(prompt), len(tokens))
                parts = [self._score_next(tokens[:end], tokens[end], coefficient) for end in ends]
                return [(await part)[-1] for part in [asyncio.ensure_future(p) for p in parts]]
            logprobs = await self._score_next(tokens[:-1], tokens[-1], 0.0, with_prompt=True)
            return logprobs[-len(response) :]

    async def _score_next(
        self, prefix: list[int], token: int, coefficient: float, *, with_prompt: bool = False
    ) -> list[float]:
        """Log-probability of ``token`` after ``prefix``, behind those of ``prefix[1:]`` if asked."""
        params = sampling_params(
            coefficient=coefficient,
            max_tokens=1,
            logprob_token_ids=[token],
            prompt_logprobs=0 if with_prompt else None,
        )
        output = await self._run(tuple(prefix), params, f"score-{next(self._score_ids)}")
        positions = (output.prompt_logprobs or [])[1:] if with_prompt else []
        scores = [p[t].logprob for p, t in zip(positions, prefix[1:], strict=False) if p is not None]
        sampled: Any = output.outputs[0].logprobs
        return [*scores, sampled[0][token].logprob]

    async def update_weights(self, update: WeightUpdate, *, deadline_seconds: float) -> None:
        """Replace the policy's weights; running requests go on with the new ones. See :class:`WeightUpdater`.

        Raises:
            WeightSyncError: it took longer than ``deadline_seconds`` or failed; names the phase.
        """
        await self._weights.replace(update, deadline_seconds=deadline_seconds)

    async def rest(self) -> None:
        """Compute nothing, and free what can be freed, until :meth:`resume`; requests under way are dropped."""
        from pilaf_ray.engines.engine_rest import rest

        # One that a lost learner left behind ends first: it would wake the engine.
        async with self._weights.updating:
            await rest(self._live_engine, sleeps=self._sleeps)
        logger.info("the engine rests")

    async def resume(self) -> None:
        """Serve again what was served before :meth:`rest`."""
        from pilaf_ray.engines.engine_rest import resume

        await resume(self._live_engine, sleeps=self._sleeps)
        logger.info("the engine serves again")

    def forget_prefixes(self) -> None:
        """Let later requests reuse no KV of earlier ones, as after a weight update."""
        self._weights.forget_prefixes()

    async def heartbeat(self) -> None:
        """Return once the engine's own process has answered; raises if it is gone."""
        await self._live_engine.is_sleeping()

    async def draft_counts(self) -> DraftCounts:
        """How many of the policy's tokens the mixtures kept since the start, whether or not it drafts ahead."""
        answers = await self._live_engine.collective_rpc("draft_counts")
        drafted, judged, kept, passes = answers[0]
        return DraftCounts(drafted=drafted, judged=judged, kept=kept, passes=passes)

    def usage(self) -> RoleUsage:
        """Seconds with at least one request running; peak memory of all its processes (MiB)."""
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        children = sum(peak_mib(child.pid) for child in psutil.Process().children(recursive=True))
        self._peak_memory_mib = max(self._peak_memory_mib, own + children)
        return RoleUsage(role="generator", busy_seconds=self._meter.busy_seconds, peak_memory_mib=self._peak_memory_mib)

    async def stop(self) -> None:
        """End the engine's processes; requests under way fail. Harmless when repeated."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await end_engine(engine)

    async def _run(self, prompt_token_ids: Sequence[int], params: "SamplingParams", request_id: str) -> "RequestOutput":
        generation = self._weights.prefix_generation
        return await final_output(self._live_engine, prompt_token_ids, params, request_id, prefix_generation=generation)

    @property
    def _live_engine(self) -> "AsyncLLM":
        if self._engine is None:
            raise PilafError("the generator is not running: await start() first")
        return self._engine
