"""Sharing a prompt's forward changes no log-probability and no gradient."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from pilaf_ray.data.collate import ResponseGroup, collate, collate_shared
from pilaf_ray.engines.scoring import ScoringModel, sum_by_sequence
from pilaf_ray.engines.shared_prompt import shares_prompts, takes_masks

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GROUPS: list[ResponseGroup] = [
    ((3, 7, 1, 9), ((4, 4, 2), (8, 5, 6, 2))),
    ((11, 2), ((3,), (4, 5))),
    ((1, 1, 2, 3, 5, 8), ((13, 21, 34, 2), (7,))),
]


@pytest.fixture
def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def test_log_probabilities_and_gradients_are_those_of_separate_rows(network: LlamaForCausalLM) -> None:
    model = ScoringModel(network, chunk_tokens=3)
    apart = collate([(prompt, response) for prompt, responses in GROUPS for response in responses])
    weights = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, 0.7])
    found = []
    for batch in (apart, collate_shared(GROUPS)):
        network.zero_grad()
        sums = sum_by_sequence(model(batch), batch)
        (sums * weights).sum().backward()
        found.append((sums.detach(), [p.grad.clone() for p in network.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-5, rtol=1e-4)


def test_the_probe_accepts_a_model_that_obeys_and_rejects_one_that_does_not(network: LlamaForCausalLM) -> None:
    model = ScoringModel(network, chunk_tokens=8)
    cpu = torch.device("cpu")
    assert shares_prompts(network, model, device=cpu)

    class Deaf(ScoringModel):
        """Attends to everything before a token, whatever the mask says."""

        def forward(self, batch):
            return super().forward(replace(batch, attention_mask=torch.ones_like(batch.input_ids)))

    assert not shares_prompts(network, Deaf(network, chunk_tokens=8), device=cpu)


def test_sliding_windows_are_left_alone() -> None:
    assert not takes_masks(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)))
    assert takes_masks(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)))
