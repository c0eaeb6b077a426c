"""A reward model with several heads on DeepSpeed, beside a plain loop in PyTorch."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rank_processes import RankProcesses
from test_reward_learner import make, pairs, plain, plain_score, scoring_items

from pilaf_ray.data.tiny_models import make_tiny_llama, make_tiny_reward_model
from pilaf_ray.errors import CheckpointError
from pilaf_ray.sampling.identity import bootstrap_weights
from pilaf_ray.store.reading import LedgerReader
from pilaf_ray.types import TokenPair

HEADS, STEPS = 3, 4
TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def work(place: dict[str, Any], stage: int, model: Path, policy: Path, out: Path) -> dict[str, Any]:
    place = {**place, "zero_stage": stage}
    learner = make(model, out, policy=policy, heads=HEADS, head_learning_rate=1e-2, **place)
    batch, probe = pairs(6, seed=1), scoring_items(pairs(3, seed=2))
    found: dict[str, Any] = {"before": learner.score(probe)}
    found["steps"] = [learner.train_step(batch) for _ in range(STEPS)]
    found["after"] = learner.score(probe)
    learner.save(out)
    learner.train_step(batch)
    learner.load(out)
    found["restored"] = learner.score(probe)
    if place["world_size"] == 1:
        mean = make(model, out, policy=policy, heads=HEADS, pooling="mean", **place)
        found["pooled"] = mean.score(probe)
        with pytest.raises(CheckpointError, match=r"trained with reward_model\.heads: 3; now it is: 1: go on"):
            make(model, out, policy=policy, **place).load(out)
    return found


def run(*folders: Path, ranks: int, stage: int) -> dict[str, Any]:
    folders[-1].mkdir()
    with RankProcesses(ranks) as processes:
        return dict(processes.run(work, stage, *folders)[0])


def plain_loop(folder: Path) -> tuple[list[float], list[list[float]]]:
    """Losses of the steps and every head's scores after them; each pair by itself, each head by its own row."""
    network = plain(folder)
    rows = [torch.nn.Parameter(network.score.weight.detach()[0].clone()) for _ in range(HEADS)]
    trunk = list(network.base_model.parameters())
    groups = [{"params": trunk}, {"params": rows, "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def scores(item: TokenPair) -> list[torch.Tensor]:
        hidden = network.base_model(torch.tensor([[*item[0], *item[1]]])).last_hidden_state[0, -1]
        return [hidden @ row for row in rows]

    batch, losses = pairs(6, seed=1), []
    for _ in range(STEPS):
        loss = torch.zeros(())
        for item in batch:
            prompt, weights = item.pair.plan.prompt.token_ids, bootstrap_weights(item.pair_id, HEADS)
            a, b = scores((prompt, item.pair.a.token_ids)), scores((prompt, item.pair.b.token_ids))
            for head in range(HEADS):
                target = torch.tensor(item.probability)
                loss = loss + weights[head] * F.binary_cross_entropy_with_logits(a[head] - b[head], target)
        loss = loss / (HEADS * len(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*trunk, *rows], 1.0)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        probe = [(item.prompt.token_ids, item.token_ids) for item in scoring_items(pairs(3, seed=2))]
        return losses, [[float(score) for score in scores(item)] for item in probe]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    policy = make_tiny_llama(root / "policy", seed=0)
    return make_tiny_reward_model(policy, root / "reward"), policy


def test_heads_learn_from_their_own_bootstraps_as_in_a_plain_loop(models: tuple[Path, Path], tmp_path: Path) -> None:
    single = run(*models, tmp_path / "one", ranks=1, stage=0)
    losses, expected = plain_loop(models[0])
    assert [step.loss for step in single["steps"]] == pytest.approx(losses, abs=1e-4)
    before, after, restored = (single[name] for name in ("before", "after", "restored"))
    assert all(max(row) - min(row) < 1e-6 for row in before.heads), "heads begin as copies of the one that is there"
    for row, wanted in zip(after.heads, expected, strict=True):
        assert row == pytest.approx(wanted, abs=2e-3)
    spread = max(max(row) - min(row) for row in after.heads)
    assert spread > 0.02, "and part, because each sees other pairs"
    assert after.values == pytest.approx([sum(row) / HEADS for row in after.heads], rel=1e-9)
    assert restored == after
    # What is handed on is an ordinary reward model, whose one head gives the mean.
    network, probe = plain(tmp_path / "one" / "hf"), scoring_items(pairs(3, seed=2))
    assert network.config.num_labels == 1 and network.score.weight.shape[0] == 1
    with torch.no_grad():
        alone = [float(plain_score(network, (item.prompt.token_ids, item.token_ids))) for item in probe]
    assert alone == pytest.approx(after.values, abs=1e-4)
    # Pooled over the tokens too.
    assert all(max(row) - min(row) < 1e-6 for row in single["pooled"].heads)
    several = run(*models, tmp_path / "two", ranks=2, stage=2)
    for row, same in zip(several["after"].heads, after.heads, strict=True):
        assert row == pytest.approx(same, abs=2e-3)


@pytest.mark.long
def test_a_run_asks_people_where_heads_disagree(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Nobody answers, so the machine decides in the end; whom it was asked of first is in the log."""
    machine = "{type: function, target: 'pilaf_ray.oracle.sentiment:score'}"
    people = "{answer_seconds: 0.2, undo_seconds: 0}"
    mixture = f"{{type: mixture, machine: {machine}, people: {people}, share: 0, disagreement: 0.5}}"
    words = [f"run.folder={tmp_path}", "run.name=heads", f"model.policy={models[1]}", "run.max_steps=8"]
    words += [f"oracle={mixture}", f"evaluation.oracle={machine}", "console.serve=false"]
    words += ["reward_model={heads: 4, head_learning_rate: 0.01, batch_pairs: 4}"]
    subprocess.run([sys.executable, "-m", "pilaf_ray", "train", str(TINY), *words], check=True, timeout=500)
    log = (tmp_path / "heads" / "logs" / "latest" / "controller.log").read_text()
    asked = set(re.findall(r"pair (\w+): nobody answered.*; the machine decides", log))
    reader = LedgerReader(f"sqlite:///{tmp_path / 'heads' / 'preferences.db'}")
    trained = reader.trained_sample(32)
    first = {item.pair_id for item in reader.trained_at(1)}
    reader.close()
    assert len(trained) == 32 and {item.label.source for item in trained} == {"function"}
    # A new head has no opinion and cannot disagree; later about half of the pairs are among the upper half.
    assert not asked & first
    assert 3 <= len(asked & {item.pair_id for item in trained}) <= 24
