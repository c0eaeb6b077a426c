"""The second stream: order, age, scores, failure; and the learner that is fed by both."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from pairs import response
from test_controller import World, controller

from pilaf_ray.build_rewards import RolloutPlanSource
from pilaf_ray.data.prompts import PromptSet
from pilaf_ray.errors import OracleError, PoisonPairError
from pilaf_ray.evaluation.rollout_metrics import rollout_metrics
from pilaf_ray.observability.metrics import definition_of
from pilaf_ray.pipeline.controller import Controller
from pilaf_ray.pipeline.policy_optimization import PolicyOptimizer
from pilaf_ray.pipeline.rollout_stream import MAX_SUBSTITUTES, RolloutStream
from pilaf_ray.pipeline.step_report import StepReport
from pilaf_ray.types import (
    GenerationRequest,
    LabeledPair,
    Prompt,
    RewardScores,
    SampledResponse,
    ScoredGroup,
    ScoringItem,
    StepResult,
    TokenPair,
)

PROMPTS = PromptSet(
    prompts=tuple(Prompt(prompt_id=f"p-{i}", text=f"prompt {i}", token_ids=(1, i)) for i in range(7)),
    dropped=0,
    truncated=0,
)
PLANS = RolloutPlanSource(prompts=PROMPTS, group_size=3, seed=0)


class Roles(World):
    """The controller's world, with r̂ and a reference that scores tokens."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.reward_version = 0
        self.groups: list[list[ScoredGroup]] = []
        self.taken: list[int] = []

    async def generate(self, request: GenerationRequest) -> SampledResponse:
        if not request.request_id.startswith("rollout-"):
            return await super().generate(request)
        version = self.version
        await self.wander()
        return response("text", version=version)

    async def score_tokens(self, items: Sequence[TokenPair], *, pairs: Sequence[str] = ()) -> list[list[float]]:
        await self.wander()
        return [[-1.0] * len(tokens) for _, tokens in items]

    async def train_rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> StepResult:
        await self.wander()
        self.groups.append(list(groups))
        self.events.append(f"train {step}")
        return StepResult(step=step, loss=0.0)

    async def take_in(self, step: int, pairs: Sequence[LabeledPair]) -> dict[str, float]:
        await self.wander()
        self.taken += [item.pair.plan.index for item in pairs]
        self.reward_version = step
        return {"reward_model/steps": 1.0}


class Reward:
    """r̂ of the roles above; the port's name ``score`` is taken by their reference."""

    def __init__(self, roles: Roles, fail: bool = False) -> None:
        self._roles, self._fail = roles, fail

    async def score(self, items: Sequence[ScoringItem]) -> RewardScores:
        version = self._roles.reward_version
        await self._roles.wander()
        if self._fail:
            raise OracleError("r̂ broke")
        return RewardScores(version=version, values=tuple(float(n) for n, _ in enumerate(items)))


def stream(roles: Roles, *, staleness: int, start: int = 0, steps: int = 30, fail: bool = False) -> RolloutStream:
    return RolloutStream(
        generator=roles,
        reference=roles,
        reward=Reward(roles, fail),
        plan=PLANS.plan,
        batch_prompts=2,
        max_staleness_steps=staleness,
        start_step=start,
        max_steps=steps,
    )


async def run(roles: Roles, *, staleness: int, steps: int = 30, start: int = 0, fail: bool = False) -> list[StepReport]:
    reports: list[StepReport] = []
    rollouts = stream(roles, staleness=staleness, start=start, steps=steps, fail=fail)
    async with rollouts.running():
        learner = PolicyOptimizer(learner=roles, rewards=roles, rollouts=rollouts)  # type: ignore[arg-type]
        running: Controller = controller(roles, reports, staleness=staleness, steps=steps, start=start)
        running._ports = _with_learner(running, learner)

        async def after_sync(step: int) -> None:
            rollouts.release()

        running._after_sync = after_sync
        await running.run()
    return reports


def _with_learner(running: Controller, learner: PolicyOptimizer) -> object:
    return replace(running._ports, learner=learner)


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
async def test_both_streams_keep_the_bound_and_their_order(staleness: int, seed: int) -> None:
    roles = Roles(seed=seed)
    reports = await run(roles, staleness=staleness)
    ages = [step - 1 - group.min_policy_version for step, groups in enumerate(roles.groups, 1) for group in groups]
    assert max(ages) <= staleness and min(ages) >= 0
    assert staleness == 0 or max(ages) > 0
    assert [group.plan.index for groups in roles.groups for group in groups] == list(range(60))
    assert roles.taken == list(range(120))
    assert max(age for report in reports for age in report.ages) <= staleness
    for report in reports:
        metrics = report.result.metrics
        assert metrics["rollouts/responses"] == 6 and metrics["rollouts/share"] == 6 / 14
        assert all(definition_of(key) for key in metrics if "/" in key)
    if staleness == 0:
        versions = [report.result.metrics["rollouts/reward_version"] for report in reports]
        assert versions == list(range(30)), "synchronous: scored by r̂ after the step before"
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_resumed_run_asks_for_the_rollouts_of_its_steps() -> None:
    whole, resumed = Roles(), Roles()
    await run(whole, staleness=0, steps=6)
    await run(resumed, staleness=0, steps=6, start=4)
    assert [g.plan for groups in resumed.groups for g in groups] == [
        g.plan for groups in whole.groups[4:] for g in groups
    ]


async def test_what_stops_the_sampling_stops_the_run() -> None:
    async with asyncio.timeout(5):
        with pytest.raises(OracleError, match="r̂ broke"):
            await run(Roles(), staleness=1, fail=True)
    assert asyncio.all_tasks() == {asyncio.current_task()}


class Poisoned(Roles):
    """Groups by id kill generators (one response of theirs), or the reference."""

    def __init__(self, *, generator: set[str] = frozenset(), reference: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        super().__init__()
        self.kills = {"generator": generator, "reference": reference}
        self.cancelled = 0

    async def generate(self, request: GenerationRequest) -> SampledResponse:
        group = request.pair_id.removeprefix("rollout-")
        if request.pair_id.startswith("rollout-") and group in self.kills["generator"]:
            if request.request_id.endswith("-1"):
                raise PoisonPairError(f"pair {request.pair_id}: 2 generator replicas were lost over it (died)")
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        return await super().generate(request)

    async def score_tokens(self, items: Sequence[TokenPair], *, pairs: Sequence[str] = ()) -> list[list[float]]:
        (blamed,) = pairs
        if blamed.removeprefix("rollout-") in self.kills["reference"]:
            raise PoisonPairError(f"pair {blamed}: 2 reference replicas were lost over it (died)")
        return await super().score_tokens(items)


async def test_groups_that_replicas_die_of_are_set_aside_with_their_cause_and_replaced() -> None:
    end = 2 * 6  # groups of a run of six steps
    first, second = PLANS.plan(3), PLANS.plan(3 + end)
    other = PLANS.plan(8)
    roles = Poisoned(generator={first.group_id, second.group_id}, reference={other.group_id})
    events: list[dict[str, str]] = []
    rollouts = stream(roles, staleness=1, steps=6)
    rollouts._report = lambda event, **details: events.append({"event": event, **details})
    taken: list[ScoredGroup] = []
    async with asyncio.timeout(5), rollouts.running():
        for _ in range(6):
            taken += await rollouts.next_batch()
            rollouts.release()
    assert [group.plan.index for group in taken] == list(range(12)), "every step has its groups, in order"
    ids = [group.plan.group_id for group in taken]
    assert ids[3] == PLANS.plan(3 + 2 * end).group_id and ids[8] == PLANS.plan(8 + end).group_id
    assert [id_ for n, id_ in enumerate(ids) if n not in (3, 8)] == [
        PLANS.plan(n).group_id for n in range(12) if n not in (3, 8)
    ]
    assert roles.cancelled == 4, "the other responses of a poison group are called off"
    by_group = {event["group"]: event for event in events}
    assert set(by_group) == {first.group_id, second.group_id, other.group_id}
    assert by_group[first.group_id]["event"] == "rollouts set aside"
    assert by_group[first.group_id]["prompt"] == first.prompt.prompt_id
    assert "2 generator replicas were lost over it (died)" in by_group[first.group_id]["cause"]
    assert "2 reference replicas were lost" in by_group[other.group_id]["cause"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_where_no_group_is_survived_the_run_ends_with_the_cause() -> None:
    everything = {PLANS.plan(n * 4 + 1).group_id for n in range(1 + MAX_SUBSTITUTES)}
    rollouts = stream(Poisoned(generator=everything), staleness=0, steps=2)
    async with asyncio.timeout(5), rollouts.running():
        with pytest.raises(ExceptionGroup) as caught:
            await rollouts.next_batch()
    (error,) = caught.value.exceptions
    assert isinstance(error, PoisonPairError)
    assert "rollouts at index 1: replicas died of 9 groups one after the other" in str(error)
    assert "generator replicas were lost over it" in str(error)


def test_rollouts_have_an_order_and_seeds_of_their_own() -> None:
    plans = [PLANS.plan(index) for index in range(21)]
    assert len({seed for plan in plans for seed in plan.seeds}) == 63
    assert len({plan.group_id for plan in plans}) == 21
    for epoch in range(3):
        ids = {plan.prompt.prompt_id for plan in plans[7 * epoch : 7 * epoch + 7]}
        assert len(ids) == 7, "every prompt once an epoch"
    assert PLANS.plan(3) == plans[3]


def test_equal_scores_are_counted() -> None:
    def group(index: int, values: tuple[float, ...]) -> ScoredGroup:
        return ScoredGroup(
            plan=PLANS.plan(index),
            responses=tuple(response("x", version=index) for _ in values),
            scores=RewardScores(version=4 + index, values=values),
            reference_logprobs=((-0.5, -1.0),) * len(values),
        )

    found = rollout_metrics(3, [group(0, (1.0, 1.0)), group(1, (0.0, 2.0))], pairs=1)
    assert found["rollouts/equal_groups"] == 0.5
    assert found["rollouts/reward"] == 1.0 and found["rollouts/reward_spread"] == pytest.approx(0.5**0.5)
    assert found["rollouts/kl"] == pytest.approx(0.75) and found["rollouts/age_max"] == 2.0
    assert found["rollouts/reward_version"] == 4.0 and found["rollouts/share"] == pytest.approx(4 / 6)
    assert found["rollouts/stopped"] == 1.0 and found["rollouts/tokens"] == 2.0
