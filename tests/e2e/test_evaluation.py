"""`pilaf-ray evaluate` on tiny random models, beside an independent computation."""

from pathlib import Path

import pytest
import torch

from pilaf_ray import build
from pilaf_ray.config.loader import load_config
from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.errors import ConfigError, ModelError, PromptError
from pilaf_ray.evaluation_run import REFERENCE, evaluate, table
from pilaf_ray.oracle.sentiment import score

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return make_tiny_llama(root / "policy", seed=0), make_tiny_llama(root / "reference", seed=1)


def sequence_logprob(network: torch.nn.Module, prompt: tuple[int, ...], response: list[int]) -> float:
    with torch.no_grad():
        logits = network(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum())


def test_evaluation_is_deterministic_and_agrees_with_transformers(models: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    policy_path, reference_path = models
    overrides = [f"model.policy={policy_path}", f"model.reference={reference_path}"]

    def run() -> object:
        return evaluate([policy_path], config=TINY, overrides=overrides, prompts=6)

    first, second = run(), run()
    assert first == second
    result = first.results["policy"]  # type: ignore[attr-defined]
    config = load_config(TINY, [*overrides, "evaluation.prompts=6"])
    prompts = [prompt for prompt in build.build_inputs(config).evaluation.prompts for _ in range(2)]
    policy, reference = (AutoModelForCausalLM.from_pretrained(path).double() for path in models)
    for number, prompt in enumerate(prompts):
        tokens = result.token_ids[number]
        kl = sequence_logprob(policy, prompt.token_ids, tokens) - sequence_logprob(reference, prompt.token_ids, tokens)
        assert result.kls[number] == pytest.approx(kl, abs=2e-3)
    assert result.rewards == pytest.approx([4.0 * value for value in score(result.prompts, result.responses)])
    assert first.policies[REFERENCE].kl.value == pytest.approx(0.0, abs=1e-3)  # type: ignore[attr-defined]
    assert table(first).row_count == 12  # type: ignore[arg-type]


def test_bad_input_is_one_clear_line_before_anything_starts(models: tuple[Path, Path], tmp_path: Path) -> None:
    policy, _ = models
    own = [f"model.policy={policy}"]
    with pytest.raises(PromptError, match="asked for 5000 held-out prompts"):
        evaluate([policy], config=TINY, overrides=own, prompts=5000)
    with pytest.raises(ConfigError, match="belongs to no run"):
        evaluate([policy], config=None)
    with pytest.raises(ConfigError, match="--judge"):
        evaluate([policy], config=TINY, overrides=own, judge="{type: oracle}")
    other = make_tiny_llama(tmp_path / "other", seed=0, vocab=500)
    with pytest.raises(ModelError, match="vocab_size"):
        evaluate([other], config=TINY, overrides=own)
    with pytest.raises(ModelError, match="there is no model"):
        evaluate([policy], config=TINY, overrides=[*own, f"model.reference={tmp_path / 'gone'}"])
