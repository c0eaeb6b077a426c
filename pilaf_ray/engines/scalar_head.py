"""A decoder that answers with one number instead of a distribution: reward models and value models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pilaf_ray.data.collate import SequenceBatch
from pilaf_ray.engines.scalar_head_checks import check_scalar_head
from pilaf_ray.engines.scoring import last_hidden_states
from pilaf_ray.errors import ModelError


class ScalarHeadModel(nn.Module):
    """A Hugging Face sequence-classification decoder with one output, or several heads for one, read at any token."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: SequenceBatch, rows: Tensor, positions: Tensor) -> Tensor:
        """The head's output in fp32 at the given places, shape (places,); with several heads (places, heads).

        Args:
            batch: what the decoder reads.
            rows: row of each place.
            positions: token in the row of each place.
        """
        network: Any = self.network
        hidden = last_hidden_states(self.network, batch)[rows, positions]
        values: Tensor = network.score(hidden).float()
        return values[:, 0] if values.shape[1] == 1 else values


def response_mean(
    model: Callable[[SequenceBatch, Tensor, Tensor], Tensor], batch: SequenceBatch
) -> Float[Tensor, "sequence *head"]:
    """Mean of each head's output over the tokens of each response."""
    # Where a response's next token is predicted from, there stands the token before it; only the last is missing.
    later = torch.ones_like(batch.token_sequence, dtype=torch.bool)
    later[1:] = batch.token_sequence[1:] == batch.token_sequence[:-1]
    later[0] = False
    rows = torch.cat([batch.token_row[later], batch.end_row])
    positions = torch.cat([batch.token_position[later], batch.end_position])
    order = torch.arange(batch.sequences, device=rows.device)
    owner = torch.cat([batch.token_sequence[later], order])
    values = model(batch, rows, positions)
    sums = values.new_zeros(batch.sequences, *values.shape[1:]).index_add(0, owner, values)
    return sums / torch.bincount(owner).view(-1, *[1] * (values.ndim - 1))


def load_scalar_head(
    path: str, *, setting: str, layers: int | None = None, trainable_layers: int | None = None, heads: int = 1
) -> nn.Module:
    """A decoder with a scalar head, in fp32; a new head is zero, so that every text is worth the same.

    Args:
        path: a language model or a reward model: folder or hub id.
        setting: the section of the configuration that names it, e.g. ``"reward_model"``.
        layers: keep only so many of the first layers; the saved model has no more.
        trainable_layers: train only so many of the last layers, the last norm and the head.
        heads: begin so many heads as copies of the one.

    Raises:
        ModelError: in one line.
        ConfigError: more layers are to be trained than there are.
    """
    from transformers import AutoModelForSequenceClassification

    check_scalar_head(path, setting=setting, layers=layers, trainable_layers=trainable_layers)
    network: Any
    try:
        network, found = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{setting}.path: cannot load '{path}': {str(error).splitlines()[0]}") from error
    if not isinstance(getattr(network, "score", None), nn.Linear):
        raise ModelError(f"{setting}.path: '{path}' is no decoder with a linear head ({type(network).__name__})")
    if "score.weight" in found["missing_keys"]:
        # A head that is drawn would start with opinions, as large as those that are to be learned.
        nn.init.zeros_(network.score.weight)
    if heads > 1:
        _multiply(network, heads)
    if layers is not None:
        _cut(network, layers)
    if trainable_layers is not None:
        _freeze(network, trainable_layers)
    return network  # type: ignore[no-any-return]


def _multiply(network: Any, heads: int) -> None:
    """So many copies of the head, side by side."""
    head = network.score
    network.score = nn.Linear(head.in_features, heads, bias=head.bias is not None)
    for copies, one in zip(network.score.parameters(), head.parameters(), strict=True):
        copies.data = one.detach().repeat(heads, *[1] * (one.ndim - 1))


def _stack(network: Any) -> nn.ModuleList:
    """The decoder's layers."""
    count = network.config.get_text_config().num_hidden_layers
    (stack,) = (m for m in network.base_model.children() if isinstance(m, nn.ModuleList) and len(m) == count)
    return stack


def _cut(network: Any, layers: int) -> None:
    """Drop the upper layers, as if the model had been made without them."""
    stack, config = _stack(network), network.config.get_text_config()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    del stack[layers:]


def _freeze(network: Any, trainable_layers: int) -> None:
    """Keep the embeddings and the lower layers as they are."""
    stack = _stack(network)
    frozen: list[nn.Module] = [*stack[: len(stack) - trainable_layers]]
    frozen += [m for m in network.base_model.children() if isinstance(m, nn.Embedding)]
    for module in frozen:
        module.requires_grad_(False)


def same_vocabulary(policy_path: str, other_path: str) -> bool:
    """Whether the same token id means the same to both models."""
    if Path(policy_path) == Path(other_path):
        return True
    from transformers import AutoTokenizer

    policy: Any = AutoTokenizer.from_pretrained(policy_path)
    other: Any = AutoTokenizer.from_pretrained(other_path)
    return bool(policy.get_vocab() == other.get_vocab())
