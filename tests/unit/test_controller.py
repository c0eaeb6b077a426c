"""The controller's loops with hand-written roles: order, age, pacing, stop, failure, resumption."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
from pairs import label, pair, plan, response

from pilaf_ray.errors import OracleError, PoisonPairError, PromptError, RoleLostError, WeightSyncError
from pilaf_ray.pipeline.budget import RunBudget, Spent
from pilaf_ray.pipeline.candidate_scoring import ImplicitRewardScorer
from pilaf_ray.pipeline.controller import STOPPED, Controller
from pilaf_ray.pipeline.held_out import Due, Score
from pilaf_ray.pipeline.pair_sampling import CandidatePairs, PairSource
from pilaf_ray.pipeline.ports import Ports
from pilaf_ray.pipeline.replicas import ReplicaPool
from pilaf_ray.pipeline.schedule import IterativeSchedule, OnlineSchedule, Schedule
from pilaf_ray.pipeline.step_report import StepReport
from pilaf_ray.pipeline.supervision import SupervisionPolicy
from pilaf_ray.pipeline.turns import Turn, own_device
from pilaf_ray.sampling.candidates import choose_best_against_worst
from pilaf_ray.store.records import UnfinishedWork
from pilaf_ray.types import (
    GenerationRequest,
    LabeledPair,
    PairPlan,
    PairState,
    PreferenceLabel,
    ReferenceLogprobs,
    ResponsePair,
    SampledResponse,
    StepResult,
    TokenPair,
)


class World:
    """All roles at once. Each call yields to the loop a seeded, random number of times."""

    def __init__(
        self,
        *,
        seed: int = 0,
        abstain: frozenset[int] = frozenset(),
        refuse: frozenset[int] = frozenset(),
        silent: frozenset[int] = frozenset(),
        fail_at: int | None = None,
    ) -> None:
        self.random = random.Random(seed)
        self.version = 0
        self.trained: list[list[int]] = []
        self.events: list[str] = []
        self.states: dict[str, PairState] = {}
        self.abstain = abstain
        self.refuse, self.silent = refuse, silent
        self.reasons: dict[str, str] = {}
        self.fail_at = fail_at

    async def wander(self) -> None:
        for _ in range(self.random.randrange(12)):
            await asyncio.sleep(0)

    async def generate(self, request: GenerationRequest) -> SampledResponse:
        version = self.version
        await self.wander()
        pair_id, side = request.request_id.rsplit("-", 1)
        index = int(pair_id.removeprefix("pair-"))
        if index in self.refuse:
            raise PromptError("a prompt of 900 tokens does not fit")
        given = response("text", version=version, coefficient=request.coefficient)
        return replace(given, token_ids=(), logprobs=(), versions=()) if index in self.silent and side == "b" else given

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        await self.wander()
        if any(p.plan.index == self.fail_at for p in pairs):
            raise OracleError("the oracle broke")
        return [label(p.plan.index, None if p.plan.index in self.abstain else 1.0) for p in pairs]

    async def score(self, pairs: Sequence[ResponsePair]) -> list[ReferenceLogprobs]:
        await self.wander()
        return [ReferenceLogprobs(pair_id=p.plan.pair_id, a=0.0, b=0.0) for p in pairs]

    async def train_step(self, step: int, batch: Sequence[LabeledPair]) -> StepResult:
        await self.wander()
        self.trained.append([item.pair.plan.index for item in batch])
        self.events.append(f"train {step}")
        return StepResult(step=step, loss=1.0 / step)

    async def push(self, version: int) -> str:
        await self.wander()
        self.events.append(f"push {version}")
        return f"weights {version}"

    async def serve(self, version: int, update: str) -> None:
        assert update == f"weights {version}"
        await self.wander()
        self.version = version
        self.events.append(f"serve {version}")

    async def add_plans(self, plans: Sequence[PairPlan]) -> None:
        self.states |= {p.pair_id: PairState.PLANNED for p in plans}

    async def add_responses(self, pairs: Sequence[ResponsePair]) -> None:
        self.states |= {p.plan.pair_id: PairState.SAMPLED for p in pairs}

    async def add_labels(self, labels: Sequence[PreferenceLabel], references: Sequence[ReferenceLogprobs]) -> None:
        for given in labels:
            self.states[given.pair_id] = PairState.ABSTAINED if given.is_abstention else PairState.LABELED

    async def reject(self, pair_id: str, reason: str) -> None:
        assert self.states[pair_id] in (PairState.PLANNED, PairState.SAMPLED)
        self.states[pair_id] = PairState.REJECTED
        self.reasons[pair_id] = reason

    async def mark_trained(self, step: int, pair_ids: Sequence[str]) -> None:
        assert all(self.states[pair_id] == PairState.LABELED for pair_id in pair_ids)
        self.states |= dict.fromkeys(pair_ids, PairState.TRAINED)


def controller(
    world: World,
    reports: list[StepReport],
    *,
    staleness: int,
    steps: int = 50,
    start: int = 0,
    work: UnfinishedWork | None = None,
    next_index: int = 0,
    max_seconds: float | None = None,
    max_tokens: int | None = None,
    spent: Spent | None = None,
    pairs: PairSource | None = None,
    plans: Callable[[int], PairPlan] = plan,
    fail_fast: bool = False,
    schedule: Schedule | None = None,
    turn: Turn = own_device,
    evaluate: Due | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Controller:
    async def after_step(report: StepReport) -> None:
        reports.append(report)

    async def after_sync(step: int) -> None:
        world.events.append(f"served {step}")

    return Controller(
        ports=Ports(generator=world, reference=world, oracle=world, learner=world, store=world, weight_sync=world),
        plan=plans,
        next_index=next_index,
        schedule=schedule or OnlineSchedule(batch_pairs=4),
        budget=RunBudget(max_steps=steps, max_generated_tokens=max_tokens, max_seconds=max_seconds, spent=spent),
        max_staleness_steps=staleness,
        label_batch_pairs=3,
        start_step=start,
        after_step=after_step,
        after_sync=after_sync,
        **({} if evaluate is None else {"evaluate": evaluate}),
        unfinished=work,
        pairs=pairs,
        fail_fast=fail_fast,
        turn=turn,
        clock=clock,
    )


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(5))
async def test_no_trained_pair_is_older_than_the_bound(staleness: int, seed: int) -> None:
    ended = {"abstain": frozenset({3, 9, 10, 11, 40}), "refuse": frozenset({0, 21, 22}), "silent": frozenset({23, 77})}
    world, reports = World(seed=seed, **ended), []
    assert await controller(world, reports, staleness=staleness).run() == 50
    ages = [age for report in reports for age in report.ages]
    assert len(ages) == 200
    assert max(ages) == staleness, "the bound is kept, and reached"
    assert min(ages) >= 0


@pytest.mark.parametrize("staleness", [1, 2, 4])
async def test_a_long_response_holds_nobody_up_until_it_is_the_oldest_work_the_bound_allows(staleness: int) -> None:
    class LongTail(World):
        """Pair 4·S, of the batch that is planned furthest ahead, ends when every batch before it has been trained."""

        async def generate(self, request: GenerationRequest) -> SampledResponse:
            if request.request_id.startswith(f"pair-{4 * staleness}-"):
                while len(self.trained) < staleness:
                    await asyncio.sleep(0)
            return await super().generate(request)

    world, reports = LongTail(), []
    async with asyncio.timeout(5):
        assert await controller(world, reports, staleness=staleness, steps=3 * staleness).run() == 3 * staleness
    assert max(age for report in reports for age in report.ages) == staleness


async def test_batches_follow_the_plan_order_and_abstentions_are_replaced() -> None:
    world, reports = World(abstain=frozenset({1, 6})), []
    await controller(world, reports, staleness=1, steps=3).run()
    assert [i for batch in world.trained for i in batch] == [i for i in range(14) if i not in (1, 6)]
    assert sorted(world.states.values()).count(PairState.TRAINED) == 12
    assert len(world.states) == 14, "nothing is planned beyond what the steps need"
    for step in (1, 2, 3):
        places = [world.events.index(f"{word} {step}") for word in ("train", "push", "serve", "served")]
        assert places == sorted(places)


async def test_best_of_n_asks_the_oracle_for_one_comparison_a_pair() -> None:
    class Counting(World):
        compared = 0

        async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
            self.compared += len(pairs)
            return await super().label(pairs)

        async def score_responses(self, items: Sequence[TokenPair], *, pairs: Sequence[str] = ()) -> list[float]:
            await self.wander()
            return [-float(number) for number, _ in enumerate(items)]

    world, reports = Counting(), []
    source = CandidatePairs(world, scorer=ImplicitRewardScorer(world, beta=0.1), choose=choose_best_against_worst)
    planned = {index: replace(plan(index), candidate_seeds=tuple(range(8))) for index in range(12)}
    await controller(world, reports, staleness=1, steps=3, pairs=source, plans=planned.__getitem__).run()
    assert world.compared == 12
    draws = [item.pair.draw for report in reports for item in report.batch]
    assert {(d.candidate_a, d.candidate_b) for d in draws if d} == {(7, 0)}, "the reference likes it least, r_θ most"
    assert {(d.cost.sequence_forwards, d.cost.labelled_responses) for d in draws if d} == {(8, 2)}


async def test_candidates_that_kill_every_scorer_cost_their_pair_and_nothing_else() -> None:
    async def newcomer(number: int) -> int:
        return number

    async def gone(_replica: int) -> None: ...

    class Deadly(World):
        def __init__(self) -> None:
            super().__init__()
            self.replicas = ReplicaPool(
                "reference",
                [0, 1],
                replace=newcomer,
                end=gone,
                ping=None,
                policy=SupervisionPolicy(first_pause=0.0, failures_in_a_row=9),
            )

        async def score_responses(self, items: Sequence[TokenPair], *, pairs: Sequence[str] = ()) -> list[float]:
            async def work(_replica: int, _number: int) -> list[float]:
                await self.wander()
                if "pair-5" in pairs:
                    raise RoleLostError("the reference has died")
                return [-float(number) for number, _ in enumerate(items)]

            return await self.replicas.run(work, pairs=pairs)

    world, reports = Deadly(), []
    source = CandidatePairs(world, scorer=ImplicitRewardScorer(world, beta=0.1), choose=choose_best_against_worst)
    planned = {index: replace(plan(index), candidate_seeds=(0, 1)) for index in range(13)}
    async with asyncio.timeout(10):
        await controller(world, reports, staleness=1, steps=3, pairs=source, plans=planned.__getitem__).run()
    await world.replicas.close()
    assert world.trained == [[0, 1, 2, 3], [4, 6, 7, 8], [9, 10, 11, 12]]
    assert list(world.reasons) == ["pair-5"] and "reference replicas were lost over it" in world.reasons["pair-5"]


async def test_the_learner_steps_while_a_version_is_on_its_way_but_never_two_are() -> None:
    class SlowSync(World):
        async def serve(self, version: int, update: str) -> None:
            if version == 1:
                while "train 2" not in self.events:
                    await asyncio.sleep(0)
            await super().serve(version, update)

    world = SlowSync()
    async with asyncio.timeout(5):
        await controller(world, [], staleness=1, steps=6).run()
    assert world.events.index("train 2") < world.events.index("serve 1")
    for step in range(1, 6):
        assert world.events.index(f"served {step}") < world.events.index(f"push {step + 1}")


async def test_a_failed_sync_stops_the_run_while_the_learner_waits_for_pairs() -> None:
    class Broken(World):
        async def serve(self, version: int, update: str) -> None:
            raise WeightSyncError("no route to the generator")

    with pytest.raises(WeightSyncError, match="no route"):
        await controller(Broken(), [], staleness=0).run()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_stop_finishes_the_step_under_way() -> None:
    world, reports = World(), []
    running = controller(world, reports, staleness=1)

    async def stop_soon() -> None:
        while len(world.trained) < 3:
            await asyncio.sleep(0)
        running.request_stop("somebody asked")
        running.request_stop()

    stopper = asyncio.create_task(stop_soon())
    finished = await running.run()
    await stopper
    assert finished == len(reports) == len(world.trained)
    assert 3 <= finished < 50
    assert running.ended_by == "somebody asked"
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_evaluations_come_before_the_next_version_and_the_last_is_waited_for() -> None:
    world = World()

    async def sample(step: int) -> Score:
        await world.wander()
        assert world.version == step, "nothing newer is served meanwhile"
        world.events.append(f"evaluated {step}")
        return world.wander

    await controller(world, [], staleness=2, steps=6, evaluate=lambda step: partial(sample, step)).run()
    for step in range(1, 7):
        assert world.events.index(f"served {step}") < world.events.index(f"evaluated {step}")
    assert world.events[-1] == "evaluated 6"


async def test_scoring_holds_up_the_next_evaluation_only_and_the_last_is_waited_for() -> None:
    world = World()

    async def sample(step: int) -> Score:
        world.events.append(f"sampled {step}")

        async def score() -> None:
            while step == 3 and "served 5" not in world.events:
                await asyncio.sleep(0)
            await world.wander()
            world.events.append(f"scored {step}")

        return score

    async with asyncio.timeout(10):
        await controller(
            world, [], staleness=2, steps=9, evaluate=lambda step: None if step % 3 else partial(sample, step)
        ).run()
    order = [event for event in world.events if event.startswith(("sampled", "scored"))]
    assert order == [f"{what} {step}" for step in (3, 6, 9) for what in ("sampled", "scored")]
    assert world.events.index("served 5") < world.events.index("scored 3")
    assert world.events[-1] == "scored 9"


async def test_an_error_of_scoring_ends_the_run_as_itself() -> None:
    async def sample() -> Score:
        async def score() -> None:
            raise OracleError("no reward of step 1")

        return score

    with pytest.raises(OracleError, match="no reward of step 1"):
        await controller(World(), [], staleness=2, evaluate=lambda step: sample).run()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("staleness", [0, 1, 3])
async def test_how_far_training_goes_on_beside_an_evaluation(staleness: int) -> None:
    """One step of the learner, and generators as far ahead as the gate lets them; the wait is told apart."""
    world, reports, now, goes_on = World(), [], [0.0], asyncio.Event()

    async def sample() -> Score:
        world.events.append("evaluating 2")
        await goes_on.wait()
        return world.wander

    running = controller(
        world,
        reports,
        staleness=staleness,
        steps=6,
        evaluate=lambda step: sample if step == 2 else None,
        clock=lambda: now[0],
    )
    async with asyncio.timeout(10):
        task = asyncio.create_task(running.run())
        while "evaluating 2" not in world.events:
            await asyncio.sleep(0)
        for _ in range(2000):
            await asyncio.sleep(0)
        assert [event for event in world.events if event.startswith("train")] == ["train 1", "train 2", "train 3"]
        assert "push 3" not in world.events and world.version == 2
        # Two windows are done with; the gate has admitted all others that may be sampled under version 2.
        planned = 4 * min(6, 2 + staleness + 1)
        assert sum(state is not PairState.PLANNED for state in world.states.values()) == planned
        now[0] += 40.0
        goes_on.set()
        assert await task == 6
    assert [report.evaluation_seconds for report in reports] == [0.0, 0.0, 40.0, 0.0, 0.0, 0.0]
    assert all(report.push_seconds == report.wait_seconds == 0.0 for report in reports)


@pytest.mark.parametrize(("stuck", "last"), [("serve 2", 3), ("sampling 2", 3), ("scoring 2", 4)])
async def test_a_stop_waits_neither_for_a_pull_nor_for_an_evaluation(stuck: str, last: int) -> None:
    """Each would last for ever; the last step is trained meanwhile, and not handed out."""

    class Stuck(World):
        async def serve(self, version: int, update: str) -> None:
            await hang(f"serve {version}")
            await super().serve(version, update)

    async def hang(stage: str) -> None:
        if stuck == stage:
            world.events.append(f"stuck in {stuck}")
            await asyncio.Event().wait()

    async def sample(step: int) -> Score:
        await hang(f"sampling {step}")
        return partial(hang, f"scoring {step}")

    world, reports = Stuck(), []
    running = controller(world, reports, staleness=3, evaluate=lambda step: partial(sample, step))
    async with asyncio.timeout(10):
        task = asyncio.create_task(running.run())
        while f"train {last}" not in world.events or f"stuck in {stuck}" not in world.events:
            await asyncio.sleep(0)
        assert not running.is_stopping
        running.request_stop()
        assert (await task, running.ended_by, running.is_stopping) == (last, STOPPED, True)
    assert [report.result.step for report in reports] == list(range(1, last + 1))
    assert f"push {last}" not in world.events
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_no_evaluation_begins_once_a_stop_was_requested() -> None:
    """The step under way may need the weights that are on their way, so those are served."""
    evaluated = list[int]()

    class Slow(World):
        async def serve(self, version: int, update: str) -> None:
            if version == 2:
                while not running.is_stopping:
                    await asyncio.sleep(0)
            await super().serve(version, update)

        async def train_step(self, step: int, batch: Sequence[LabeledPair]) -> StepResult:
            if step == 3:
                running.request_stop()
                while "served 2" not in self.events:
                    await asyncio.sleep(0)
                for _ in range(20):
                    await asyncio.sleep(0)
            return await super().train_step(step, batch)

    async def sample(step: int) -> Score:
        evaluated.append(step)
        return world.wander

    world = Slow()
    running = controller(world, [], staleness=3, evaluate=lambda step: partial(sample, step))
    async with asyncio.timeout(10):
        assert await running.run() == 3
    assert evaluated == [1] and world.events[-1] == "train 3"


async def test_the_first_error_stops_everything_as_itself() -> None:
    world = World(fail_at=9)
    with pytest.raises(OracleError, match="the oracle broke"):
        await controller(world, [], staleness=1).run()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_unfinished_work_is_taken_up_in_plan_order() -> None:
    world, reports = World(), []
    ready = LabeledPair(pair=pair(4), label=label(4), reference=ReferenceLogprobs(pair_id="pair-4", a=0.0, b=0.0))
    work = UnfinishedWork(planned=[plan(6)], sampled=[pair(5), pair(7)], labeled=[ready])
    world.states = {f"pair-{i}": PairState.LABELED for i in (4,)}
    await controller(world, reports, staleness=1, start=1, steps=3, work=work, next_index=8).run()
    assert world.trained == [[4, 5, 6, 7], [8, 9, 10, 11]]


async def test_resumed_plans_wait_for_the_gate_so_a_synchronous_run_stays_synchronous() -> None:
    """Twelve planned pairs are left: sampled all at once they would reach age 2."""
    world, reports = World(), []
    work = UnfinishedWork(planned=[plan(i) for i in range(12)])
    await controller(world, reports, staleness=0, steps=3, work=work, next_index=12).run()
    assert {age for report in reports for age in report.ages} == {0}
    assert [i for batch in world.trained for i in batch] == list(range(12))


async def test_poison_pairs_are_rejected_and_replaced_wherever_they_kill() -> None:
    class Poisoned(World):
        async def generate(self, request: GenerationRequest) -> SampledResponse:
            if request.request_id.startswith("pair-2-"):
                raise PoisonPairError("generators die of it")
            return await super().generate(request)

        async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
            if any(p.plan.index == 9 for p in pairs):
                raise PoisonPairError("oracles die of one of these")
            return await super().label(pairs)

    world, reports = Poisoned(), []
    await controller(world, reports, staleness=1, steps=4).run()
    assert [i for batch in world.trained for i in batch] == [i for i in range(18) if i not in (2, 9)]
    assert [name for name, state in world.states.items() if state == PairState.REJECTED] == ["pair-2", "pair-9"]
    assert max(age for report in reports for age in report.ages) <= 1


async def test_an_oracle_that_never_answers_stops_the_run() -> None:
    world = World(abstain=frozenset(range(100_000)))
    with pytest.raises(OracleError, match="abstained from 256 pairs in a row"):
        await controller(world, [], staleness=1).run()


async def test_refused_and_empty_pairs_are_rejected_with_their_reason_and_replaced() -> None:
    world, reports = World(refuse=frozenset({1, 2}), silent=frozenset({6})), []
    running = controller(world, reports, staleness=1, steps=3)
    await running.run()
    assert [i for batch in world.trained for i in batch] == [i for i in range(15) if i not in (1, 2, 6)]
    assert world.reasons == {
        "pair-1": "a prompt of 900 tokens does not fit",
        "pair-2": "a prompt of 900 tokens does not fit",
        "pair-6": "side b came back without a token",
    }
    assert len(world.states) == 15, "nothing is planned beyond what the steps need"
    assert running.gate.in_flight == 0


async def test_with_fail_fast_a_refused_pair_ends_the_run() -> None:
    with pytest.raises(PromptError, match=r"pair-6 of prompt prompt-6 cannot be sampled.*900 tokens"):
        await controller(World(refuse=frozenset({6})), [], staleness=1, fail_fast=True).run()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_prompts_that_are_all_refused_end_the_run() -> None:
    with pytest.raises(PromptError, match=r"the 256\. in a row: a prompt of 900 tokens"):
        await controller(World(refuse=frozenset(range(100_000))), [], staleness=1).run()


async def test_time_limit_holds_while_waiting_for_an_oracle() -> None:
    class Silent(World):
        async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

    running = controller(Silent(), [], staleness=1, max_seconds=0.05)
    async with asyncio.timeout(5):
        assert await running.run() == 0
    assert running.ended_by == "run.max_seconds"


async def test_the_limit_that_is_reached_first_ends_the_run_and_is_named() -> None:
    """Each pair has 4 tokens, so a step of 4 pairs has 16."""
    by_steps = controller(World(), [], staleness=1, steps=3)
    assert (await by_steps.run(), by_steps.ended_by) == (3, "run.max_steps")
    reports: list[StepReport] = []
    by_tokens = controller(World(), reports, staleness=1, max_tokens=49)
    assert (await by_tokens.run(), by_tokens.ended_by) == (4, "run.max_generated_tokens")
    assert [r.spent.generated_tokens for r in reports if r.spent] == [16, 32, 48, 64]
    assert [r.spent.labels for r in reports if r.spent] == [4, 8, 12, 16]
    resumed = controller(World(), [], staleness=1, max_tokens=49, start=2, spent=Spent(generated_tokens=32))
    assert (await resumed.run(), resumed.ended_by) == (4, "run.max_generated_tokens")
    over = controller(World(), [], staleness=1, max_seconds=10.0, spent=Spent(seconds=11.0))
    assert (await over.run(), over.ended_by) == (0, "run.max_seconds")


def rounds(start: int = 0) -> IterativeSchedule:
    """Rounds of 8 pairs in 3 passes: 6 steps."""
    return IterativeSchedule(batch_pairs=4, pairs_per_round=8, epochs=3, seed=0, start_step=start)


async def test_a_round_is_sampled_by_one_policy_and_trained_on_in_passes() -> None:
    world, reports = World(abstain=frozenset({2, 11})), []
    running = controller(world, reports, staleness=0, steps=12, schedule=rounds())
    assert (await running.run(), running.ended_by) == (12, "run.max_steps")
    first, second = {0, 1, 3, 4, 5, 6, 7, 8}, {9, 10, 12, 13, 14, 15, 16, 17}
    for number, wanted in ((0, first), (1, second)):
        for epoch in range(3):
            start = number * 6 + epoch * 2
            assert sorted(world.trained[start] + world.trained[start + 1]) == sorted(wanted), (
                "a pass uses each pair once"
            )
        assert world.trained[number * 6] == sorted(wanted)[:4], "the first pass goes in plan order"
    assert world.trained[2:4] != world.trained[4:6], "every later pass has its own order"
    versions = [{item.pair.min_policy_version for item in report.batch} for report in reports]
    assert versions == [{0}] * 6 + [{6}] * 6
    assert [max(report.ages) for report in reports] == [0, 1, 2, 3, 4, 5] * 2
    assert [event for event in world.events if event.startswith("push")] == ["push 6", "push 12"]
    assert list(world.states.values()).count(PairState.TRAINED) == 16
    assert [r.spent.labels for r in reports if r.spent] == [4, 8, 8, 8, 8, 8, 12, 16, 16, 16, 16, 16]


@pytest.mark.parametrize("killed_after", [1, 2, 3, 5, 6, 7, 10])
async def test_a_round_goes_on_where_it_was_killed(killed_after: int) -> None:
    """What the ledger holds after ``killed_after`` steps, and the step's number, give the same batches from there."""
    whole = World()
    await controller(whole, [], staleness=0, steps=12, schedule=rounds()).run()
    begun = 8 * (killed_after // 6)
    retired = {i for batch in whole.trained[: killed_after - killed_after % 6] for i in batch}
    if killed_after % 6 > 4:
        retired |= set(whole.trained[killed_after - 1])
    left = [i for i in range(begun, begun + 8) if i not in retired]
    labelled = [i for i in left if killed_after % 6 >= 2 or i - begun < 4]
    world = World()
    world.version = begun // 8 * 6
    work = UnfinishedWork(
        planned=[plan(i) for i in left if i not in labelled],
        labeled=[
            LabeledPair(
                pair=pair(i, version=world.version),
                label=label(i),
                reference=ReferenceLogprobs(pair_id=f"pair-{i}", a=0.0, b=0.0),
            )
            for i in labelled
        ],
    )
    world.states = dict.fromkeys((f"pair-{i}" for i in labelled), PairState.LABELED)
    resumed = controller(
        world, [], staleness=0, steps=12, start=killed_after, schedule=rounds(killed_after), work=work,
        next_index=begun + 8,
    )  # fmt: skip
    assert await resumed.run() == 12
    assert world.trained == whole.trained[killed_after:]
    assert len(world.states) == len(labelled) + sum(i not in labelled for i in left) + (8 if begun == 0 else 0)


async def test_a_run_that_ends_within_a_round_serves_what_it_has_trained() -> None:
    world = World()
    await controller(world, [], staleness=0, steps=3, schedule=rounds()).run()
    assert world.version == 3 and world.events[-1] == "served 3"
    assert len(world.states) == 8


def test_rounds_of_one_batch_and_one_pass_are_synchronous_training() -> None:
    one = IterativeSchedule(batch_pairs=4, pairs_per_round=4, epochs=1, seed=0)
    online = OnlineSchedule(batch_pairs=4)
    for step in range(5):
        assert (one.introduced(step), one.retired(step), one.served_version(step)) == (
            online.introduced(step),
            online.retired(step),
            online.served_version(step),
        )
