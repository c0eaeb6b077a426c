"""Reductions, definitions, files and wandb against hand-computed numbers."""

import json
import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pilaf_ray.evaluation.step_metrics import busy_metrics, spent_before, step_metrics, total_costs
from pilaf_ray.observability.metric_table import METRICS, REWARD_METRICS
from pilaf_ray.observability.metric_types import Last, Max, Mean, Metric, Sum
from pilaf_ray.observability.metrics import definition_of, metrics_page, reduce_metrics
from pilaf_ray.observability.sinks import EventLog, JsonlSink
from pilaf_ray.observability.wandb_sink import WandbSink, has_wandb_login
from pilaf_ray.pipeline.budget import Spent
from pilaf_ray.pipeline.step_report import StepReport
from pilaf_ray.types import (
    FinishReason,
    LabeledPair,
    PairCost,
    PairDraw,
    PairPlan,
    PreferenceLabel,
    Prompt,
    ReferenceLogprobs,
    ResponsePair,
    SampledResponse,
    StepResult,
    VersionSpan,
)


def test_each_reduction() -> None:
    reduced = reduce_metrics(
        [
            Metric("reward/policy", Mean(1.0, 1)),
            Metric("reward/policy", Mean(4.0, 3)),
            Metric("age/max", Max(1)),
            Metric("age/max", Max(3)),
            Metric("age/max", Max(2)),
            Metric("time/wait", Sum(0.5)),
            Metric("time/wait", Sum(0.25)),
            Metric("train/grad_norm", Last(9.0)),
            Metric("train/grad_norm", Last(2.0)),
        ]
    )
    assert reduced == {"reward/policy": 3.25, "age/max": 3.0, "time/wait": 0.75, "train/grad_norm": 2.0}


def test_a_key_keeps_its_reduction_and_must_be_defined() -> None:
    with pytest.raises(ValueError, match="reduced by Mean, not by Sum"):
        reduce_metrics([Metric("reward/policy", Sum(1.0))])
    with pytest.raises(ValueError, match="'reward/polcy' has no definition"):
        reduce_metrics([Metric("reward/polcy", Mean(1.0))])


def test_keys_are_unique() -> None:
    keys = [definition.key for definition in METRICS]
    assert len(set(keys)) == len(keys)


def test_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text() == metrics_page(), "run: python -m pilaf_ray.observability.metrics > docs/metrics.md"


def response(coefficient: float, logprobs: tuple[float, ...], *versions: int, cut: bool) -> SampledResponse:
    spans = tuple(VersionSpan(version=v, start=i, end=i + 1) for i, v in enumerate(versions))
    return SampledResponse(
        token_ids=tuple(range(len(logprobs))),
        text="x",
        coefficient=coefficient,
        logprobs=logprobs,
        versions=spans,
        finish_reason=FinishReason.LENGTH if cut else FinishReason.STOP,
    )


def labeled(number: int, a: SampledResponse, b: SampledResponse, label: PreferenceLabel, draw: PairDraw) -> LabeledPair:
    plan = PairPlan(
        pair_id=str(number),
        index=number,
        prompt=Prompt(prompt_id="p", text="p", token_ids=(1,)),
        branch="on_policy" if a.coefficient == 0 else "interpolated",
        coefficient_a=a.coefficient,
        coefficient_b=b.coefficient,
        seed_a=0,
        seed_b=1,
        present_b_first=False,
        label_seed=2,
    )
    return LabeledPair(
        pair=ResponsePair(plan=plan, a=a, b=b, draw=draw),
        label=label,
        reference=ReferenceLogprobs(pair_id=str(number), a=-3.0, b=-5.0),
    )


LEARNER = {
    "margin": 0.2,
    "accuracy": 0.75,
    "chosen_logprob": -2.0,
    "rejected_logprob": -3.0,
    "chosen_reward": 0.1,
    "rejected_reward": -0.1,
    "grad_norm": 1.5,
    "loss_scale": 1024.0,
    "skipped": 0.0,
    "learning_rate": 1e-5,
}


def report() -> StepReport:
    pure = labeled(
        0,
        response(0.0, (-1.0, -1.5), 1, 2, cut=False),
        response(0.0, (-1.0, -1.0, -1.0), 1, cut=True),
        PreferenceLabel(pair_id="0", probability=1.0, source="s", reward_a=2.0, reward_b=-1.0),
        PairDraw(branch="on_policy", cost=PairCost(sequence_forwards=8, generated_tokens=40, labelled_responses=2)),
    )
    mixed = labeled(
        1,
        response(0.1, (-50.0,), 2, cut=False),
        response(-0.1, (-50.0,), 2, cut=False),
        PreferenceLabel(pair_id="1", probability=0.5, source="s", reward_a=9.0, reward_b=9.0),
        PairDraw(
            branch="interpolated",
            cost=PairCost(sequence_forwards=4, generated_tokens=2, scoring_forwards=3, labelled_responses=2),
            loss_weight=1.75,
            log_z_a=math.log(1.5),
            log_z_b=math.log(3.0),
        ),
    )
    return StepReport(
        result=StepResult(step=3, loss=0.6, metrics=LEARNER),
        batch=[pure, mixed],
        ages=[1, 0],
        wait_seconds=1.0,
        train_seconds=2.0,
        push_seconds=0.25,
        evaluation_seconds=0.75,
        sync_seconds=0.5,
        in_flight=7,
        spent=Spent(labels=12, generated_tokens=900, seconds=30.5),
    )


def test_metrics_of_a_step() -> None:
    assert step_metrics(report()) == pytest.approx(
        {
            "step": 3,
            "loss": 0.6,
            **{f"train/{name}": value for name, value in LEARNER.items()},
            # Mixed responses would say −47, −45 and a reward of 9; they are not samples of π.
            "reward/policy": 0.5,
            "kl/policy": ((-2.5 + 3.0) + (-3.0 + 5.0)) / 2,
            "age/mean": 0.5,
            "age/max": 1,
            "response/tokens": 7 / 4,
            "pairs/interpolated": 1,
            "pairs/weight_max": 1.75,
            "z/plus": 1.5,
            "z/minus": 3.0,
            "z/product": 4.5,
            "cost/sequence_forwards": 12,
            "cost/scoring_forwards": 3,
            "cost/generated_tokens": 42,
            "cost/labelled_responses": 4,
            "total/labels": 12,
            "total/generated_tokens": 900,
            "total/seconds": 30.5,
            "pairs/in_flight": 7,
            "time/wait": 1.0,
            "time/train": 2.0,
            "time/push": 0.25,
            "time/evaluation": 0.75,
            "time/sync": 0.5,
        }
    )


def test_costs_are_counted_once_and_totals_go_on_from_the_file(tmp_path: Path) -> None:
    again = step_metrics(replace(report(), is_first_use=False))
    assert [value for key, value in again.items() if key.startswith("cost/")] == [0, 0, 0, 0]
    assert total_costs([step_metrics(report()), again])["sequence_forwards"] == 12
    path = tmp_path / "metrics.jsonl"
    assert spent_before(path) == Spent()
    JsonlSink(path).write(step_metrics(report()))
    assert spent_before(path) == Spent(labels=12, generated_tokens=900, seconds=30.5)


def test_every_key_that_is_written_is_defined() -> None:
    roles = busy_metrics(dict.fromkeys(("generator", "reference", "oracle", "learner", "reward"), 0.5))
    written = set(step_metrics(report()) | roles) - {"step"}
    # Those of a reward model are seen to in test_reward_trainer.py and test_rollout_stream.py.
    assert written == {definition.key for definition in METRICS} - {definition.key for definition in REWARD_METRICS}
    assert definition_of("age/max").reduction is Max


def test_metrics_file_is_readable_after_every_step_and_can_be_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in (1, 2, 3):
        sink.write({"step": step, "loss": step / 2})
        assert json.loads(path.read_text().splitlines()[-1]) == {"step": step, "loss": step / 2}
    with path.open("a") as stream:
        stream.write('{"step": 4, "lo')  # killed while writing
    sink.cut_after(2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_events_have_a_time(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path).record("weights", version=3, note="ü\n")
    event = json.loads(path.read_text())
    assert event.pop("time") > 1.7e9
    assert event == {"event": "weights", "version": 3, "note": "ü\n"}


class FakeWandbError(Exception):
    pass


class FakeRun:
    def __init__(self, failing: bool) -> None:
        self.failing = failing
        self.logged: list[dict[str, Any]] = []
        self.defined: list[tuple[str, dict[str, Any]]] = []
        self.finished = False
        self.artifacts: list[tuple[FakeArtifact, list[str]]] = []

    def define_metric(self, name: str, **settings: Any) -> None:
        self.defined.append((name, settings))

    def log(self, row: dict[str, Any]) -> None:
        if self.failing:
            raise FakeWandbError("no route")
        self.logged.append(row)

    id = "r"

    def log_artifact(self, artifact: "FakeArtifact", aliases: list[str]) -> None:
        self.artifacts.append((artifact, aliases))

    def finish(self) -> None:
        self.finished = True


@dataclass
class FakeArtifact:
    name: str
    type: str
    metadata: dict[str, Any]
    files: list[str] = field(default_factory=list)

    def add_dir(self, folder: str) -> None:
        self.files += sorted(path.name for path in Path(folder).iterdir())


class FakeWandb:
    """Records what the sink asks of wandb."""

    Error = FakeWandbError
    Artifact = FakeArtifact

    def __init__(self, *, failing: bool = False) -> None:
        self.run = FakeRun(failing)
        self.settings: dict[str, Any] = {}

    def init(self, **settings: Any) -> FakeRun:
        self.settings = settings
        return self.run

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def Table(self, *, columns: list[str], data: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
        return columns, data


def sink_on(module: FakeWandb, folder: Path) -> WandbSink:
    return WandbSink(project="p", run_id="r", mode="offline", folder=folder, module=module)


def test_wandb_gets_steps_and_samples(tmp_path: Path) -> None:
    module = FakeWandb()
    sink = sink_on(module, tmp_path)
    sink.write({"step": 4, "loss": 0.5, "reward/policy": None})
    sink.write_samples(4, [{"prompt": "x", "response": "y"}, {"prompt": "z", "response": "w"}])
    sink.close()
    assert (module.settings["id"], module.settings["resume"], module.settings["mode"]) == (
        "r",
        "allow",
        "offline",
    )
    assert module.run.defined[1] == ("*", {"step_metric": "step"})
    assert module.run.logged == [
        {"step": 4, "loss": 0.5},
        {"step": 4, "samples": (["prompt", "response"], [["x", "y"], ["z", "w"]])},
    ]
    assert module.run.finished


def test_wandb_keeps_checkpoints_as_versions_of_one_artifact(tmp_path: Path) -> None:
    module = FakeWandb()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").touch()
    sink = sink_on(module, tmp_path)
    for step in (5, 10):
        sink.write_checkpoint(step, tmp_path / "hf")
    found = [(made.name, made.type, made.metadata, made.files, aliases) for made, aliases in module.run.artifacts]
    assert found == [("r-policy", "model", {"step": step}, ["model.safetensors"], [f"step-{step}"]) for step in (5, 10)]


def test_wandb_fails_once_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = sink_on(FakeWandb(failing=True), tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            sink.write({"step": step})
        sink.close()
    assert [record.message for record in caplog.records] == [
        "wandb failed, tracking is off from here on (metrics.jsonl goes on): no route"
    ]
    assert not sink.active


def test_wandb_disabled_touches_nothing(tmp_path: Path) -> None:
    module = FakeWandb()
    sink = WandbSink(project="p", run_id="r", mode="disabled", folder=tmp_path / "w", module=module)
    sink.write({"step": 1})
    sink.close()
    assert module.settings == {} and not (tmp_path / "w").exists()


def test_login_is_a_key_or_a_netrc_entry(tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai login user password k\n")
    file.chmod(0o600)
    assert has_wandb_login({"WANDB_API_KEY": "k"})
    assert has_wandb_login({"NETRC": str(file)})
    assert not has_wandb_login({"NETRC": str(file), "WANDB_BASE_URL": "https://tracker.example/x"})
    assert not has_wandb_login({"NETRC": str(tmp_path / "none")})
