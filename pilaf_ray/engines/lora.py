"""Low-rank adapters of a policy: what of it is trained, what is sent, and what the whole is.

An adapted linear layer computes W·x + scale·B·(A·x), with A of shape (rank, inputs), B of shape (outputs, rank)
and scale = alpha/rank. W is the reference's and never changes; B starts at zero, so the policy starts as the reference.
PEFT puts the layers in. Everything else here works on names and tensors.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pilaf_ray.engines.lora_checks import ALL_LINEAR, LoraSettings, adapted_layers
from pilaf_ray.errors import WeightSyncError

_BASE = ".base_layer."
_INSIDE = {"A": ".lora_A.default.weight", "B": ".lora_B.default.weight"}
_SENT = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
_PEFT_PREFIX = "base_model.model."
"""PEFT's files name parameters as they stand in its own wrapper, which is not used here."""
_OWN = "pilaf_ray.json"
"""What PEFT's own settings have no place for."""


def add_adapters(network: nn.Module, settings: LoraSettings) -> None:
    """Put adapters into ``network``, freeze the rest; A is drawn with torch's generator, B is zero."""
    from peft import inject_adapter_in_model

    expected = adapted_layers(network, settings.targets).keys()
    inject_adapter_in_model(_peft_config(settings), network)
    found = {name.removesuffix(_INSIDE["A"]) for name, _ in network.named_parameters() if name.endswith(_INSIDE["A"])}
    assert found == set(expected), "PEFT adapts the layers that were checked"


def _peft_config(settings: LoraSettings, *, base: str | None = None) -> Any:
    from peft import LoraConfig

    targets = settings.targets
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a fraction is as good
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def plain_parameters(network: nn.Module) -> Iterator[tuple[str, tuple[nn.Parameter, ...]]]:
    """Each parameter of the plain model by its name there, with what it is made of: itself, or (W, A, B)."""
    parameters = dict(network.named_parameters())
    for name, parameter in parameters.items():
        if name.endswith(tuple(_INSIDE.values())):
            continue
        stem = name.removesuffix(f"{_BASE}weight")
        parts = [parameters[stem + end] for end in _INSIDE.values() if stem + end in parameters]
        yield name.replace(_BASE, "."), (parameter, *parts)


def adapter_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every A and B by the name under which it is sent: ``….q_proj.lora_A.weight``."""
    for name, parameter in network.named_parameters():
        for letter, end in _INSIDE.items():
            if name.endswith(end):
                yield name.removesuffix(end) + _SENT[letter], parameter


def adapter_names(adapters: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Name of each adapted layer → names of its A and B among ``adapters``, which :func:`adapter_parameters` named."""
    first = _SENT["A"]
    stems = [name.removesuffix(first) for name in adapters if name.endswith(first)]
    return {stem: (stem + first, stem + _SENT["B"]) for stem in stems}


def merged(base: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """W + scale·B·A in fp32, shape of ``base``."""
    return base.float() + scale * (b.float() @ a.float())


def merge_stream(
    base: Iterable[tuple[str, Tensor]], adapters: Mapping[str, Tensor], *, scale: float, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """``base`` as it comes, adapted tensors merged and rounded to ``dtype``.

    Raises:
        WeightSyncError: an adapter belongs to no tensor of ``base``, or to one of another size. It is raised at the end
            only: vLLM cannot load anything any more once it was interrupted in the middle.
    """
    left, wrong = dict(adapters), list[str]()
    for name, tensor in base:
        stem = name.removesuffix(".weight")
        first, second = stem + _SENT["A"], stem + _SENT["B"]
        if first in left and second in left:
            a, b = left.pop(first), left.pop(second)
            if (b.shape[0], b.shape[1], a.shape[1]) == (tensor.shape[0], a.shape[0], tensor.shape[1]):
                tensor = merged(tensor, a, b, scale=scale).to(dtype)
            else:
                wrong.append(stem)
        yield name, tensor
    if wrong:
        raise WeightSyncError(
            f"{len(wrong)} adapters do not have the sizes of the reference's weights, e.g. that of {min(wrong)}: "
            "they were trained on another model than the one that generators serve"
        )
    if left:
        raise WeightSyncError(
            f"{len(left)} adapter tensors fit no weight of the reference, e.g. {min(left)}: "
            "its files name their weights otherwise than the learner's model; save it with save_pretrained"
        )


def write_adapter_folder(adapters: Mapping[str, Tensor], settings: LoraSettings, folder: Path, *, base: str) -> None:
    """Save A and B as PEFT does, for a model at ``base``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    _peft_config(settings, base=base).save_pretrained(folder)
    named = {_PEFT_PREFIX + name: tensor.contiguous() for name, tensor in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / _OWN).write_text(json.dumps({"quantise": settings.quantise}))


def read_adapter_settings(folder: Path) -> LoraSettings | None:
    """What :func:`write_adapter_folder` was given; None where there is no adapter."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    values: dict[str, Any] = json.loads(file.read_text())
    targets = values["target_modules"]
    own = json.loads((folder / _OWN).read_text()) if (folder / _OWN).is_file() else {}
    return LoraSettings(
        rank=values["r"],
        alpha=values["lora_alpha"],
        dropout=values["lora_dropout"],
        targets=ALL_LINEAR if targets == ALL_LINEAR else tuple(targets),
        quantise=own.get("quantise"),
    )
