"""Gradients that are added directly, and the head's own backward, are those of autograd."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pilaf_ray.data.collate import ResponseGroup, SequenceBatch, collate_shared
from pilaf_ray.engines.direct_gradients import DirectEmbedding, DirectLinear, add_gradients_directly
from pilaf_ray.engines.head_logprobs import head_logprobs, is_ordinary
from pilaf_ray.engines.scoring import ScoringModel, last_hidden_states

MICRO_BATCHES: list[list[ResponseGroup]] = [
    [((3, 7, 1, 9), ((4, 4, 2), (8, 5, 6, 2)))],
    [((1, 1, 2, 3, 5, 8), ((13, 21, 34, 2), (7,))), ((11, 2), ((3,), (4, 5)))],
]


def make_llama(*, tied: bool, checkpointing: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tied,
        pad_token_id=2,
    )
    network = LlamaForCausalLM(config).train()
    network.model.layers[0].mlp.up_proj.requires_grad_(False)
    if checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return network


def gradients(network: nn.Module, logprobs: Callable[[SequenceBatch], Tensor]) -> dict[str, Tensor | None]:
    """Of two micro-batches, one after the other."""
    for groups in MICRO_BATCHES:
        batch = collate_shared(groups)
        (logprobs(batch) * torch.linspace(-1.0, 2.0, len(batch.targets))).sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("chunk", [2, 100])
def test_gradients_over_micro_batches_are_those_of_autograd(tied: bool, checkpointing: bool, chunk: int) -> None:
    plain = make_llama(tied=tied, checkpointing=False)

    def full_logits(batch: SequenceBatch) -> Tensor:
        hidden = last_hidden_states(plain, batch)[batch.token_row, batch.token_position]
        return F.log_softmax(plain.lm_head(hidden), dim=-1).gather(-1, batch.targets[:, None])[:, 0]

    expected = gradients(plain, full_logits)
    network = make_llama(tied=tied, checkpointing=checkpointing)
    add_gradients_directly(network)
    assert type(network.model.embed_tokens) is DirectEmbedding and type(network.lm_head) is DirectLinear
    assert type(network.model.layers[0].mlp.up_proj) is nn.Linear, "it is not trained"
    found = gradients(network, ScoringModel(network, chunk_tokens=chunk))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found["model.layers.0.mlp.up_proj.weight"] is None


@pytest.mark.parametrize("chunk", [1, 3, 20, 100])
def test_the_heads_own_backward_is_that_of_full_logits_and_may_be_repeated(chunk: int) -> None:
    torch.manual_seed(0)
    states, targets = torch.randn(37, 5, requires_grad=True), torch.randint(0, 11, (37,))
    head = nn.Linear(5, 11, bias=False)
    factors = torch.randn(37)
    full = F.log_softmax(head(states), dim=-1).gather(-1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((full * factors).sum(), [states, head.weight])
    found = head_logprobs(states, targets, head, chunk)
    torch.testing.assert_close(found, full)
    for _ in range(2):
        again = torch.autograd.grad((found * factors).sum(), [states, head.weight], retain_graph=True)
        torch.testing.assert_close(again, expected)


def test_logprobs_of_a_head_in_bfloat16_are_taken_in_float32() -> None:
    torch.manual_seed(0)
    states, targets = torch.randn(9, 8, dtype=torch.bfloat16, requires_grad=True), torch.arange(9)
    head = nn.Linear(8, 30, bias=False, dtype=torch.bfloat16)
    full = F.log_softmax(head(states).float(), dim=-1).gather(-1, targets[:, None])[:, 0]
    expected = torch.autograd.grad(full.sum(), [states, head.weight])
    found = head_logprobs(states, targets, head, 4)
    torch.testing.assert_close(found, full)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), [states, head.weight]), expected, atol=0.05, rtol=0.02)


def test_nothing_stands_in_for_a_head_that_does_more_than_multiply() -> None:
    replaced = nn.Linear(2, 3, bias=False)
    replaced.forward = lambda states: states  # type: ignore[method-assign]
    heads = {"own": replaced, "bias": nn.Linear(2, 3), "other": nn.Sequential(), "plain": nn.Linear(2, 3, bias=False)}
    assert {name for name, head in heads.items() if is_ordinary(head)} == {"plain"}
