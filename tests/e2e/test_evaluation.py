"""`pilaf-ray evaluate` on tiny random models, beside an independent computation."""

import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stub_judge import TEMPLATE, preference, stub_judge

from pilaf_ray import build, evaluation_run
from pilaf_ray.actors.generators import GeneratorPool
from pilaf_ray.config.loader import load_config
from pilaf_ray.data.tiny_models import make_tiny_gpt2, make_tiny_llama, make_tiny_reward_model
from pilaf_ray.errors import ConfigError, ModelError, PromptError
from pilaf_ray.evaluation.report import EvaluationResult
from pilaf_ray.evaluation_run import REFERENCE, Evaluation, evaluate, table
from pilaf_ray.oracle.sentiment import score

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
PROMPTS, SAMPLES = 6, 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return make_tiny_llama(root / "policy", seed=0), make_tiny_llama(root / "reference", seed=1)


@pytest.fixture(scope="module")
def reward_model(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_reward_model(models[0], tmp_path_factory.mktemp("reward"), seed=3)


def overrides(models: tuple[Path, Path]) -> list[str]:
    return [f"model.policy={models[0]}", f"model.reference={models[1]}"]


@pytest.fixture(scope="module")
def found(models: tuple[Path, Path]) -> Evaluation:
    """With the oracle of tiny.yaml, which is also the judge."""
    return evaluate([models[0]], config=TINY, overrides=overrides(models), prompts=PROMPTS)


@pytest.fixture(scope="module")
def judged(models: tuple[Path, Path], reward_model: Path) -> Evaluation:
    """The same policy and prompts, scored by a reward model and judged by a language model."""
    oracle = f"oracle={{type: reward_model, path: {reward_model}, micro_batch_size: 4}}"
    with stub_judge() as url:
        judge = f"{{type: judge, url: '{url}', model: any, template: '{TEMPLATE}', price_input: 2.0}}"
        return evaluate(
            [models[0]], config=TINY, overrides=[*overrides(models), oracle], prompts=PROMPTS, judge=judge
        )  # fmt: skip


def token_logprobs(network: torch.nn.Module, prompt: tuple[int, ...], response: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = network(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0].numpy()


def test_kl_and_reward_agree_with_transformers(found: Evaluation, models: tuple[Path, Path]) -> None:
    """Both KL estimators within 2e-3 nats: the engine computes in fp32 and here fp64 does."""
    from transformers import AutoModelForCausalLM

    result = found.results["policy"]
    config = load_config(TINY, [*overrides(models), f"evaluation.prompts={PROMPTS}"])
    prompts = [prompt for prompt in build.build_inputs(config).evaluation.prompts for _ in range(SAMPLES)]
    policy, reference = (AutoModelForCausalLM.from_pretrained(path).double() for path in models)
    both = [
        (token_logprobs(policy, prompt.token_ids, tokens), token_logprobs(reference, prompt.token_ids, tokens))
        for prompt, tokens in zip(prompts, result.token_ids, strict=True)
    ]
    kls = np.array([(p - r).sum() for p, r in both])
    assert result.kls == pytest.approx(kls, abs=2e-3)
    # The control variate, Σ (π_ref/π − 1), regressed out of the plain estimates.
    controls = np.array([np.expm1(r - p).sum() for p, r in both])
    assert result.kl_controls == pytest.approx(controls, rel=2e-3, abs=2e-3)
    adjusted = kls - np.polyfit(controls, kls, 1)[0] * controls
    assert found.policies["policy"].kl_low_variance.value == pytest.approx(adjusted.mean(), abs=2e-3)
    assert adjusted.std() <= kls.std()
    assert result.rewards == pytest.approx([4.0 * value for value in score(result.prompts, result.responses)])
    assert found.policies[REFERENCE].kl.value == pytest.approx(0.0, abs=1e-3)
    assert table(found).row_count == 12


def test_win_rates_are_shares_of_pairs_won(found: Evaluation, judged: Evaluation) -> None:
    """By the oracle without its noise, and by a language model that is asked in both orders."""

    def by_rewards(number: int) -> float:
        ours, theirs = (found.results[name].rewards[number] for name in ("policy", REFERENCE))
        return 0.5 * (1 + (ours > theirs) - (ours < theirs))

    def by_judge(number: int) -> float:
        prompt = judged.results["policy"].prompts[number]
        ours, theirs = (judged.results[name].responses[number] for name in ("policy", REFERENCE))
        first, second = preference(prompt, ours, theirs), preference(prompt, theirs, ours)
        return first if first == 1 - second else 0.5

    def check(evaluation: Evaluation, won: Callable[[int], float]) -> None:
        expected = float(np.mean([won(number) for number in range(PROMPTS * SAMPLES)]))
        rates = evaluation.win_rates
        ours, theirs = rates["policy"][REFERENCE], rates[REFERENCE]["policy"]
        assert ours is not None and theirs is not None
        assert (ours.value, theirs.value) == pytest.approx((expected, 1 - expected))
        assert ours.low <= expected <= ours.high

    check(found, by_rewards)
    check(judged, by_judge)
    verdicts = {by_judge(number) for number in range(PROMPTS * SAMPLES)}
    assert len(verdicts) > 1, "a test of one verdict only would show little"
    cost = judged.settings["judge_cost"]
    # Two questions a pair, however it is shown; equal texts are asked once.
    assert 0 < cost["calls"] <= 2 * PROMPTS * SAMPLES
    assert cost["money"] == pytest.approx(cost["calls"] * 10 * 2.0 / 1e6)
    assert found.settings["judge_cost"] is None


def test_a_reward_models_rewards_agree_with_transformers(judged: Evaluation, reward_model: Path) -> None:
    """One text at a time in fp64 and without padding; batches in fp32 are within 1e-4 of it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(reward_model)
    network = AutoModelForSequenceClassification.from_pretrained(reward_model).double().eval()

    def reward(prompt: str, response: str) -> float:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        with torch.no_grad():
            return float(network(**tokenizer(text, return_tensors="pt")).logits[0, 0])

    for name in ("policy", REFERENCE):
        result = judged.results[name]
        expected = [reward(p, y) for p, y in zip(result.prompts, result.responses, strict=True)]
        assert len({round(value, 3) for value in expected}) > 1
        assert result.rewards == pytest.approx(expected, abs=1e-4)
        assert judged.policies[name].reward.value == pytest.approx(np.mean(expected), abs=1e-4)


def test_the_same_seed_gives_the_same_responses_and_estimates(found: Evaluation, judged: Evaluation) -> None:
    """Two clusters and engines; only rewards have another judge."""

    def sampled(result: EvaluationResult) -> tuple[object, ...]:
        return result.prompts, result.token_ids, result.responses, result.kls, result.kl_controls, result.lengths

    for name in ("policy", REFERENCE):
        assert sampled(found.results[name]) == sampled(judged.results[name])
        for field in ("kl", "kl_low_variance", "length", "distinct_1", "distinct_2"):
            assert getattr(found.policies[name], field) == getattr(judged.policies[name], field)


def test_policies_share_an_engine_and_give_what_each_gives_alone(
    found: Evaluation, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """The third ends its responses with other tokens: the engine of the first two cannot serve it."""
    policies = [make_tiny_llama(tmp_path / "first", seed=2), models[0], make_tiny_llama(tmp_path / "ends", seed=2)]
    ends = json.loads((policies[2] / "config.json").read_text()) | {"eos_token_id": 5}
    (policies[2] / "config.json").write_text(json.dumps(ends))
    starts: list[Path] = []
    generators = evaluation_run._EvaluationJob._generators

    def counted(job: evaluation_run._EvaluationJob, policy: Path) -> Coroutine[Any, Any, GeneratorPool]:
        starts.append(policy)
        return generators(job, policy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_run._EvaluationJob, "_generators", counted)
        together = evaluate(policies, config=TINY, overrides=overrides(models), prompts=PROMPTS)
    assert starts == [policies[0], policies[2]]
    ours, alone = together.results["policy"], found.results["policy"]
    assert (ours.token_ids, ours.responses, ours.rewards) == (alone.token_ids, alone.responses, alone.rewards)
    assert ours.kls == pytest.approx(alone.kls, abs=1e-4)
    assert together.results["first"].token_ids != ours.token_ids


def test_bad_input_is_one_clear_line_before_anything_starts(models: tuple[Path, Path], tmp_path: Path) -> None:
    policy, _ = models
    own = [f"model.policy={policy}"]
    with pytest.raises(PromptError, match="asked for 5000 held-out prompts"):
        evaluate([policy], config=TINY, overrides=own, prompts=5000)
    with pytest.raises(ConfigError, match="belongs to no run"):
        evaluate([policy], config=None)
    with pytest.raises(ConfigError, match="--judge: give an oracle section"):
        evaluate([policy], config=TINY, overrides=own, judge="{type: oracle}")
    with pytest.raises(ConfigError, match="--judge: type: human asks people"):
        evaluate([policy], config=TINY, overrides=own, judge="{type: human}")
    other = make_tiny_llama(tmp_path / "other", seed=0, vocab=500)
    with pytest.raises(ModelError, match="vocab_size"):
        evaluate([other], config=TINY, overrides=own)
    gpt2 = make_tiny_gpt2(tmp_path / "gpt2", seed=0)
    with pytest.raises(ModelError, match=r"differ in architectures \(e.g. architectures: \['GPT2LMHeadModel'\] and \["):
        evaluate([gpt2], config=TINY, overrides=own)
    with pytest.raises(ModelError, match="there is no model"):
        evaluate([policy], config=TINY, overrides=[*own, f"model.reference={tmp_path / 'gone'}"])
