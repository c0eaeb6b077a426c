"""New policy weights for a running engine: pause with requests kept, replace, resume."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from pilaf_ray.engines.weight_tickets import MODEL_FOLDER, TRANSPORTS, WeightUpdate
from pilaf_ray.errors import WeightSyncError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

RECEIVED = (*TRANSPORTS, MODEL_FOLDER)
FETCH_SHARE = 0.8
"""Part of an update's deadline that the fetch may take, so that it fails before the whole."""
ON_DEVICE = ("nccl",)
"""Transports that need the device; with the others the engine goes on sampling until the weights are there."""
LOOK_SECONDS = 0.02
"""Between two looks whether they are. The engine answers between its steps."""


class WeightUpdater:
    """The generator's side of an update, and what it has to remember between two of them.

    Args:
        engine: gives the running engine.
        initial_version: version number of the weights that the engine starts with.
        recompute_caches: compute the KV of running requests anew under the new weights.
    """

    def __init__(self, engine: Callable[[], "AsyncLLM"], *, initial_version: int, recompute_caches: bool) -> None:
        self._engine = engine
        self._recompute_caches = recompute_caches
        self.version = initial_version
        """Version of the policy weights now served."""
        self.prefix_generation = 0
        """Requests of one generation may share KV of their beginnings."""
        self.updating = asyncio.Lock()
        """Held by an update from its beginning to its end, also where nobody waits for it any more."""
        self._lost = False

    async def replace(self, update: WeightUpdate, *, deadline_seconds: float) -> None:
        """Replace the policy's weights; running requests go on with the new ones.

        What becomes of their caches is for ``recompute_caches`` to say; recorded
        log-probabilities are those that were sampled from in either case. If the new weights do not
        arrive intact, the old ones go on being served; if they cannot be loaded, the
        generator stays paused until an update succeeds. After a deadline that was missed in a
        pause nobody knows what the engine holds: the generator stays paused and must be replaced.

        Raises:
            WeightSyncError: it took longer than ``deadline_seconds`` or failed; names the phase.
        """
        if update.transport not in RECEIVED:
            raise WeightSyncError(
                f"weights version {update.version} were published by {update.transport!r}, "
                f"but this generator reads {', '.join(RECEIVED)} only"
            )
        async with self.updating:
            progress = _Progress()
            if self._lost:
                reason = "an earlier update missed its deadline; restart this generator"
                raise self._sync_error(update, progress, reason)
            try:
                async with asyncio.timeout(deadline_seconds):
                    await self._replace(update, progress, deadline_seconds * FETCH_SHARE)
            except TimeoutError as error:
                self._lost = progress.is_paused
                raise self._sync_error(update, progress, f"no end after {deadline_seconds:g} s") from error
            except WeightSyncError:
                raise
            # vLLM reports a worker's exception as a bare Exception.
            except Exception as error:
                if progress.phase == "receive" and progress.is_paused:
                    await self._engine().resume_generation()
                raise self._sync_error(update, progress, str(error)) from error

    async def _replace(self, update: WeightUpdate, progress: "_Progress", fetch_seconds: float) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        engine = self._engine()
        ticket = {**asdict(update), "timeout_seconds": fetch_seconds}
        needs_device = update.transport in ON_DEVICE
        if not needs_device:
            await self._arrival({**ticket, "step": "fetch"})
        progress.is_paused = True
        await engine.pause_generation(mode="keep", clear_cache=False)
        # Nothing is computed from here on, so what comes in now meets the new weights: it gets prefixes of its own.
        self.forget_prefixes()
        await engine.start_weight_update()
        if needs_device:
            await engine.update_weights(WeightTransferUpdateRequest(update_info={**ticket, "step": "fetch"}))
        progress.phase = "load"
        await engine.update_weights(WeightTransferUpdateRequest(update_info={**ticket, "step": "load"}))
        await engine.finish_weight_update(weight_version=version_label(update.version))
        progress.phase = "reset cache"
        if self._recompute_caches and not await engine.reset_prefix_cache(reset_running_requests=True):
            raise self._sync_error(update, progress, "the engine refused to drop its prefix cache")
        progress.phase = "resume"
        self.version = update.version
        await engine.resume_generation()

    async def _arrival(self, ticket: dict[str, object]) -> None:
        """Returns when every worker of the engine has the weights in its memory; raises what a worker met."""
        engine = self._engine()
        await engine.collective_rpc("begin_weight_fetch", args=(ticket,))
        there = [False]
        while not all(there):
            await asyncio.sleep(LOOK_SECONDS)
            there = await engine.collective_rpc("weights_have_arrived")

    def forget_prefixes(self) -> None:
        """Let later requests reuse no KV of earlier ones, as after a weight update."""
        self.prefix_generation += 1

    def _sync_error(self, update: WeightUpdate, progress: "_Progress", reason: str) -> WeightSyncError:
        return WeightSyncError(
            f"generator (pid {os.getpid()}) at version {self.version}: update to version {update.version} "
            f"failed in phase {progress.phase!r}: {reason}"
        )


class _Progress:
    """Which phase an update has reached."""

    phase = "receive"
    is_paused = False


def version_label(version: int) -> str:
    """vLLM's name of a version; padded, so that names sort like versions."""
    return f"{version:08d}"
