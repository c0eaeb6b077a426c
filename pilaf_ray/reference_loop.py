"""The whole algorithm in one process and on one screen: the oracle of correctness for the async path.

Plain PyTorch and Hugging Face, no Ray, no vLLM, no DeepSpeed, no cache: slow and simple.
With ``max_staleness_steps: 0`` the asynchronous run gives the same losses step by step.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pilaf_ray.losses.preference import LOSSES, PreferenceInputs
from pilaf_ray.oracle.base import PreferenceOracle
from pilaf_ray.sampling.replay import sample_response
from pilaf_ray.types import FinishReason, PairPlan, ResponsePair, SampledResponse, VersionSpan


async def run_reference_loop(
    *,
    policy_path: str,
    reference_path: str,
    plan: Callable[[int], PairPlan],
    oracle: PreferenceOracle,
    loss: str,
    beta: float,
    learning_rate: float,
    batch_pairs: int,
    steps: int,
    max_new_tokens: int,
    betas: tuple[float, float] = (0.9, 0.95),
    max_grad_norm: float = 1.0,
) -> list[float]:
    """Loss of each step of synchronous online preference optimisation, in fp32."""
    policy: Any = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    reference: Any = AutoModelForCausalLM.from_pretrained(reference_path, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(policy_path)
    ends = frozenset({tokenizer.eos_token_id})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, betas=betas, weight_decay=0.0)

    def next_logits(model: Any) -> Callable[[Any], torch.Tensor]:
        return lambda tokens: model(torch.tensor([list(tokens)])).logits[0, -1]

    @torch.no_grad()
    def sample(pair_plan: PairPlan, coefficient: float, seed: int) -> SampledResponse:
        tokens, logprobs = sample_response(
            next_logits(policy),
            next_logits(reference),
            pair_plan.prompt.token_ids,
            coefficient=coefficient,
            seed=seed,
            max_new_tokens=max_new_tokens,
            end_token_ids=ends,
        )
        return SampledResponse(
            token_ids=tokens,
            text=tokenizer.decode(tokens, skip_special_tokens=True),
            coefficient=coefficient,
            logprobs=logprobs,
            versions=(VersionSpan(version=0, start=0, end=len(tokens)),),
            finish_reason=FinishReason.STOP if tokens[-1] in ends else FinishReason.LENGTH,
        )

    def log_prob(model: Any, pair_plan: PairPlan, response: SampledResponse) -> torch.Tensor:
        prompt = pair_plan.prompt.token_ids
        logits = model(torch.tensor([prompt + response.token_ids])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(response.token_ids)[:, None]).sum()

    losses = []
    for step in range(steps):
        pairs = []
        for index in range(step * batch_pairs, (step + 1) * batch_pairs):
            p = plan(index)
            a, b = sample(p, p.coefficient_a, p.seed_a), sample(p, p.coefficient_b, p.seed_b)
            pairs.append(ResponsePair(plan=p, a=a, b=b))
        labels = await oracle.label(pairs)
        inputs = PreferenceInputs(
            policy_a=torch.stack([log_prob(policy, x.plan, x.a) for x in pairs]),
            policy_b=torch.stack([log_prob(policy, x.plan, x.b) for x in pairs]),
            reference_a=torch.stack([log_prob(reference, x.plan, x.a) for x in pairs]).detach(),
            reference_b=torch.stack([log_prob(reference, x.plan, x.b) for x in pairs]).detach(),
            length_a=torch.tensor([float(len(x.a.token_ids)) for x in pairs]),
            length_b=torch.tensor([float(len(x.b.token_ids)) for x in pairs]),
            probability=torch.tensor([float(label.probability or 0.0) for label in labels]),
            weight=torch.tensor([x.loss_weight for x in pairs]),
        )
        value = LOSSES[loss](inputs, beta=beta).loss.mean()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        optimizer.step()
        losses.append(float(value.detach()))
    return losses
