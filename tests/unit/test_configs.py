"""Every shipped configuration loads; every mistake is one helpful line."""

import re
from pathlib import Path

import pytest

from pilaf_ray.build import ROUND_ENDED, build_budget, with_round_reference, with_warm_start
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.reference import markdown
from pilaf_ray.data.demo_prompts import demo_prompts
from pilaf_ray.engines.checkpoint import CheckpointStore
from pilaf_ray.errors import CheckpointError, ConfigError
from pilaf_ray.pipeline.budget import Spent

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_load(path: Path) -> None:
    assert load_config(path).step_limit[0] > 0


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
        ("run.max_labels=0", "run.max_labels: a budget of 0 trains nothing: give more than 0, or leave max_labels out"),
        ("run.max_steps=0", "run.max_steps: a budget of 0 trains nothing"),
        ("run.max_seconds=0", "run.max_seconds: a budget of 0 trains nothing"),
        ("run.max_generated_tokens=-5", "run.max_generated_tokens: a budget of -5 trains nothing"),
        ("run.max_labels=7", "run.max_labels = 7 buys less than one batch of 8 pairs at 1 labels a pair: give 8"),
        ("schedule={type: iterative, rounds: 2, pairs_per_round: 12}", "no multiple of learner.batch_pairs = 8"),
        ("run={name: x}", "nothing ends the run: set run.max_steps"),
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


def test_a_rule_on_disagreement_needs_heads_that_can() -> None:
    mixture = "oracle={type: mixture, machine: {type: function, target: 'pilaf_ray.oracle.sentiment:score'}"
    overrides = [f"{mixture}, disagreement: 0.1}}", "evaluation.oracle={type: function, target: 'm:f'}"]
    for reward_model in ([], ["reward_model={}"]):
        with pytest.raises(ConfigError, match=r"oracle\.disagreement compares the heads") as caught:
            load_config(QUICKSTART, [*overrides, *reward_model])
        assert "set reward_model.heads to 2 or more" in str(caught.value) and "\n" not in str(caught.value)
    assert load_config(QUICKSTART, [*overrides, "reward_model.heads=2"]).reward_model is not None
    assert load_config(QUICKSTART, [f"{mixture}}}", overrides[1]]).reward_model is None


def test_turns_that_cannot_be_taken_are_one_line() -> None:
    shared = "resources={turns: true, generator: {colocate: g}, learner: {colocate: g}}"
    assert load_config(QUICKSTART, [shared]).resources.turns
    for overrides, message in (
        (["resources.turns=true"], "give resources.generator and resources.learner the same colocate"),
        ([shared, "resources.learner.colocate=other"], "give resources.generator and resources.learner the same"),
        (
            [shared, "learner.zero_stage=3", "learner.offload={optimizer: nvme, nvme_path: /tmp}"],
            "resources.turns moves the learner to the host",
        ),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(QUICKSTART, overrides)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"cannot serve algorithm\.type: rloo, whose steps wait for rollouts"):
        load_config(ROOT / "configs" / "rlhf-rloo.yaml", [shared])
    on_gpus = "resources={turns: true, generator: {gpus: 1, colocate: g}, learner: {gpus: 1, colocate: g}}"
    with pytest.raises(ConfigError, match=r"resources\.turns has them share: set weights\.transport: gloo"):
        load_config(QUICKSTART, [on_gpus, "weights.transport=nccl"])


def test_shared_memory_ends_at_the_node() -> None:
    nodes = "resources.nodes=[{count: 2, cpus: 4, memory_gib: 8}]"
    with pytest.raises(ConfigError, match=r"learner's node only, and resources\.nodes describes 2: set weights"):
        load_config(QUICKSTART, [nodes, "weights.transport=shared_memory"])
    load_config(QUICKSTART, [nodes.replace("count: 2", "count: 1"), "weights.transport=shared_memory"])


def test_missing_file_is_said() -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(Path("nowhere.yaml"))


def test_configuration_page_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown()


def test_a_row_of_the_configuration_page_is_one_line_of_three_cells() -> None:
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) > 300
    assert all(line.endswith(" |") and len(re.findall(r"(?<!\\)\|", line)) == 4 for line in rows)


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


def test_the_smallest_limit_is_the_last_step_and_is_named() -> None:
    rounds = "schedule={type: iterative, rounds: 3, pairs_per_round: 64, epochs: 2}"
    ranked = "sampler={type: best_of_n, n: 8, scorer: oracle}"
    assert load_config(QUICKSTART).step_limit == (30, "run.max_steps")
    assert load_config(QUICKSTART, ["run.max_labels=100"]).step_limit == (12, "run.max_labels")
    # An oracle that reads eight responses a pair spends four labels.
    assert load_config(QUICKSTART, ["run.max_labels=100", ranked]).step_limit == (3, "run.max_labels")
    assert load_config(QUICKSTART, ["run={name: x}", rounds]).step_limit == (48, "schedule.rounds")
    assert load_config(QUICKSTART, ["run={name: x, max_labels: 150}", rounds]).step_limit == (32, "run.max_labels")
    assert load_config(QUICKSTART, [rounds]).max_age_steps == 15
    with pytest.raises(ConfigError, match="must know the last step"):
        load_config(QUICKSTART, ["run={name: x, max_seconds: 9}", "learner.lr_schedule=linear"])


def test_a_warm_start_moves_the_policy_and_not_the_reference(tmp_path: Path) -> None:
    def checkpoint(step: int) -> Path:
        model = tmp_path / "other" / "checkpoints" / f"step-{step:06d}" / "learner" / "hf"
        model.mkdir(parents=True)
        (model / "config.json").write_text('{"model_type": "llama"}')
        (model / "tokenizer.json").write_text("{}")
        return model

    first = checkpoint(2)
    (tmp_path / "other" / "config.json").write_text('{"run": {}}')
    config = load_config(QUICKSTART, [f"model.init_from={tmp_path / 'other'}"])
    warm = with_warm_start(config)
    assert (warm.model.policy, warm.model.reference_path) == (str(first), config.model.policy)
    saved = tmp_path / "config.json"
    saved.write_text(warm.model_dump_json())
    later = checkpoint(4)
    assert with_warm_start(config).model.policy == str(later)
    assert with_warm_start(config, saved=saved).model.policy == str(first), "a resumed run keeps its own start"
    assert with_warm_start(load_config(QUICKSTART)) == load_config(QUICKSTART)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        with_warm_start(load_config(QUICKSTART, ["model.init_from=nowhere/at/all"]))


async def test_a_reset_reference_is_the_policy_of_the_rounds_beginning(tmp_path: Path) -> None:
    rounds = "schedule={type: iterative, rounds: 3, pairs_per_round: 16, epochs: 2, reset_reference: true}"
    config = load_config(QUICKSTART, ["run={name: x}", rounds])
    store = CheckpointStore(tmp_path, keep_last=5)

    async def write(folder: Path) -> None:
        (folder / "weights").write_text("w")

    for step in (3, 4, 6):
        await store.write(step, write)
    assert with_round_reference(config, store, step=3) == (config, 4)
    for step in (4, 6, 7):
        second, until = with_round_reference(config, store, step=step)
        assert second.model.reference_path == str(tmp_path / "step-000004" / "learner" / "hf") and until == 8
        assert second.model.policy == config.model.policy
    with pytest.raises(CheckpointError, match="missing or damaged"):
        with_round_reference(config, store, step=8)
    assert build_budget(config, spent=Spent(), until_step=8).ended_by(8) == ROUND_ENDED
    assert build_budget(config, spent=Spent(), until_step=12).ended_by(12) == "schedule.rounds"
    fixed = load_config(QUICKSTART, ["run={name: x}", rounds.replace("true", "false")])
    assert with_round_reference(fixed, store, step=6) == (fixed, None)


@pytest.mark.parametrize(
    ("overrides", "idle"),
    [
        (["checkpoint.keep_best=2"], True),
        (["checkpoint.keep_best=2", "evaluation.every_steps=7", "checkpoint.every_steps=5"], True),
        (["checkpoint.keep_best=2", "evaluation.every_steps=10", "checkpoint.every_steps=5"], False),
        (["evaluation.every_steps=0"], False),
    ],
)
def test_keeping_the_best_without_evaluations_is_said(overrides: list[str], idle: bool) -> None:
    config = load_config(ROOT / "configs" / "tiny.yaml", ["run.max_steps=30", *overrides])
    assert [line.startswith("checkpoint.keep_best = 2 has nothing to choose by") for line in config.idle_settings] == [
        True
    ] * idle
