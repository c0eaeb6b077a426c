"""The engine's side of a weight transfer: fetch, verify, then load the policy half.

Registered with vLLM's ``WeightTransferEngineFactory`` and run in its worker
processes. Weights that come through the host's memory are fetched and verified in
a thread of the worker, while the engine goes on sampling; NCCL's are fetched in a
call of ``update_weights``, because they need the device. Either may fail without
harm. A further call of ``update_weights`` loads. Loading is not left to
``finish_weight_update``, because vLLM cannot start another update when that fails.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from pilaf_ray.engines.adapted_model import AdaptedForCausalLM
from pilaf_ray.engines.interpolated_model import InterpolatedForCausalLM
from pilaf_ray.engines.lora import merge_stream
from pilaf_ray.engines.saved_policy import read_model
from pilaf_ray.engines.shared_weights import read_shared
from pilaf_ray.engines.weight_files import read_folder
from pilaf_ray.engines.weight_peers import fetch
from pilaf_ray.engines.weight_tickets import MODEL_FOLDER, SampleChecksum
from pilaf_ray.errors import WeightSyncError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig

NamedTensors = list[tuple[str, torch.Tensor]]


@dataclass
class NoInit(WeightTransferInitInfo):
    """These transports connect anew for every update."""


@dataclass
class TicketInfo(WeightTransferUpdateInfo):
    """The fields of a ``WeightUpdate`` as plain data, what to do, and how long a fetch may take."""

    step: Literal["fetch", "load"]
    version: int
    transport: str
    location: str
    num_tensors: int
    num_bytes: int
    sample_checksum: str
    adapter_scale: float | None
    timeout_seconds: float


class PolicyTransferEngine(WeightTransferEngine[NoInit, TicketInfo]):
    """Replaces the weights of the policy half by those of a ticket, whichever way they come."""

    init_info_cls = NoInit
    update_info_cls = TicketInfo
    supports_draft_weight_update = False

    def __init__(
        self,
        config: "WeightTransferConfig",
        vllm_config: "VllmConfig",
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        if not isinstance(model, InterpolatedForCausalLM):
            raise WeightSyncError(f"the engine serves {type(model).__name__}, not the interpolated model")
        self._adapters = model.adapters if isinstance(model, AdaptedForCausalLM) else None
        super().__init__(config, vllm_config, device, model if self._adapters else model.policy)
        self._expected = model.policy_parameters
        # Nothing is merged where the base is shared.
        self._base = None if self._adapters else replace(model.secondary_weights[0], prefix="")
        self._fetched: NamedTensors = []
        self._arriving: Future[NamedTensors] | None = None

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Nothing to do: what was fetched before is what will be loaded."""

    def begin_fetch(self, ticket: TicketInfo) -> None:
        """Fetch and verify in the background; what an earlier call still waits for is forgotten."""
        arriving: Future[NamedTensors] = Future()

        def run() -> None:
            try:
                arriving.set_result(self._verified(fetch_weights(ticket), ticket))
            # Whatever it is, it is for the caller of has_arrived.
            except BaseException as error:
                arriving.set_exception(error)

        self._fetched, self._arriving = [], arriving
        threading.Thread(target=run, name=f"fetch-v{ticket.version}", daemon=True).start()

    def has_arrived(self) -> bool:
        """Whether what :meth:`begin_fetch` began is there, ready to be loaded.

        Raises:
            WeightSyncError: the tensors did not arrive or are not what was sent.
        """
        assert self._arriving is not None, "nothing is on its way"
        if not self._arriving.done():
            return False
        arrived, self._arriving = self._arriving, None
        self._fetched = arrived.result()
        return True

    def receive_weights(self, update_info: TicketInfo) -> None:
        """Fetch, or load what was fetched.

        Raises:
            WeightSyncError: the tensors did not arrive, are not what was sent, or are incomplete.
        """
        if update_info.step == "fetch":
            self._fetched = self._verified(fetch_weights(update_info), update_info)
        else:
            self._load(update_info)

    def finish_weight_update(self) -> None:
        """Nothing to do: the weights were loaded before."""

    def _verified(self, fetched: NamedTensors, ticket: TicketInfo) -> NamedTensors:
        checksum = SampleChecksum()
        for name, tensor in fetched:
            checksum.add(name, tensor)
        received = (checksum.num_tensors, checksum.num_bytes, checksum.hexdigest())
        promised = (ticket.num_tensors, ticket.num_bytes, ticket.sample_checksum)
        if received != promised:
            raise WeightSyncError(
                f"weights version {ticket.version} from {ticket.location} are not what was "
                f"published: (tensors, bytes, checksum) {received} instead of {promised}"
            )
        return fetched

    def _load(self, ticket: TicketInfo) -> None:
        fetched, self._fetched = self._fetched, []
        if self._adapters is not None:
            if ticket.adapter_scale is None:
                raise WeightSyncError("whole weights were sent to an engine that takes adapters: it shares its base")
            # The learner sends its own precision; the adapters multiply what the engine computes with.
            adapters = {name: tensor.to(self.device, self.model_config.dtype) for name, tensor in fetched}
            self._adapters.replace(adapters, scale=ticket.adapter_scale)
            return
        weights: Iterator[tuple[str, torch.Tensor]] = iter(fetched)
        if ticket.adapter_scale is not None:
            weights = self._adapted_reference(dict(fetched), scale=ticket.adapter_scale)
        policy: Any = self.model
        initialize_layerwise_reload(policy)
        loaded = policy.load_weights(weights)
        finalize_layerwise_reload(policy, self.model_config)  # type: ignore[no-untyped-call]
        self._repack_heads()
        missing = self._expected - set(loaded)
        if missing:
            raise WeightSyncError(
                f"the update lacks {len(missing)} of {len(self._expected)} policy parameters, "
                f"e.g. {min(missing)}; publish every parameter under its Hugging Face name"
            )

    def _adapted_reference(
        self, adapters: dict[str, torch.Tensor], *, scale: float
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The reference's tensors with ``adapters`` merged into them, for the model's own loader.

        They are read from the reference's files, which stay in the page cache: the reference half itself
        is fused, divided among workers and, on CPUs, packed, and its originals are gone.
        """
        assert self._base is not None
        files = DefaultModelLoader(replace(self.vllm_config.load_config, use_tqdm_on_load=False))
        base = files._get_weights_iterator(self._base)
        return merge_stream(base, adapters, scale=scale, dtype=self.model_config.dtype)

    def shutdown(self) -> None:
        """Drop what is held."""
        self._fetched, self._arriving = [], None

    def _repack_heads(self) -> None:
        """Renew the packed copy of a tied output head.

        A tied head shares the embedding's parameter, so the reload does not see it as
        loaded; but on CPU it multiplies with a packed copy of its own, which would
        keep the old weights.
        """
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead) and isinstance(module.quant_method, UnquantizedEmbeddingMethod):
                module.quant_method.process_weights_after_loading(module)


def fetch_weights(ticket: TicketInfo) -> NamedTensors:
    """What ``ticket`` stands for, by its own transport.

    Raises:
        WeightSyncError: it did not arrive.
    """
    if ticket.transport == "filesystem":
        return read_folder(ticket.location)
    if ticket.transport == "shared_memory":
        return read_shared(ticket.location)
    if ticket.transport == MODEL_FOLDER:
        return read_model(ticket.location)
    try:
        return fetch(ticket.transport, ticket.location, timeout=timedelta(seconds=ticket.timeout_seconds))
    except RuntimeError as error:
        raise WeightSyncError(
            f"weights version {ticket.version} did not arrive from {ticket.location}: {error}"
        ) from error
