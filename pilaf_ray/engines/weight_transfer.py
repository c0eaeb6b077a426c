"""The engine's side of a weight transfer: fetch, verify, then load the policy half.

Registered with vLLM's ``WeightTransferEngineFactory`` and run in its worker
processes. A transfer is safe to fail until the load begins: ``update_weights``
only fetches and verifies, ``finish_weight_update`` loads.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from pilaf_ray.engines.interpolated_model import InterpolatedForCausalLM
from pilaf_ray.engines.weight_publishers import SampleChecksum, buckets, gloo_pair
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
    """The fields of a ``WeightUpdate`` as plain data, and how long a fetch may take."""

    version: int
    transport: str
    location: str
    num_tensors: int
    num_bytes: int
    sample_checksum: str
    timeout_seconds: float


class PolicyTransferEngine(WeightTransferEngine[NoInit, TicketInfo]):
    """Replaces the weights of the policy half; subclasses say how tensors are fetched."""

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
        super().__init__(config, vllm_config, device, model.policy)
        self._expected = model.policy_parameters
        self._fetched: NamedTensors = []

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Forget what an update that failed has left behind."""
        self._fetched = []

    def receive_weights(self, update_info: TicketInfo) -> None:
        """Fetch all tensors into host memory and compare them with the ticket.

        Raises:
            WeightSyncError: they did not arrive, or are not what was sent.
        """
        fetched = self._fetch(update_info)
        checksum = SampleChecksum()
        for name, tensor in fetched:
            checksum.add(name, tensor)
        received = (checksum.num_tensors, checksum.num_bytes, checksum.hexdigest())
        promised = (update_info.num_tensors, update_info.num_bytes, update_info.sample_checksum)
        if received != promised:
            raise WeightSyncError(
                f"weights version {update_info.version} from {update_info.location} are not what was "
                f"published: (tensors, bytes, checksum) {received} instead of {promised}"
            )
        self._fetched = fetched

    def finish_weight_update(self) -> None:
        """Load what was fetched.

        Raises:
            WeightSyncError: a parameter of the policy was missing from the update.
        """
        fetched, self._fetched = self._fetched, []
        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights(iter(fetched))
        finalize_layerwise_reload(self.model, self.model_config)
        self._repack_heads()
        missing = self._expected - set(loaded)
        if missing:
            raise WeightSyncError(
                f"the update lacks {len(missing)} of {len(self._expected)} policy parameters, "
                f"e.g. {min(missing)}; publish every parameter under its Hugging Face name"
            )

    def shutdown(self) -> None:
        """Drop what is held."""
        self._fetched = []

    def _fetch(self, ticket: TicketInfo) -> NamedTensors:
        raise NotImplementedError

    def _repack_heads(self) -> None:
        """Renew the packed copy of a tied output head.

        A tied head shares the embedding's parameter, so the reload does not see it as
        loaded; but on CPU it multiplies with a packed copy of its own, which would
        keep the old weights.
        """
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead) and isinstance(
                module.quant_method, UnquantizedEmbeddingMethod
            ):
                module.quant_method.process_weights_after_loading(module)


class FilesystemTransferEngine(PolicyTransferEngine):
    """Reads the shards that ``FilesystemPublisher`` wrote."""

    def _fetch(self, ticket: TicketInfo) -> NamedTensors:
        folder = Path(ticket.location)
        try:
            shards = json.loads((folder / "shards.json").read_text())
            return [item for shard in shards for item in _read_shard(folder / shard)]
        except OSError as error:
            raise WeightSyncError(
                f"cannot read weights version {ticket.version} in {folder}: {error}; "
                "the folder must be shared with the learner"
            ) from error


def _read_shard(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in the order of publication (the file itself sorts them)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as shard:
        for name in json.loads(shard.metadata()["order"]):
            yield name, shard.get_tensor(name)


class GlooTransferEngine(PolicyTransferEngine):
    """Receives from ``GlooPublisher`` over a group of two."""

    def _fetch(self, ticket: TicketInfo) -> NamedTensors:
        from torch.distributed import TCPStore

        host, _, port = ticket.location.rpartition(":")
        timeout = timedelta(seconds=ticket.timeout_seconds)
        try:
            store = TCPStore(host, int(port), None, is_master=False, timeout=timeout)
            manifest: list[dict[str, Any]] = json.loads(store.get("manifest"))
            group = gloo_pair(store, receiver=store.add("joined", 1), rank=1, timeout=timeout)
            tensors = {
                entry["name"]: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
                for entry in manifest
            }
            sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
            for bucket in buckets(sizes.items()):
                message = torch.empty(sum(sizes[name] for name in bucket), dtype=torch.uint8)
                group.recv([message], 0, 0).wait()
                for name, part in zip(bucket, message.split([sizes[n] for n in bucket]), strict=True):
                    # Copied out: the loader keeps references until a layer is complete.
                    tensors[name].view(-1).view(torch.uint8).copy_(part)
        except RuntimeError as error:
            raise WeightSyncError(
                f"weights version {ticket.version} did not arrive from {ticket.location}: {error}"
            ) from error
        return list(tensors.items())
