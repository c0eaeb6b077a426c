"""A causal language model that answers with log-probabilities of response tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pilaf_ray.data.collate import SequenceBatch, collate
from pilaf_ray.engines.head_logprobs import head_logprobs, is_ordinary
from pilaf_ray.engines.sequence_parallel import SequenceGroup
from pilaf_ray.errors import ModelError
from pilaf_ray.losses.logprobs import token_logprobs
from pilaf_ray.types import TokenPair


class ScoringModel(nn.Module):
    """Any Hugging Face decoder; ``forward`` gives one log-probability a response token.

    The head runs inside ``forward``, so that ZeRO-3's hooks find its weights in place.

    Args:
        group: ranks that compute the same rows together; all of them call with the same batch.
    """

    def __init__(self, network: nn.Module, *, chunk_tokens: int, group: SequenceGroup | None = None) -> None:
        super().__init__()
        self.network = network
        self._chunk_tokens = chunk_tokens
        self._group = group

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Log-probabilities in fp32, shape (response tokens of the batch,)."""
        if self._group is None:
            rows = last_hidden_states(self.network, batch)[batch.token_row, batch.token_position]
            return self._scored(rows, batch.targets)
        tokens, places, mask = self._group.stretch(batch)
        hidden = _hidden(self.network, tokens, mask, position_ids=places)
        return self._group.collect(self._scored(*self._group.deal(hidden, batch)), len(batch.targets))

    def _scored(self, rows: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities in chunks, by one call of the head.

        ZeRO-3 gathers weights when a module is called, on all ranks together: with a call for each chunk, ranks that
        have more chunks than others would wait for them for ever.
        """
        network: Any = self.network
        head = network.get_output_embeddings()
        logits, own, ordinary = head.forward, "forward" in vars(head), is_ordinary(head)

        def score(states: Tensor) -> Tensor:
            if ordinary:
                return head_logprobs(states, targets, head, self._chunk_tokens)
            return token_logprobs(states, targets, logits, self._chunk_tokens)

        head.forward = score
        try:
            return head(rows)
        finally:
            if own:
                head.forward = logits
            else:
                del head.forward


def last_hidden_states(network: nn.Module, batch: SequenceBatch) -> Tensor:
    """Hidden states below the head, shape (rows, seq, width)."""
    # Rows of one sequence keep the model's own positions and its fastest attention.
    own = {"position_ids": batch.position_ids} if batch.attention_mask.ndim == 4 else {}
    return _hidden(network, batch.input_ids, batch.attention_mask, **own)


def _hidden(network: nn.Module, tokens: Tensor, mask: Tensor | None, **own: Tensor) -> Tensor:
    model: Any = network
    output = model.base_model(input_ids=tokens, attention_mask=_attention(network, mask), use_cache=False, **own)
    hidden: Tensor = output.last_hidden_state
    return hidden


def _attention(network: nn.Module, mask: Tensor | None) -> Tensor | None:
    """Padding as it is; who attends to whom as the term that attention adds to its scores."""
    if mask is None or mask.ndim == 2:
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
