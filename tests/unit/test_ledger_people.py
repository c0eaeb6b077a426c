"""Labels by people: votes, undo, leases, deadlines, late answers, roll-backs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pairs import label, pair, plan, reference

from pilaf_ray.errors import LedgerError
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.store.records import LabelKind, LeaseOutcome, Vote
from pilaf_ray.types import PairState


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[PreferenceLedger]:
    opened = PreferenceLedger(f"sqlite:///{tmp_path / 'ledger.db'}", clock=clock)
    opened.add_plans([plan(i) for i in range(4)])
    opened.add_responses([pair(i, version=i) for i in range(3)])
    yield opened
    opened.close()


def vote(key: str, annotator: str = "ada", index: int = 0, probability: float | None = 0.9, lease_id=None) -> Vote:
    return Vote(key=key, pair_id=f"pair-{index}", annotator=annotator, probability=probability, lease_id=lease_id)


def held(ledger: PreferenceLedger) -> list[tuple[str, str]]:
    return [(lease.pair_id, lease.holder) for lease in ledger.leases.open()]


def test_a_vote_is_kept_once_however_often_it_is_sent(ledger: PreferenceLedger) -> None:
    first = ledger.labels.vote(vote("form-1"))
    assert ledger.labels.vote(vote("form-1")) == first
    assert ledger.labels.of("pair-0") == [first]
    assert (first.kind, first.late, first.created_at, first.probability) == (LabelKind.VOTE, False, 1_000_000, 0.9)
    with pytest.raises(LedgerError, match="belongs to another label"):
        ledger.labels.vote(vote("form-1", "bob"))
    with pytest.raises(LedgerError, match="pair-9 is not in the ledger"):
        ledger.labels.vote(vote("form-2", index=9))


def test_the_last_vote_of_each_annotator_counts_and_undo_brings_the_one_before_back(ledger: PreferenceLedger) -> None:
    ledger.labels.vote(vote("1", "ada", probability=0.9))
    ledger.labels.vote(vote("2", "bob", probability=0.2))
    changed = ledger.labels.vote(vote("3", "ada", probability=0.6))
    assert sorted(v.probability for v in ledger.labels.votes("pair-0")) == [0.2, 0.6]
    undone = ledger.labels.withdraw(changed.sequence, key="4", annotator="ada")
    assert ledger.labels.withdraw(changed.sequence, key="4", annotator="ada") == undone
    assert sorted(v.probability for v in ledger.labels.votes("pair-0")) == [0.2, 0.9]
    assert [event.key for event in ledger.labels.of("pair-0")] == ["1", "2", "3", "4"], "nothing is deleted"
    with pytest.raises(LedgerError, match="no vote of bob"):
        ledger.labels.withdraw(changed.sequence, key="5", annotator="bob")


def test_a_verdict_is_an_event_and_what_comes_after_it_is_late(ledger: PreferenceLedger) -> None:
    given = ledger.labels.vote(vote("1"))
    ledger.add_labels([label(0, 0.9, "human")], [reference(0)])
    late = ledger.labels.vote(vote("2", "bob"))
    undo = ledger.labels.withdraw(given.sequence, key="3", annotator="ada")
    assert [(e.kind.value, e.late) for e in ledger.labels.of("pair-0")] == [
        ("vote", False),
        ("verdict", False),
        ("vote", True),
        ("withdrawal", True),
    ]
    assert late.late and undo.late
    assert [v.key for v in ledger.labels.votes("pair-0")] == ["1"]
    assert ledger.counts().labels == 1, "votes are not counted as labels"


def test_two_annotators_never_hold_the_same_pair_and_one_never_gets_a_pair_twice(ledger: PreferenceLedger) -> None:
    first = ledger.leases.lease("ada", seconds=60)
    second = ledger.leases.lease("bob", seconds=60)
    assert [lease.pair_id for lease in (*first, *second)] == ["pair-0", "pair-1"]
    assert [lease.pair_id for lease in ledger.leases.lease("ada", seconds=60, limit=5)] == ["pair-2"]
    assert ledger.leases.lease("eve", seconds=60) == [], "pair-3 is not sampled yet"
    ledger.labels.vote(vote("1", "ada", lease_id=first[0].lease_id))
    assert ledger.leases.lease("ada", seconds=60) == [], "answered is answered"
    assert held(ledger) == [("pair-1", "bob"), ("pair-2", "ada")]


def test_a_pair_that_needs_two_votes_is_in_two_hands(ledger: PreferenceLedger) -> None:
    only = {"seconds": 60, "votes_per_pair": 2, "among": ["pair-1"]}
    [first] = ledger.leases.lease("ada", **only)
    [_] = ledger.leases.lease("bob", **only)
    assert ledger.leases.lease("eve", **only) == []
    answered = ledger.labels.vote(vote("1", "ada", 1, lease_id=first.lease_id))
    assert ledger.leases.lease("eve", **only) == [], "one vote and one lease make two"
    ledger.labels.withdraw(answered.sequence, key="2", annotator="ada")
    assert [lease.pair_id for lease in ledger.leases.lease("eve", **only)] == ["pair-1"]


def test_a_deadline_returns_the_pair_and_the_late_answer_is_kept_and_marked(
    ledger: PreferenceLedger, clock: Clock
) -> None:
    [lease] = ledger.leases.lease("ada", seconds=60)
    clock.now += 50
    assert ledger.leases.renew(lease.lease_id, "ada", seconds=60).deadline == 1_110_000
    clock.now += 59
    assert held(ledger) == [("pair-0", "ada")]
    clock.now += 1
    assert held(ledger) == []
    [taken] = ledger.leases.lease("bob", seconds=60)
    assert taken.pair_id == "pair-0", "free from the deadline on, before anybody wrote it down"
    assert [(e.lease_id, e.outcome) for e in ledger.leases.expire()] == [(lease.lease_id, LeaseOutcome.EXPIRED)]
    assert ledger.leases.expire() == []
    with pytest.raises(LedgerError, match="has ended"):
        ledger.leases.renew(lease.lease_id, "ada", seconds=60)
    assert ledger.labels.vote(vote("1", "ada", lease_id=lease.lease_id)).late
    assert ledger.labels.votes("pair-0") == []
    with pytest.raises(LedgerError, match="ada has no lease"):
        ledger.labels.vote(vote("2", "ada", lease_id=taken.lease_id))


def test_release_gives_back_and_repeats_are_harmless(ledger: PreferenceLedger) -> None:
    [lease] = ledger.leases.lease("ada", seconds=60)
    for _ in range(2):
        assert ledger.leases.release(lease.lease_id, "ada").outcome is LeaseOutcome.RELEASED
    assert [again.pair_id for again in ledger.leases.lease("ada", seconds=60)] == ["pair-0"]


def test_leaving_the_queue_ends_the_leases(ledger: PreferenceLedger) -> None:
    ledger.leases.lease("ada", seconds=60, limit=3)
    ledger.add_labels([label(0)], [reference(0)])
    ledger.reject("pair-1", "thrown out")
    ledger.expire("pair-2", "nobody came")
    assert held(ledger) == []


def test_a_resumption_keeps_pairs_that_people_answered_and_redoes_the_others(ledger: PreferenceLedger) -> None:
    [lease] = ledger.leases.lease("bob", seconds=60, among=["pair-1"])
    ledger.labels.vote(vote("1", "ada", 2))
    ledger.add_labels([label(0)], [reference(0)])
    assert ledger.reset_after(-1) == 2
    left = ledger.unfinished()
    assert [p.index for p in left.planned] == [0, 1, 3]
    assert left.sampled == [pair(2, version=2)]
    assert [v.key for v in ledger.labels.votes("pair-2")] == ["1"]
    ledger.add_responses([pair(0), pair(1)])
    assert [e.kind.value for e in ledger.labels.of("pair-0")] == ["verdict"], "what was said stays in the log"
    ledger.add_labels([label(0, 0.0)], [reference(0)])
    assert [(e.sampling, e.probability) for e in ledger.labels.of("pair-0")] == [(0, 1.0), (1, 0.0)]
    assert ledger.unfinished().labeled[0].label == label(0, 0.0)
    assert ledger.labels.vote(vote("2", "bob", 1, lease_id=lease.lease_id)).late, "he saw the old responses"
    assert ledger.counts().check()[PairState.SAMPLED] == 2
