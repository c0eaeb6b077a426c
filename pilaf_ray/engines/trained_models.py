"""The two kinds of network that learners train: a policy, and a decoder with a scalar head."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pilaf_ray.data.collate import SequenceBatch
from pilaf_ray.engines.lora import (
    adapter_parameters,
    add_adapters,
    merged,
    plain_parameters,
    read_adapter_settings,
    write_adapter_folder,
)
from pilaf_ray.engines.lora_checks import LoraSettings
from pilaf_ray.engines.loss_scale import check_float16
from pilaf_ray.engines.model_store import source_of
from pilaf_ray.engines.quantised import dequantised, forget_quantiser, load_quantised
from pilaf_ray.engines.scalar_head import ScalarHeadModel, load_scalar_head
from pilaf_ray.engines.scoring import ScoringModel, load_network, response_logprobs
from pilaf_ray.engines.sequence_parallel import SequenceGroup, probe, refusal
from pilaf_ray.engines.training_engine import TrainingEngine
from pilaf_ray.engines.zero_options import NO_OFFLOAD, OffloadSettings, check_disk
from pilaf_ray.errors import CheckpointError, ModelError
from pilaf_ray.types import TokenPair

HEADS = "heads.json"
"""In a checkpoint of several heads: how many."""


class TrainedPolicy(TrainingEngine):
    """A causal language model; called with a batch, it gives log-probabilities of the response tokens.

    Args:
        model_path: folder or hub id.
        logprob_chunk_tokens: tokens whose logits are held at a time.
        gradient_checkpointing: compute activations again instead of keeping them.
        lora: train adapters only; None trains every weight.
        sequence_parallel: ranks that compute the same rows together.
        offload: what leaves the device between uses.
        precision: as of :class:`TrainingEngine`; also that in which a base of 4 bits is multiplied.
        settings: of :class:`TrainingEngine`.

    Raises:
        ModelError: the model cannot be loaded, or not be parted along the sequence.
        ConfigError: this node cannot offload to a disk or train in float16, or has no bitsandbytes.
    """

    def __init__(
        self,
        model_path: str,
        *,
        logprob_chunk_tokens: int,
        gradient_checkpointing: bool,
        lora: LoraSettings | None = None,
        sequence_parallel: int = 1,
        offload: OffloadSettings = NO_OFFLOAD,
        precision: str,
        **settings: Any,
    ) -> None:
        check_disk(offload)
        check_float16(precision, setting="learner.precision")
        network = _load(model_path, lora, precision=precision)
        self._base, self._lora = model_path, lora
        if lora is not None:
            add_adapters(network, lora)
            self.keeps_frozen = False
            if lora.quantise is not None:
                forget_quantiser(network)
        if gradient_checkpointing:
            _checkpoint_gradients(network)
        group = None if sequence_parallel == 1 else SequenceGroup(sequence_parallel)
        if group is not None:
            quantised = lora is not None and lora.quantise is not None
            exact = not quantised or precision == "float32"
            _part(network, group, chunk_tokens=logprob_chunk_tokens, tolerance=1e-3 if exact else 0.1)
        model = ScoringModel(network, chunk_tokens=logprob_chunk_tokens, group=group)
        super().__init__(model, sequence_parallel=sequence_parallel, offload=offload, precision=precision, **settings)

    @property
    def adapter_scale(self) -> float | None:
        """What B·A of :meth:`sent_weights` is multiplied with; None where whole weights are sent."""
        return None if self._lora is None else self._lora.scale

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """As :meth:`TrainingEngine.named_weights`, with adapters merged into the weights that they adapt."""
        if self._lora is None:
            yield from super().named_weights()
            return
        for name, parts in plain_parameters(self.network):
            with self._whole(*parts):
                base, *adapters = (dequantised(part) for part in parts)
                tensor = merged(base, *adapters, scale=self._lora.scale) if adapters else base
                yield name, tensor.to("cpu", self._dtype)

    def sent_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What generators need of these weights: A and B of each adapter, or everything; see :meth:`named_weights`."""
        if self._lora is None:
            yield from super().named_weights()
            return
        for name, parameter in adapter_parameters(self.network):
            with self._whole(parameter):
                yield name, parameter.detach().to("cpu", self._dtype)

    def load(self, folder: Path) -> dict[str, Any]:
        """As :meth:`TrainingEngine.load`; raises CheckpointError where the checkpoint has other adapters."""
        saved = read_adapter_settings(folder / "adapter")
        was, now = (settings.describe() if settings else "every weight" for settings in (saved, self._lora))
        if was != now:
            raise CheckpointError(
                f"{folder}: trained with model.lora: {was}; now it is: {now}: go on with the same, or start a new run"
            )
        return super().load(folder)

    def _save(self, folder: Path, state: dict[str, Any]) -> None:
        super()._save(folder, state)
        if self._lora is None:
            return
        adapters = self._kept(self.sent_weights())
        if self.rank == 0:
            write_adapter_folder(adapters, self._lora, folder / "adapter", base=source_of(self._base))

    def per_token(self, batch: SequenceBatch) -> Tensor:
        """log π of each response token, shape (response tokens of the batch,)."""
        return self(batch)

    def response_logprobs(self, items: Sequence[TokenPair]) -> list[list[float]]:
        """Per-token log-probabilities of (prompt, response) pairs under the current weights."""
        self.eval()
        return response_logprobs(self, items, self.device)


class TrainedScalarHead(TrainingEngine):
    """A reward or value model; called with a batch and places, it gives the head's output there.

    Several heads are handed out and saved as the one that gives their mean: again a linear head, and so an
    ordinary reward model.

    Args:
        model_path: a language model, which gets a new head, or a reward model.
        setting: the section of the configuration that names it, for messages.
        layers: keep only so many of the first layers.
        trainable_layers: train only so many of the last layers and the head; all when left out.
        head_learning_rate: of the head; that of the rest when left out.
        heads: so many heads instead of one.
        gradient_checkpointing: compute activations again instead of keeping them.
        precision: as of :class:`TrainingEngine`.
        settings: of :class:`TrainingEngine`.

    Raises:
        ConfigError: this node cannot train in float16.
    """

    def __init__(
        self,
        model_path: str,
        *,
        setting: str,
        layers: int | None,
        trainable_layers: int | None,
        head_learning_rate: float | None,
        gradient_checkpointing: bool,
        heads: int = 1,
        precision: str,
        **settings: Any,
    ) -> None:
        section = "reward_model" if setting == "reward_model" else "learner"
        check_float16(precision, setting=f"{section}.precision")
        network: Any = load_scalar_head(
            model_path, setting=setting, layers=layers, trainable_layers=trainable_layers, heads=heads
        )
        self._heads, self._setting = heads, setting
        if gradient_checkpointing:
            _checkpoint_gradients(network)
        head = list(network.score.parameters())
        model = ScalarHeadModel(network)
        super().__init__(model, head=head, head_learning_rate=head_learning_rate, precision=precision, **settings)

    def per_token(self, batch: SequenceBatch) -> Tensor:
        """The head's output before each response token, shape (response tokens of the batch,); with heads behind it."""
        return self(batch, batch.token_row, batch.token_position)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """As of every network, with the mean of several heads for the head."""
        for name, weight in super().named_weights():
            yield name, weight.mean(0, keepdim=True) if self._heads > 1 and name.startswith("score.") else weight

    def load(self, folder: Path) -> dict[str, Any]:
        """As :meth:`TrainingEngine.load`; raises CheckpointError where the checkpoint has another number of heads."""
        file = folder / HEADS
        saved = json.loads(file.read_text()) if file.exists() else 1
        if saved != self._heads:
            raise CheckpointError(
                f"{folder}: trained with {self._setting}.heads: {saved}; now it is: {self._heads}: go on with the "
                "same, or start a new run"
            )
        return super().load(folder)

    def _save(self, folder: Path, state: dict[str, Any]) -> None:
        super()._save(folder, state)
        if self._heads > 1 and self.rank == 0:
            (folder / HEADS).write_text(json.dumps(self._heads))


def _load(path: str, lora: LoraSettings | None, *, precision: str) -> nn.Module:
    if lora is None or lora.quantise is None:
        return load_network(path, dtype=torch.float32)
    return load_quantised(path, compute_dtype=getattr(torch, precision))


@torch.no_grad()
def _part(network: nn.Module, group: SequenceGroup, *, chunk_tokens: int, tolerance: float) -> None:
    """Let ``group`` compute ``network``, which is whole and not cast yet, together; on all ranks.

    Raises:
        ModelError: log-probabilities of a small batch are not what they were.
    """
    network.eval()
    whole = ScoringModel(network, chunk_tokens=chunk_tokens)(probe())
    group.attach(network)
    parted = ScoringModel(network, chunk_tokens=chunk_tokens, group=group)(probe())
    if not torch.allclose(whole, parted, atol=tolerance, rtol=0):
        raise ModelError(refusal(type(network).__name__, "its log-probabilities change where it is parted"))


def _checkpoint_gradients(network: nn.Module) -> None:
    model: Any = network
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
