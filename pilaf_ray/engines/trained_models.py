"""The two kinds of network that learners train: a policy, and a decoder with a scalar head."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pilaf_ray.data.collate import SequenceBatch
from pilaf_ray.engines.scalar_head import ScalarHeadModel, load_scalar_head
from pilaf_ray.engines.scoring import ScoringModel, load_network, response_logprobs
from pilaf_ray.engines.training_engine import TrainingEngine
from pilaf_ray.types import TokenPair


class TrainedPolicy(TrainingEngine):
    """A causal language model; called with a batch, it gives log-probabilities of the response tokens.

    Args:
        model_path: folder or hub id.
        logprob_chunk_tokens: tokens whose logits are held at a time.
        gradient_checkpointing: compute activations again instead of keeping them.
        settings: of :class:`TrainingEngine`.
    """

    def __init__(
        self, model_path: str, *, logprob_chunk_tokens: int, gradient_checkpointing: bool, **settings: Any
    ) -> None:
        network = load_network(model_path, dtype=torch.float32)
        if gradient_checkpointing:
            _checkpoint_gradients(network)
        super().__init__(ScoringModel(network, chunk_tokens=logprob_chunk_tokens), **settings)

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
        settings: of :class:`TrainingEngine`.
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
        **settings: Any,
    ) -> None:
        network: Any = load_scalar_head(
            model_path, setting=setting, layers=layers, trainable_layers=trainable_layers, heads=heads
        )
        self._heads = heads
        if gradient_checkpointing:
            _checkpoint_gradients(network)
        head = list(network.score.parameters())
        super().__init__(ScalarHeadModel(network), head=head, head_learning_rate=head_learning_rate, **settings)

    def per_token(self, batch: SequenceBatch) -> Tensor:
        """The head's output before each response token, shape (response tokens of the batch,); with heads behind it."""
        return self(batch, batch.token_row, batch.token_position)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """As of every network, with the mean of several heads for the head."""
        for name, weight in super().named_weights():
            yield name, weight.mean(0, keepdim=True) if self._heads > 1 and name.startswith("score.") else weight


def _checkpoint_gradients(network: nn.Module) -> None:
    model: Any = network
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
