"""A causal language model that answers with log-probabilities of response tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pilaf_ray.data.collate import SequenceBatch, collate
from pilaf_ray.errors import ModelError
from pilaf_ray.losses.logprobs import token_logprobs
from pilaf_ray.types import TokenPair


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
        rows = last_hidden_states(self.network, batch)[batch.token_row, batch.token_position]
        network: Any = self.network
        return token_logprobs(rows, batch.targets, network.get_output_embeddings(), self._chunk_tokens)


def last_hidden_states(network: nn.Module, batch: SequenceBatch) -> Tensor:
    """Hidden states below the head, shape (rows, seq, width)."""
    model: Any = network
    # Rows of one sequence keep the model's own positions and its fastest attention.
    own = {"position_ids": batch.position_ids} if batch.attention_mask.ndim == 4 else {}
    output = model.base_model(
        input_ids=batch.input_ids, attention_mask=_attention(network, batch), use_cache=False, **own
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _attention(network: nn.Module, batch: SequenceBatch) -> Tensor:
    """Padding as it is; who attends to whom as the term that attention adds to its scores."""
    mask = batch.attention_mask
    if mask.ndim == 2:
        return mask
    dtype = next(network.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def load_network(path: str, *, dtype: torch.dtype) -> nn.Module:
    """A causal language model from a folder or hub id; raises ModelError in one line."""
    from transformers import AutoModelForCausalLM

    try:
        network: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"model.policy/reference: cannot load '{path}': {reason}") from error
    return network


@torch.no_grad()
def response_logprobs(
    model: Callable[[SequenceBatch], Tensor], items: Sequence[TokenPair], device: torch.device
) -> list[list[float]]:
    """Log-probability of each response token of (prompt, response) pairs, in one forward."""
    batch = collate(items).to(device)
    logprobs = model(batch)
    return [logprobs[batch.token_sequence == row].tolist() for row in range(len(items))]


def sum_by_sequence(logprobs: Tensor, batch: SequenceBatch) -> Tensor:
    """Sequence log-probabilities: sums over each sequence's response tokens, shape (sequences,)."""
    return logprobs.new_zeros(batch.sequences).index_add(0, batch.token_sequence, logprobs)


def write_hf_folder(network: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Save ``weights`` as an ordinary Hugging Face folder, with the tokenizer of the model it came from."""
    from transformers import AutoTokenizer

    saver: Any = network
    saver.save_pretrained(folder, state_dict=weights)
    AutoTokenizer.from_pretrained(saver.name_or_path).save_pretrained(folder)
