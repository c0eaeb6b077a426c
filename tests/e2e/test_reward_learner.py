"""The reward model on DeepSpeed: scores, steps and checkpoints beside plain transformers and PyTorch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairs import plan
from rank_processes import RankProcesses

from pilaf_ray.data.made_pairs import made_response
from pilaf_ray.data.tiny_models import make_tiny_llama, make_tiny_qwen2, make_tiny_reward_model
from pilaf_ray.types import (
    LabeledPair,
    PreferenceLabel,
    Prompt,
    ReferenceLogprobs,
    ResponsePair,
    ScoringItem,
    TokenPair,
)

GOOD = 77
"""The token whose number in a response is its known reward."""
TEXT = "some text"


def pairs(count: int, *, seed: int) -> list[LabeledPair]:
    """Pairs with the soft Bradley–Terry label of a known reward: 0.5 for each GOOD among eight tokens."""
    generator = torch.Generator().manual_seed(seed)

    def side(length: int = 8) -> tuple[int, ...]:
        words = torch.randint(100, 400, (8,), generator=generator)
        words[torch.rand(8, generator=generator) < torch.rand(1, generator=generator)] = GOOD
        return tuple(words[:length].tolist())

    items = []
    for index in range(count):
        a, b = side(), side(5 + index % 4)
        difference = 0.5 * (a.count(GOOD) - b.count(GOOD))
        probability = float(torch.sigmoid(torch.tensor(difference)))
        items.append(
            LabeledPair(
                pair=ResponsePair(plan=plan(index), a=made_response(a, text=TEXT), b=made_response(b, text=TEXT)),
                label=PreferenceLabel(pair_id=f"pair-{index}", probability=probability, source="test"),
                reference=ReferenceLogprobs(pair_id=f"pair-{index}", a=0.0, b=0.0),
            )
        )
    return items


def make(model: Path, out: Path, *, policy: Path | None = None, **options: Any) -> Any:
    from pilaf_ray.engines.reward_learner import RewardLearner

    settings = {"zero_stage": 1, "learning_rate": 1e-3, "micro_batch_tokens": 64} | options
    return RewardLearner(
        model_path=str(model),
        policy_path=str(policy or model),
        precision="float32",
        dump_folder=out / "failed",
        **settings,
    )


def scoring_items(batch: list[LabeledPair]) -> list[ScoringItem]:
    return [
        ScoringItem(prompt=item.pair.plan.prompt, token_ids=side.token_ids, text=side.text)
        for item in batch
        for side in (item.pair.a, item.pair.b)
    ]


def plain(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


def plain_score(network: Any, item: TokenPair) -> torch.Tensor:
    """transformers' own pooling: one row without padding is read at its last token."""
    return network(input_ids=torch.tensor([[*item[0], *item[1]]])).logits[0, 0]


def agree(place: dict[str, Any], stage: int, model: Path, out: Path) -> dict[str, Any]:
    """Steps and scores of one rank, and on a single rank those of a plain loop."""
    learner = make(model.parent / "reward", out, policy=model, zero_stage=stage, **place)
    batch, probe = pairs(6, seed=1), scoring_items(pairs(3, seed=2))
    learner.save(out)
    found: dict[str, Any] = {"before": learner.score(probe), "steps": [learner.train_step(batch) for _ in range(3)]}
    found["after"] = learner.score(probe)
    learner.load(out)
    found["restored"] = learner.score(probe)
    found["again"] = learner.train_step(batch)
    if place["world_size"] == 1:
        found["expected"] = plain_loop(out / "hf", batch, probe)
    return found


def plain_loop(folder: Path, batch: list[LabeledPair], probe: list[ScoringItem]) -> dict[str, Any]:
    network = plain(folder)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def scores() -> list[float]:
        with torch.no_grad():
            return [float(plain_score(network, (item.prompt.token_ids, item.token_ids))) for item in probe]

    found: dict[str, Any] = {"before": scores(), "losses": [], "margins": []}
    for _ in range(3):
        margins = torch.stack(
            [
                plain_score(network, (i.pair.plan.prompt.token_ids, i.pair.a.token_ids))
                - plain_score(network, (i.pair.plan.prompt.token_ids, i.pair.b.token_ids))
                for i in batch
            ]
        )
        targets = torch.tensor([i.label.probability for i in batch])
        loss = F.binary_cross_entropy_with_logits(margins, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        found["losses"].append(loss.item())
        found["margins"].append(margins.tolist())
    found["after"] = scores()
    return found


def recover(place: dict[str, Any], stage: int, model: Path, out: Path) -> dict[str, Any]:
    """Train on synthetic pairs, then look at pairs that were never seen; and once the last layer alone."""
    partly = make(model, out, trainable_layers=1, **place)
    lower = {n: p.clone() for n, p in partly._engine.network.named_parameters() if not p.requires_grad}
    top = {n: p.clone() for n, p in partly._engine.network.named_parameters() if p.requires_grad}
    for _ in range(2):  # the head is zero at first, and lets no gradient through
        partly.train_step(pairs(16, seed=1))
    after = dict(partly._engine.network.named_parameters())
    learner = make(model, out, micro_batch_tokens=1024, **place)
    mean = make(model.parent / "reward", out, policy=model, pooling="mean", **place)
    probe = scoring_items(pairs(3, seed=2))
    network = plain(model.parent / "reward")
    pooled = []
    for item in probe:
        with torch.no_grad():
            tokens = torch.tensor([[*item.prompt.token_ids, *item.token_ids]])
            hidden = network.base_model(tokens).last_hidden_state[0, len(item.prompt.token_ids) :]
            pooled.append(float(network.score(hidden).mean()))
    blank = set(learner.score(scoring_items(pairs(4, seed=1))).values)
    for step in range(120):
        learner.train_step(pairs(32, seed=100 + step))
    held_out = pairs(64, seed=9)
    scores = learner.score(scoring_items(held_out)).values
    return {
        "margins": [a - b for a, b in zip(scores[0::2], scores[1::2], strict=True)],
        "known": [0.5 * (i.pair.a.token_ids.count(GOOD) - i.pair.b.token_ids.count(GOOD)) for i in held_out],
        "blank": blank,
        "pooled": (mean.score(probe).values, pooled),
        "frozen": all(torch.equal(value, after[name]) for name, value in lower.items()),
        "trained": not any(torch.equal(value, after[name]) for name, value in top.items()),
        "names": sorted(lower),
    }


def retokenise(place: dict[str, Any], stage: int, model: Path, policy: Path, out: Path) -> dict[str, Any]:
    """r̂ with a vocabulary of its own reads texts."""
    from transformers import AutoTokenizer

    learner = make(model, out, policy=policy, layers=1, **place)
    prompt = Prompt(prompt_id="p", text="Name a film.", token_ids=(9, 9, 9))
    texts = ["A long good answer.", "", "Rain"]
    scores = learner.score([ScoringItem(prompt=prompt, token_ids=(7,) * (n + 1), text=t) for n, t in enumerate(texts)])
    learner.save(out)
    tokenizer = AutoTokenizer.from_pretrained(model)
    before = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt.text}], add_generation_prompt=True, return_dict=False
    )
    network = plain(out / "hf")
    assert network.config.num_hidden_layers == 1, "a reward model that was cut is saved as a model of so many layers"
    expected = []
    for text in texts:
        after = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            expected.append(float(plain_score(network, (tuple(before), tuple(after)))))
    return {"scores": scores.values, "expected": expected}


TASKS: dict[str, Any] = {"agree": agree, "recover": recover, "retokenise": retokenise}


def run(task: str, *folders: Path, ranks: int = 1, stage: int = 1) -> dict[str, Any]:
    folders[-1].mkdir()
    with RankProcesses(ranks) as processes:
        return processes.run(TASKS[task], stage, *folders)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "policy"
    make_tiny_llama(folder, seed=0)
    make_tiny_reward_model(folder, folder.parent / "reward")
    return folder


def test_steps_and_scores_are_those_of_a_plain_loop_on_any_number_of_ranks(model: Path, tmp_path: Path) -> None:
    single = run("agree", model, tmp_path / "one", stage=0)
    expected = single["expected"]
    assert single["before"].values == pytest.approx(expected["before"], abs=1e-4)
    assert [step.loss for step in single["steps"]] == pytest.approx(expected["losses"], abs=1e-4)
    for step, margins in zip(single["steps"], expected["margins"], strict=True):
        assert step.margins == pytest.approx(margins, abs=5e-4)
    assert single["after"].values == pytest.approx(expected["after"], abs=2e-3)
    assert [step.version for step in single["steps"]] == [1, 2, 3]
    assert (single["before"].version, single["after"].version, single["restored"].version) == (0, 3, 0)
    assert single["restored"].values == single["before"].values
    assert single["again"] == single["steps"][0]
    several = run("agree", model, tmp_path / "two", ranks=2, stage=2)
    assert several["after"].values == pytest.approx(single["after"].values, abs=2e-3)
    assert several["steps"][0].margins == pytest.approx(single["steps"][0].margins, abs=1e-4)
    assert several["steps"][0].grad_norm == pytest.approx(single["steps"][0].grad_norm, rel=1e-4)


def test_known_rewards_are_recovered_and_lower_layers_can_stay(model: Path, tmp_path: Path) -> None:
    found = run("recover", model, tmp_path / "out")
    margins, known = torch.tensor(found["margins"]), torch.tensor(found["known"])
    decided = known.abs() >= 1.0
    assert ((margins > 0) == (known > 0))[decided].float().mean() > 0.9
    # Not the order only: the slope of r̂'s differences on the known ones is that of the log-odds.
    slope = (margins * known).sum() / known.square().sum()
    assert slope == pytest.approx(1.0, abs=0.25)
    ours, expected = found["pooled"]
    assert ours == pytest.approx(expected, abs=1e-4)
    assert found["blank"] == {0.0}, "a new head has no opinion"
    assert found["frozen"] and found["trained"]
    assert any("embed" in name for name in found["names"]) and not any("layers.1" in name for name in found["names"])


def test_a_reward_model_with_another_vocabulary_reads_texts(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_tiny_qwen2(tmp_path / "base", seed=3, vocab=400)
    make_tiny_reward_model(tmp_path / "base", other)
    found = run("retokenise", other, model, tmp_path / "out")
    assert found["scores"] == pytest.approx(found["expected"], abs=1e-4)
    assert len(set(found["scores"])) == 3
