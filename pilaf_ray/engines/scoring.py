"""A causal language model that answers with log-probabilities of response tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pilaf_ray.data.collate import SequenceBatch
from pilaf_ray.errors import ModelError
from pilaf_ray.losses.logprobs import token_logprobs


class ScoringModel(nn.Module):
    """Any Hugging Face decoder; ``forward`` gives one log-probability a response token.

    The head runs inside ``forward``, so that ZeRO-3's hooks find its weights in place.
    """

    def __init__(self, network: nn.Module, *, chunk_tokens: int) -> None:
        super().__init__()
        self.network = network
        self._chunk_tokens = chunk_tokens

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Log-probabilities in fp32, shape (response tokens of the batch,)."""
        network: Any = self.network
        hidden = network.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        rows = hidden[batch.token_row, batch.token_position]
        return token_logprobs(rows, batch.targets, network.get_output_embeddings(), self._chunk_tokens)


def load_network(path: str, *, dtype: torch.dtype) -> nn.Module:
    """A causal language model from a folder or hub id; raises ModelError in one line."""
    from transformers import AutoModelForCausalLM

    try:
        network: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"model.policy/reference: cannot load '{path}': {reason}") from error
    return network


def sum_by_row(logprobs: Tensor, batch: SequenceBatch) -> Tensor:
    """Sequence log-probabilities: sums over each row's response tokens, shape (rows,)."""
    return logprobs.new_zeros(batch.input_ids.shape[0]).index_add(0, batch.token_row, logprobs)


def write_hf_folder(network: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Save ``weights`` as an ordinary Hugging Face folder."""
    saver: Any = network
    saver.save_pretrained(folder, state_dict=weights)
