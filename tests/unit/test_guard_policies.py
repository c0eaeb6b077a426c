"""What becomes of a whole run when a guard speaks, one policy after the other; its roles compute nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_run import Outcome, train
from pairs import label, pair, reference
from sqlalchemy import create_engine, text
from webhook_inbox import open_inbox

from pilaf_ray.config.loader import load_config
from pilaf_ray.errors import (
    GivenUpError,
    GuardError,
    NonFiniteLossError,
    PauseError,
    RewardModelError,
    RollbackError,
)
from pilaf_ray.observability.sinks import EventLog
from pilaf_ray.pipeline.controller import STOPPED
from pilaf_ray.pipeline.guards import Alarm
from pilaf_ray.run_guards import RunGuards
from pilaf_ray.types import LabeledPair, StepResult

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SPIKE = "step 3: loss is 9, 9 times the median of the 1 steps before; guards.loss_spike.limit is 5"


@pytest.fixture(autouse=True)
def no_cluster(forbid_ray: Callable[[], None]) -> None:
    """Ray has been imported with the roles' types."""
    forbid_ray()


def spike(policy: str) -> str:
    return f"guards.loss_spike={{limit: 5, window: 1, policy: {policy}}}"


def states(outcome: Outcome) -> dict[str, list[str]]:
    """Ids of the pairs in each state, in plan order."""
    engine = create_engine(f"sqlite:///{outcome.folder / 'preferences.db'}")
    found: dict[str, list[str]] = {}
    with engine.connect() as connection:
        for pair_id, state in connection.execute(text("SELECT pair_id, state FROM pairs ORDER BY plan_index")):
            found.setdefault(state, []).append(pair_id)
    engine.dispose()
    return found


def batches(outcome: Outcome, step: int) -> list[list[str]]:
    """The pairs of each attempt at a step."""
    return [ids for number, ids in outcome.learner.batches if number == step]


def test_warn_tells_and_goes_on(tmp_path: Path) -> None:
    run = train(tmp_path / "run", {3: [9.0]}, spike("warn"))
    assert (run.error, run.ended_by, run.steps) == (None, "run.max_steps", [1, 2, 3, 4])
    (event,) = run.events("guard")
    assert (event["guard"], event["policy"], event["step"]) == ("loss_spike", "warn", 3)
    assert event["message"] == f"{SPIKE} (policy: warn)"
    assert {state: len(ids) for state, ids in states(run).items()} == {"trained": 16}


def test_pause_saves_ends_and_says_why(tmp_path: Path) -> None:
    run = train(tmp_path / "run", {3: [9.0]}, spike("pause"))
    message = f"{SPIKE} (policy: pause)"
    assert (run.error, run.ended_by, run.steps) == (None, message, [1, 2, 3])
    assert run.terminal[-1] == f"stopped after step 3: {message}; continue with --resume"
    assert run.events("training ended")[-1]["by"] == message
    assert run.checkpoints[-1] == "step-000003", "not of a step that is due"
    again = train(tmp_path / "run", {4: [9.0]}, spike("pause"), resume=True)
    assert (again.error, again.ended_by, again.steps) == (None, "run.max_steps", [1, 2, 3, 4])
    assert again.learner.loaded == [3]
    assert len(again.events("guard")) == 1


def test_rollback_repeats_the_step_with_other_pairs(tmp_path: Path) -> None:
    run = train(tmp_path / "run", {4: [9.0]}, spike("rollback"), "run.max_steps=5")
    assert (run.error, run.ended_by, run.steps) == (None, "run.max_steps", [1, 2, 3, 4, 5])
    assert (run.learner.loaded, run.learner.rebuilt) == ([2], 1)
    first, second = batches(run, 4)
    assert not set(first) & set(second)
    assert batches(run, 3)[0] == batches(run, 3)[1], "only the pairs of the step that passed the limit are others"
    found = states(run)
    assert found["rejected"] == first and len(found["trained"]) == 20


def test_a_step_that_passes_the_limit_whatever_its_pairs_are_ends_the_run(tmp_path: Path) -> None:
    run = train(tmp_path / "run", {3: [9.0] * 9}, spike("rollback"))
    assert isinstance(run.error, GivenUpError)
    assert f"policy learner failed 3 times in a row; first: {SPIKE} (policy: rollback)" in str(run.error)
    attempts = batches(run, 3)
    assert len(attempts) == len({id for ids in attempts for id in ids}) // 4 == 3
    assert states(run)["rejected"] == [*attempts[0], *attempts[1]]
    assert run.events("given up")[0]["role"] == "policy learner"


def test_stop_is_an_error_and_its_alert_is_not_lost(tmp_path: Path) -> None:
    with open_inbox() as inbox:
        run = train(tmp_path / "run", {3: [9.0]}, spike("stop"), f"guards.webhook={inbox.url}")
        told = list(inbox.posts)
    message = f"{SPIKE} (policy: stop)"
    assert isinstance(run.error, GuardError) and str(run.error) == message
    assert told == [
        {"run": "run", "event": "guard", "guard": "loss_spike", "policy": "stop", "step": 3, "message": message}
    ]
    assert run.checkpoints == ["step-000002"]


def test_guards_know_the_steps_before_a_resumption_and_people_hear_of_a_restart(tmp_path: Path) -> None:
    window = "guards.loss_spike={limit: 5, window: 2, policy: stop}"
    before = train(tmp_path / "run", {}, window, "run.max_steps=2")
    assert before.error is None
    EventLog(tmp_path / "run" / "events.jsonl").record("controller lost", cause="killed by SIGKILL", step=2)
    with open_inbox() as inbox:
        after = train(tmp_path / "run", {3: [9.0]}, window, f"guards.webhook={inbox.url}", resume=True)
        told = [post["message"] for post in inbox.posts]
    assert isinstance(after.error, GuardError)
    assert after.learner.loaded == [2] and after.steps == [1, 2, 3]
    assert sorted(told) == [
        "step 3: loss is 9, 9 times the median of the 2 steps before; guards.loss_spike.limit is 5 (policy: stop)",
        "the controller is there again (attempt 2): killed by SIGKILL",
    ]


NAN = "step 3: the loss is not finite"


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    run = train(tmp_path / "run", {3: [NonFiniteLossError(NAN)]})
    assert isinstance(run.error, NonFiniteLossError) and str(run.error) == NAN
    assert run.events("guard")[0]["message"] == f"{NAN} (guards.non_finite.policy: stop)"
    assert run.learner.rebuilt == 0


def test_a_loss_that_is_no_number_is_gone_back_from(tmp_path: Path) -> None:
    run = train(tmp_path / "run", {4: [NonFiniteLossError("step 4: nan")]}, "guards.non_finite.policy=rollback")
    assert (run.error, run.steps) == (None, [1, 2, 3, 4])
    assert (run.learner.loaded, run.learner.rebuilt) == ([2], 1)
    first, second = batches(run, 4)
    assert states(run)["rejected"] == first and not set(first) & set(second)


def test_going_back_from_losses_that_are_no_numbers_has_an_end(tmp_path: Path) -> None:
    losses: list[float | Exception] = [NonFiniteLossError(NAN) for _ in range(9)]
    run = train(tmp_path / "run", {3: losses}, "guards.non_finite.policy=rollback")
    assert isinstance(run.error, GivenUpError) and f"failed 3 times in a row; first: {NAN}" in str(run.error)
    assert len(batches(run, 3)) == 3


def test_a_loss_that_is_no_number_pauses_the_run_unsaved(tmp_path: Path) -> None:
    pause = "guards.non_finite.policy=pause"
    run = train(tmp_path / "run", {4: [NonFiniteLossError("step 4: nan")]}, pause)
    message = "step 4: nan (guards.non_finite.policy: pause)"
    assert (run.error, run.ended_by, run.steps) == (None, message, [1, 2, 3])
    assert run.terminal[-1] == f"stopped after step 3: {message}; continue with --resume"
    assert run.checkpoints == ["step-000002"]
    again = train(tmp_path / "run", {}, pause, resume=True)
    assert (again.error, again.ended_by, again.steps) == (None, "run.max_steps", [1, 2, 3, 4])
    assert batches(again, 4) == batches(run, 4), "nothing was set aside"
    assert again.ended_by != STOPPED


class Fails:
    """A learner beside a reward model: what goes wrong comes as a group."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def train_step(self, step: int, batch: Any) -> StepResult:
        raise ExceptionGroup("unhandled errors in a TaskGroup", [self.error])


async def test_of_a_group_the_first_cause_counts() -> None:
    told: list[Alarm] = []
    batch = [LabeledPair(pair=pair(3), label=label(3), reference=reference(3))]
    guards = RunGuards(load_config(TINY, ["guards.non_finite.policy=rollback"]), tell=told.append)
    with pytest.raises(RollbackError, match="nan"):
        await guards.over(Fails(NonFiniteLossError("nan"))).train_step(3, batch)
    assert guards.set_aside == [("pair-3", "nan (guards.non_finite.policy: rollback)")]
    with pytest.raises(ExceptionGroup):
        await guards.over(Fails(RewardModelError("collapsed"))).train_step(3, batch)
    assert [(alarm.guard, alarm.step) for alarm in told] == [("non_finite", 3)]
    guards = RunGuards(load_config(TINY, ["guards.non_finite.policy=pause"]), tell=told.append)
    with pytest.raises(PauseError, match="nan"):
        await guards.over(Fails(NonFiniteLossError("nan"))).train_step(3, batch)


def test_all_alarms_of_a_step_are_told_and_the_severest_is_obeyed() -> None:
    told: list[Alarm] = []
    paused: list[str] = []
    limits = [f"guards.{name}={{limit: 1, window: 1, policy: {policy}}}" for name, policy in (
        ("kl_runaway", "pause"), ("length_explosion", "warn"), ("loss_spike", "stop"))]  # fmt: skip
    guards = RunGuards(load_config(TINY, limits), tell=told.append)
    guards.look({"step": 1, "loss": 1.0, "kl/policy": 0.0, "response/tokens": 9.0}, [], pause=paused.append)
    guards.look({"step": 2, "loss": 1.0, "kl/policy": 2.0, "response/tokens": 19.0}, [], pause=paused.append)
    assert [alarm.guard for alarm in told] == ["kl_runaway", "length_explosion"]
    assert paused == [told[0].message]
    guards.look({"step": 2, "loss": 1.0, "kl/policy": 0.0, "response/tokens": 9.0}, [], pause=paused.append)
    with pytest.raises(GuardError, match="loss is 3"):
        guards.look({"step": 3, "loss": 3.0, "kl/policy": 2.0, "response/tokens": 9.0}, [], pause=paused.append)
    assert [alarm.guard for alarm in told[2:]] == ["loss_spike", "kl_runaway"] and len(paused) == 1
