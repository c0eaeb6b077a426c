"""Every shipped configuration loads; every mistake is one helpful line."""

from pathlib import Path

import pytest

from pilaf_ray.config.loader import load_config
from pilaf_ray.config.reference import markdown
from pilaf_ray.data.demo_prompts import demo_prompts
from pilaf_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_load(path: Path) -> None:
    assert load_config(path).run.max_steps > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.learning_rte=1", "unknown key 'learner.learning_rte'; did you mean 'learning_rate'?"),
        ("generation.max_new_tokens=999", "exceeds model.max_length = 112"),
        ("sampler.type=nothing", "sampler"),
        ("learner.batch_pairs=0", "learner.batch_pairs: Input should be greater than or equal to 1"),
        ("algorithm.beta=1.5", "which must be below 1"),
        ("sampler={type: t_pilaf, beta: 1.0}", "sampler.t_pilaf.beta: Input should be less than 1"),
        ("sampler={type: best_of_n, n: 1}", "greater than or equal to 2"),
        ("algorithm={type: ppo}", "algorithm.type: ppo optimises the policy against a reward model: add a section"),
        ("algorithm={type: grpo, kl_estimator: k1}", "has a gradient of mean zero: set algorithm.kl_estimator: k3"),
        ("algorithm={type: rloo, group_size: 1}", "greater than or equal to 2"),
        ("algorithm={type: rloo, mini_batches: 3}", "does not divide algorithm.batch_prompts = 4"),
        (
            "algorithm={type: ppo, kl_controller: {type: adaptive, target: 5, horizon: 8}}",
            "horizon = 8 is shorter than a batch of algorithm.batch_prompts × algorithm.group_size = 16",
        ),
        ("algorithm={type: ppo, batch_prompts: 0}", "greater than or equal to 1"),
        ("reward_model={replay: {held_out: 1.0}}", "less than 1"),
        ("sampler={type: pilaf_reward}", "sampler.scorer: reward_model needs a reward model"),
        ("run.name='[a'x", "not valid YAML"),
        ("nonsense", "not of the form key=value"),
        ("run.name.x=1", "'name' is a value, not a section"),
    ],
)
def test_mistakes_are_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rollouts_need_the_policys_own_log_probabilities() -> None:
    overrides = ["algorithm={type: rloo}", "reward_model={}"]
    assert load_config(QUICKSTART, overrides).algorithm.beta == 0.05
    with pytest.raises(ConfigError, match=r"set generation.temperature and generation.top_p to 1"):
        load_config(QUICKSTART, [*overrides, "generation.temperature=0.7"])


def test_missing_file_is_said() -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(Path("nowhere.yaml"))


def test_configuration_page_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown()


def test_demo_prompts_are_distinct_and_disjoint() -> None:
    splits = {name: demo_prompts(name) for name in ("train", "evaluation", "final")}
    assert len(splits["train"]) >= 2000 and len(splits["evaluation"]) >= 200 and len(splits["final"]) >= 200
    everything = [text for texts in splits.values() for text in texts]
    assert len(set(everything)) == len(everything)


def test_empty_section_takes_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(QUICKSTART.read_text().replace("pipeline: {max_staleness_steps: 1}", "pipeline:"))
    assert load_config(file, ["pipeline.max_staleness_steps=3"]).pipeline.max_staleness_steps == 3


def test_departures_from_theory_are_named() -> None:
    assert load_config(QUICKSTART).departures_from_theory == []
    lines = load_config(QUICKSTART, ["sampler.beta=0.5", "generation.temperature=0.7"]).departures_from_theory
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler={type: t_pilaf}", "generation.temperature=0.7"], "sampler.type: t_pilaf reads π's log-prob"),
        (["sampler={type: best_of_n}", "generation.top_p=0.9"], "sampler.scorer: implicit_reward reads"),
        (["sampler={type: best_of_n, scorer: oracle}", "oracle.kind=compare"], "needs rewards of single responses"),
        (["sampler={type: t_pilaf}", "algorithm.beta=1.5"], "sampler.type: t_pilaf mixes with algorithm.beta = 1.5"),
    ],
)
def test_samplers_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, overrides)
