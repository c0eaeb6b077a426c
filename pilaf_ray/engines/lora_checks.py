"""Which layers low-rank adapters go on, and what is refused before a model is loaded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from pilaf_ray.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR: Final = "all-linear"
Targets = tuple[str, ...] | Literal["all-linear"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """Adapters of one rank on all modules that ``targets`` names.

    Example: ``LoraSettings(rank=16, alpha=32.0, dropout=0.0, targets=("q_proj", "v_proj"))``
    """

    rank: int
    alpha: float
    dropout: float
    targets: Targets
    """Last parts of module names; ``all-linear`` is every linear layer but the output head."""
    quantise: Literal["nf4"] | None = None
    """Number format that the learner keeps the adapted weights in; None for that of the rest."""

    def describe(self) -> str:
        """For messages; what must be the same when a run goes on."""
        targets = self.targets if isinstance(self.targets, str) else ", ".join(sorted(self.targets))
        return f"rank {self.rank}, alpha {self.alpha:g}, targets {targets}" + (
            f", quantise {self.quantise}" if self.quantise else ""
        )

    @property
    def scale(self) -> float:
        """What B·A is multiplied with."""
        return self.alpha / self.rank


def adapted_layers(network: "nn.Module", targets: Targets) -> "dict[str, nn.Linear]":
    """The linear layers that ``targets`` names, in the network's order.

    Raises:
        ModelError: a target names no module, or something that is no linear layer.
    """
    from torch import nn

    model: Any = network
    head = model.get_output_embeddings()
    modules = dict(network.named_modules())
    linear = {name: m for name, m in modules.items() if isinstance(m, nn.Linear) and m is not head}
    if targets == ALL_LINEAR:
        if not linear:
            raise ModelError(f"model.lora.targets: {type(network).__name__} has no linear layer; it cannot be adapted")
        return linear
    named: set[str] = set()
    for target in targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not found:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
            raise ModelError(f"model.lora.targets: no module is named '{target}'; linear layers are named: {known}")
        other = next((name for name in found if name not in linear), None)
        if other is not None:
            kind = "the output head" if modules[other] is head else f"a {type(modules[other]).__name__}"
            raise ModelError(
                f"model.lora.targets: '{target}' names {other}, {kind}: adapters go on linear layers below the head"
            )
        named.update(found)
    return {name: module for name, module in linear.items() if name in named}


def count_adapter_parameters(path: str, settings: LoraSettings) -> int:
    """Numbers in all A and B for the model at ``path``, built without weights.

    Raises:
        ModelError: the model cannot be read, or the targets do not fit it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM  # untyped upstream
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"model.policy: no model configuration in '{path}' to adapt: {reason}") from error
    with torch.device("meta"):
        network = factory.from_config(config)
    layers = adapted_layers(network, settings.targets).values()
    return sum(settings.rank * (layer.in_features + layer.out_features) for layer in layers)
