"""PPO, RLOO and GRPO on DeepSpeed beside plain loops in PyTorch, on one and on two ranks; checkpoints."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import plan
from rank_processes import RankProcesses

from pilaf_ray.data.made_pairs import made_response
from pilaf_ray.data.tiny_models import make_tiny_llama, make_tiny_reward_model
from pilaf_ray.observability.metrics import definition_of
from pilaf_ray.types import RewardScores, RolloutPlan, ScoredGroup

KL, CLIP, CAP, RATE = 0.3, 0.1, 1.5, 1e-3
Row = tuple[tuple[int, ...], tuple[int, ...], list[float], list[float], float]
"""Prompt, response, log-probabilities of the policy that sampled and of the reference, score."""


def rollouts() -> list[ScoredGroup]:
    generator = torch.Generator().manual_seed(5)

    def numbers(count: int) -> tuple[float, ...]:
        return tuple((-6.0 + torch.randn(count, generator=generator)).tolist())

    groups = []
    for index in range(4):
        responses = []
        for number in range(2):
            length = 3 + (index + 2 * number) % 4
            tokens = torch.randint(3, 500, (length,), generator=generator)
            responses.append(made_response(tokens.tolist(), logprobs=numbers(length)))
        groups.append(
            ScoredGroup(
                plan=RolloutPlan(group_id=str(index), index=index, prompt=plan(index).prompt, seeds=(0, 1)),
                responses=tuple(responses),
                scores=RewardScores(version=0, values=tuple(torch.randn(2, generator=generator).tolist())),
                reference_logprobs=tuple(numbers(len(r.token_ids)) for r in responses),
            )
        )
    return groups


def flat(groups: list[ScoredGroup]) -> list[Row]:
    return [
        (g.plan.prompt.token_ids, r.token_ids, list(r.logprobs), list(reference), score)
        for g in groups
        for r, reference, score in zip(g.responses, g.reference_logprobs, g.scores.values, strict=True)
    ]


def make(kind: str, place: dict[str, Any], model: Path, out: Path, **spread: Any) -> Any:
    from pilaf_ray.engines.rollout_learner import RolloutLearner
    from pilaf_ray.losses.rollout_targets import AdvantageSettings

    return RolloutLearner(
        model_path=str(model),
        **place,
        **{"precision": "float32", **spread},
        advantages=AdvantageSettings(
            kind=kind,  # type: ignore[arg-type]
            group_size=2,
            kl_in_reward=kind != "grpo",
            discount=0.97,
            trace_decay=0.9,
            whiten_advantages=kind == "ppo",
        ),
        kl_coefficient=KL,
        kl_target=4.0,
        kl_horizon=100.0,
        kl_estimator="k3",
        clip_low=CLIP,
        clip_high=CLIP,
        importance_cap=CAP,
        aggregation={"ppo": "token_mean", "rloo": "response_sum", "grpo": "response_mean"}[kind],  # type: ignore[arg-type]
        epochs=2,
        mini_batches=2,
        value={
            "model_path": str(model.parent / "critic"),
            "learning_rate": RATE,
            "head_learning_rate": 2 * RATE,
            "clip": 0.1,
            "layers": None,
            "trainable_layers": None,
        }
        if kind == "ppo"
        else None,
        optimizer={
            "learning_rate": RATE,
            "lr_schedule": "constant",
            "warmup_steps": 0,
            "total_steps": 8,
            "weight_decay": 0.0,
            "betas": (0.9, 0.95),
            "max_grad_norm": 1.0,
        },
        micro_batch_tokens=40,
        logprob_chunk_tokens=16,
        gradient_checkpointing=False,
        share_prompts=True,
        cpu_threads=1,
        seed=0,
        dump_folder=out / "failed",
    )


def work(place: dict[str, Any], kind: str, model: Path, out: Path, spread: dict[str, Any]) -> dict[str, Any]:
    learner = make(kind, place, model, out, **spread)
    groups = rollouts()
    items = [(prompt, response) for prompt, response, *_ in flat(groups)]
    found: dict[str, Any] = {"steps": [learner.train_rollouts(1, groups)], "after": learner.policy_logprobs(items)}
    learner.save(out)
    found["next"] = learner.train_rollouts(2, groups)
    alike = [replace(group, scores=RewardScores(version=0, values=(0.5, 0.5))) for group in groups]
    before = learner.policy_logprobs(items)
    stayed = learner.train_rollouts(3, alike)
    found["stayed"] = stayed.metrics["grad_norm"] == 0.0 and learner.policy_logprobs(items) == before
    learner.load(out)
    found["again"] = learner.train_rollouts(2, groups)
    if place["world_size"] == 1:
        found["expected"] = plain_step(kind, model, groups)
    return found


def plain_step(kind: str, model: Path, groups: list[ScoredGroup]) -> list[list[float]]:
    """Two passes of two optimiser steps, one response at a time, everything spelled out."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    critic: Any = AutoModelForSequenceClassification.from_pretrained(model.parent / "critic", dtype=torch.float32)
    rows = flat(groups)

    def logprobs(row: Row) -> torch.Tensor:
        prompt, response = row[0], row[1]
        logits = policy(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]

    def values(row: Row) -> torch.Tensor:
        hidden = critic.base_model(torch.tensor([[*row[0], *row[1]]])).last_hidden_state[0, len(row[0]) - 1 : -1]
        return critic.score(hidden)[:, 0]

    old = [logprobs(row).detach() for row in rows]
    old_values = [values(row).detach() for row in rows]
    advantages, returns = plain_advantages(kind, rows, old_values)
    body = [p for name, p in critic.named_parameters() if name != "score.weight"]
    critic_groups = [{"params": body}, {"params": [critic.score.weight], "lr": 2 * RATE}]
    policy_step, value_step = (
        torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
        for groups in (policy.parameters(), critic_groups)
    )
    for chosen in (range(0, 4), range(4, 8)) * 2:
        tokens = sum(len(rows[i][1]) for i in chosen)
        loss, value_loss = torch.zeros(()), torch.zeros(())
        for i in chosen:
            new = logprobs(rows[i])
            ratio = (new - old[i]).exp()
            weight = (old[i] - torch.tensor(rows[i][2])).exp().clamp(max=CAP)
            each = -weight * torch.minimum(ratio * advantages[i], ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[i])
            if kind == "grpo":
                gap = torch.tensor(rows[i][3]) - new
                each = each + KL * (gap.exp() - gap - 1)
            loss = loss + {"ppo": each.sum() / tokens, "rloo": each.sum() / 4, "grpo": each.mean() / 4}[kind]
            if kind == "ppo":
                value = values(rows[i])
                held = old_values[i] + (value - old_values[i]).clamp(-0.1, 0.1)
                worse = torch.maximum((value - returns[i]) ** 2, (held - returns[i]) ** 2)
                value_loss = value_loss + 0.5 * worse.sum() / tokens
        steps = [(loss, policy, policy_step)] + ([(value_loss, critic, value_step)] if kind == "ppo" else [])
        for total, network, optimizer in steps:
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
    with torch.no_grad():
        return [logprobs(row).tolist() for row in rows]


def plain_advantages(
    kind: str, rows: list[Row], old_values: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    kls = [torch.tensor(row[2]) - torch.tensor(row[3]) for row in rows]
    if kind != "ppo":
        whole = [row[4] - (KL * kl.sum().item() if kind == "rloo" else 0.0) for row, kl in zip(rows, kls, strict=True)]
        advantages = []
        for i in range(len(rows)):
            mine, other = whole[i], whole[i ^ 1]
            centred = mine - other if kind == "rloo" else (mine - other) / 2
            spread = 1.0 if kind == "rloo" else abs(mine - other) / 2**0.5 + 1e-4
            advantages.append(torch.full((len(rows[i][1]),), centred / spread))
        return advantages, []
    raw, returns = [], []
    for row, kl, value in zip(rows, kls, old_values, strict=True):
        rewards = -KL * kl
        rewards[-1] += row[4]
        running, found = 0.0, []
        for t in reversed(range(len(row[1]))):
            following = value[t + 1].item() if t + 1 < len(row[1]) else 0.0
            running = rewards[t].item() + 0.97 * following - value[t].item() + 0.97 * 0.9 * running
            found.insert(0, running)
        raw.append(torch.tensor(found))
        returns.append(torch.tensor(found) + value)
    everything = torch.cat(raw)
    centre, spread = everything.mean(), everything.std()
    return [(each - centre) / spread for each in raw], returns


def run(processes: RankProcesses, kind: str, model: Path, out: Path, **spread: Any) -> dict[str, Any]:
    out.mkdir()
    found: dict[str, Any] = processes.run(work, kind, model, out, {"zero_stage": 0, **spread})[0]
    return found


@pytest.fixture(scope="module")
def one() -> Iterator[RankProcesses]:
    with RankProcesses(1) as processes:
        yield processes


@pytest.fixture(scope="module")
def two() -> Iterator[RankProcesses]:
    with RankProcesses(2) as processes:
        yield processes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "policy"
    make_tiny_llama(folder, seed=0)
    make_tiny_reward_model(folder, folder.parent / "critic")
    return folder


@pytest.mark.parametrize("kind", ["ppo", "rloo", "grpo"])
def test_a_step_is_that_of_a_plain_loop(
    kind: str, one: RankProcesses, two: RankProcesses, model: Path, tmp_path: Path
) -> None:
    single = run(one, kind, model, tmp_path / "one")
    for ours, expected in zip(single["after"], single["expected"], strict=True):
        assert ours == pytest.approx(expected, abs=2e-3)
    assert single["stayed"], "where all scores are the same, nothing moves"
    assert single["again"] == single["next"], "weights, optimizers, values and the KL coefficient are restored"
    first, second = single["steps"][0].metrics, single["next"].metrics
    assert first["kl_coefficient"] == KL
    assert all(definition_of(f"train/{name}") for name in first)
    kl = sum(sum(row[2]) - sum(row[3]) for row in flat(rollouts())) / 8
    error = min(max(kl / 4.0 - 1.0, -0.2), 0.2)
    assert second["kl_coefficient"] == pytest.approx(KL * (1 + error * 8 / 100))
    assert 0.0 < second["clipped"] < 1.0 and 0.0 < first["truncated"] < 1.0
    # Critics are not parted along the sequence.
    spread = {"zero_stage": 2} if kind == "ppo" else {"zero_stage": 3, "sequence_parallel": 2}
    several = run(two, kind, model, tmp_path / "two", **spread)
    for ours, expected in zip(several["after"], single["after"], strict=True):
        assert ours == pytest.approx(expected, abs=2e-3)
    if kind == "ppo":
        assert (tmp_path / "one" / "value" / "hf" / "model.safetensors").exists()
        assert second["value_loss"] < first["value_loss"]
