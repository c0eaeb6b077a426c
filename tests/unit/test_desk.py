"""Votes of people: the desk, the oracle that waits for them, and how votes become labels."""

import asyncio
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from pairs import pair, plan

from pilaf_ray.config.oracle import CHOICES, HumanOracleConfig
from pilaf_ray.errors import LedgerError
from pilaf_ray.oracle.aggregation import dawid_skene, majority
from pilaf_ray.oracle.agreement import agreement_by_annotator, cohen_kappa, krippendorff_alpha
from pilaf_ray.oracle.human import HumanOracle, HumanRules
from pilaf_ray.store.desk import LabelDesk, Opinions
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.types import PreferenceLabel


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def ledger(tmp_path: Path, clock: Time) -> Iterator[PreferenceLedger]:
    opened = PreferenceLedger(f"sqlite:///{tmp_path / 'ledger.db'}", clock=clock)
    opened.add_plans([plan(i) for i in range(4)])
    opened.add_responses([pair(i) for i in range(4)])
    yield opened
    opened.close()


@pytest.fixture
def desk(ledger: PreferenceLedger) -> LabelDesk:
    return LabelDesk(ledger, lease_seconds=60)


NAMES = [f"pair-{i}" for i in range(4)]


def give(desk: LabelDesk, annotator: str, probability: float | None = 0.9, *, skip: bool = False) -> str:
    lease = desk.take(annotator)
    assert lease is not None
    desk.answer(lease.lease_id, lease.pair_id, annotator, probability=probability, details="{}", skip=skip)
    return lease.pair_id


def test_nothing_is_handed_out_before_the_run_asks(desk: LabelDesk) -> None:
    assert desk.take("ada") is None
    desk.want(["pair-2"], 1)
    lease = desk.take("ada")
    assert lease is not None and lease.pair_id == "pair-2"


def test_two_people_never_hold_the_same_pair_and_two_tabs_always_do(desk: LabelDesk) -> None:
    desk.want(NAMES, 1)
    held = [desk.take(name) for name in ("ada", "ben", "ada", "eve", "ben")]
    assert [lease.pair_id for lease in held if lease] == ["pair-0", "pair-1", "pair-0", "pair-2", "pair-1"]


def test_the_first_answer_to_a_lease_is_the_one(desk: LabelDesk) -> None:
    desk.want(NAMES, 1)
    lease = desk.take("ada")
    assert lease is not None
    first = desk.answer(lease.lease_id, "pair-0", "ada", probability=0.9, details="{}")
    again = desk.answer(lease.lease_id, "pair-0", "ada", probability=0.1, details="{}")
    assert again == first and [vote.probability for vote in desk.opinions("pair-0").votes] == [0.9]
    with pytest.raises(LedgerError, match="belongs to another label"):
        desk.answer(lease.lease_id, "pair-0", "ben", probability=0.1, details="{}")


def test_an_expired_lease_goes_to_others_and_its_answer_is_kept_as_late(desk: LabelDesk, clock: Time) -> None:
    desk.want(NAMES, 1)
    lease = desk.take("ada")
    assert lease is not None
    clock.now += 50
    desk.renew(lease.lease_id, "ada")
    clock.now += 50
    assert give(desk, "ben") == "pair-1"
    clock.now += 20
    assert give(desk, "ben", 0.2) == "pair-0"
    late = desk.answer(lease.lease_id, "pair-0", "ada", probability=0.9, details="{}")
    assert late.late and [vote.annotator for vote in desk.opinions("pair-0").votes] == ["ben"]


def test_undo_brings_the_pair_back_to_the_same_person(desk: LabelDesk) -> None:
    desk.want(NAMES, 1)
    assert give(desk, "ada") == "pair-0"
    assert give(desk, "ada", None, skip=True) == "pair-1"
    held = desk.take("ada")
    assert held is not None and held.pair_id == "pair-2"
    undone = desk.undo("ada")
    assert undone is not None and not undone.late and undone.pair_id == "pair-1"
    assert give(desk, "ada", 0.3) == "pair-1"
    assert desk.opinions("pair-1").skips == ()
    assert [vote.probability for vote in desk.opinions("pair-1").votes] == [0.3]
    assert desk.progress("ada").answers == 2
    assert desk.undo("nobody") is None


def test_a_used_answer_cannot_be_taken_back(desk: LabelDesk, ledger: PreferenceLedger) -> None:
    desk.want(NAMES, 1)
    give(desk, "ada")
    ledger.reject("pair-0", "thrown out")
    undone = desk.undo("ada")
    assert undone is not None and undone.late


def test_a_skipped_pair_goes_to_others_and_counts_as_unanswered(desk: LabelDesk) -> None:
    desk.want(["pair-0"], 1)
    give(desk, "ada", None, skip=True)
    assert desk.take("ada") is None
    assert give(desk, "ben") == "pair-0"
    opinions = desk.opinions("pair-0")
    assert [event.annotator for event in opinions.skips] == ["ada"]
    assert [event.annotator for event in opinions.votes] == ["ben"]


def test_requeue_takes_back_what_is_not_used(desk: LabelDesk, ledger: PreferenceLedger) -> None:
    desk.want(NAMES, 1)
    give(desk, "ada"), give(desk, "ada")
    ledger.reject("pair-0", "thrown out")
    assert desk.requeue("ada") == 1 and desk.requeue("ada") == 0
    assert desk.opinions("pair-1").votes == ()


def test_only_news_are_told(desk: LabelDesk) -> None:
    assert set(desk.want(NAMES, 1)) == set(NAMES)
    assert desk.want(NAMES, 1) == {}
    give(desk, "ada")
    assert set(desk.want(NAMES, 1)) == {"pair-0"}


class DirectDesk:
    """The desk without a process between."""

    def __init__(self, desk: LabelDesk) -> None:
        self._desk = desk

    async def want(self, pair_ids: Sequence[str], votes_per_pair: int) -> Mapping[str, Opinions]:
        return self._desk.want(pair_ids, votes_per_pair)


async def labels_of(desk: LabelDesk, clock: Time, rules: HumanRules, script: Sequence[object]) -> list[PreferenceLabel]:
    """What the oracle says of the first pairs when one action of the script follows each poll."""
    actions = iter(script)

    async def between_polls(_seconds: float) -> None:
        action = next(actions, None)
        if callable(action):
            action()
        clock.now += 1
        await asyncio.sleep(0)

    oracle = HumanOracle(DirectDesk(desk), rules, clock=clock, sleep=between_polls)
    async with asyncio.timeout(20):
        return await oracle.label([pair(0), pair(1)])


async def test_votes_become_labels_once_they_cannot_be_taken_back(desk: LabelDesk, clock: Time) -> None:
    def change_mind() -> None:
        desk.undo("ada")
        assert give(desk, "ada", 0.1) == "pair-0"

    rules = HumanRules(undo_seconds=5)
    script = [lambda: give(desk, "ada", 0.9), change_mind, lambda: give(desk, "ben", None)]
    found = await labels_of(desk, clock, rules, script)
    assert [(label.pair_id, label.probability, label.source) for label in found] == [
        ("pair-0", 0.1, "human"),
        ("pair-1", None, "human"),
    ]
    assert found[1].reason == "annotators found no answer worth training on"


async def test_several_votes_skips_and_deadlines(desk: LabelDesk, clock: Time) -> None:
    rules = HumanRules(votes_per_pair=3, undo_seconds=0, skips_to_abstain=2, answer_seconds=100)
    votes = [("ada", 0.9), ("ben", 0.7), ("eve", 0.2)]
    script = [lambda who=who, p=p: give(desk, who, p) for who, p in votes]
    script += [lambda who=who: give(desk, who, None, skip=True) for who in ("ada", "ben")]
    found = await labels_of(desk, clock, rules, script)
    assert found[0].probability == pytest.approx(0.8)
    assert found[1].probability is None and "skipped by 2 annotators" in (found[1].reason or "")
    left = await labels_of(desk, clock, HumanRules(answer_seconds=30, votes_per_pair=4, skips_to_abstain=9), [])
    assert {label.reason for label in left} == {"nobody answered within 30 s"}


def test_majority() -> None:
    assert majority([0.9, 0.7, 0.2]) == pytest.approx(0.8)
    assert majority([0.9, 0.2]) == pytest.approx(0.55)
    assert majority([0.5, 0.5, 1.0]) == 0.5
    assert majority([None, 0.9]) is None and majority([None, None, 0.9]) is None
    assert majority([None, 0.9, 0.7]) == pytest.approx(0.8)


def test_dawid_skene_trusts_the_reliable() -> None:
    # Two annotators always agree; the third says the opposite. Where only one of the two and the third
    # were asked, the posterior follows the one who was right elsewhere.
    votes: dict[str, dict[str, int]] = {}
    for number, truth in enumerate(itertools.islice(itertools.cycle([0, 2]), 40)):
        votes[f"item-{number}"] = {"ada": truth, "ben": truth, "eve": 2 - truth}
    votes["open"] = {"ada": 2, "eve": 0}
    belief = dawid_skene(votes)
    assert belief["open"][2] > 0.95
    assert all(sum(p) == pytest.approx(1) for p in belief.values())
    assert dawid_skene({}) == {}


def test_dawid_skene_by_hand_after_one_round() -> None:
    # Shares start at (0, 0, 1) for x and (½, 0, ½) for y. Prior: (¼, 0 → 1e-9, ¾). Confusions with one
    # pseudo-count a row: ada's row a: (⅓, ⅓, ⅓ + 1.5)/2.5, row b: (⅓, ⅓, ⅓ + .5)/1.5; ben's row a:
    # (⅓ + .5, ⅓, ⅓ + 1)/2.5, row b: (⅓ + .5, ⅓, ⅓)/1.5.
    votes = {"x": {"ada": 2, "ben": 2}, "y": {"ada": 2, "ben": 0}}
    a = 0.75 * ((1 / 3 + 1.5) / 2.5) * ((1 / 3 + 0.5) / 2.5)
    b = 0.25 * ((1 / 3 + 0.5) / 1.5) * ((1 / 3 + 0.5) / 1.5)
    neither = 1e-9 / 9
    assert dawid_skene(votes, rounds=1)["y"][2] == pytest.approx(a / (a + b + neither))


def test_kappa_and_alpha_against_published_figures() -> None:
    # Cohen's own kind of table: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no gives 0.4.
    table = [(2, 2)] * 20 + [(2, 0)] * 5 + [(0, 2)] * 10 + [(0, 0)] * 15
    assert cohen_kappa(table) == pytest.approx(0.4)
    assert cohen_kappa([]) is None and cohen_kappa([(2, 2)]) is None
    votes = {str(n): {"ada": a / 2, "ben": b / 2} for n, (a, b) in enumerate(table)}
    assert [found.kappa for found in agreement_by_annotator(votes)] == pytest.approx([0.4, 0.4])
    # By hand for two raters and two values: α = 1 − (n − 1)·o/(n_0·n_1) with n = 100 answers, o = 2·15/2.
    assert krippendorff_alpha(votes) == pytest.approx(1 - 99 * 15 / (45 * 55))
    assert krippendorff_alpha({"x": {"ada": 1.0}}) is None


def test_choices_are_symmetric() -> None:
    assert HumanOracleConfig().choices == CHOICES
    with pytest.raises(ValueError, match="a_much and b_much must both be there and add up to 1"):
        HumanOracleConfig(choices={**CHOICES, "a_much": 0.9})
