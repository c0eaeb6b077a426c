"""The ledger's arrows, repeats, refusals and resumption."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from pairs import label, pair, plan, reference

from pilaf_ray.errors import LedgerError
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.store.reading import LedgerReader
from pilaf_ray.store.records import UnfinishedWork
from pilaf_ray.types import LabeledPair, PairCost, PairDraw, PairState


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[PreferenceLedger]:
    opened = PreferenceLedger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield opened
    opened.close()


def fill(ledger: PreferenceLedger, *indices: int, version: int = 0, source: str = "function") -> None:
    ledger.add_plans([plan(i) for i in indices])
    ledger.add_responses([pair(i, version=version) for i in indices])
    ledger.add_labels([label(i, source=source) for i in indices], [reference(i) for i in indices])


def count(ledger: PreferenceLedger) -> dict[str, int]:
    return {state.value: number for state, number in ledger.counts().by_state.items() if number}


def test_messages_come_back_as_they_went_in(ledger: PreferenceLedger) -> None:
    fill(ledger, 0)
    ledger.add_plans([plan(1), plan(2)])
    ledger.add_responses([pair(1)])
    assert ledger.unfinished() == UnfinishedWork(
        planned=[plan(2)],
        sampled=[pair(1)],
        labeled=[LabeledPair(pair=pair(0), label=label(0), reference=reference(0))],
    )
    assert ledger.next_plan_index() == 3


def test_many_at_once_are_more_than_a_statement_takes_and_each_gets_its_own_label(ledger: PreferenceLedger) -> None:
    number = 2500
    ledger.add_plans([plan(i) for i in range(number)])
    ledger.add_responses([pair(i) for i in range(number)])
    labels = [label(i, probability=i / number) for i in range(number)]
    ledger.add_labels(labels[::-1], [reference(i) for i in range(number)][::-1])
    assert [labeled.label for labeled in ledger.unfinished().labeled] == labels
    ledger.mark_trained(1, [f"pair-{i}" for i in range(1, number)])
    ledger.mark_trained(1, [f"pair-{i}" for i in range(1, number)])
    assert count(ledger) == {"labeled": 1, "trained": number - 1}


def test_how_a_pair_was_drawn_survives_and_goes_with_its_responses(ledger: PreferenceLedger) -> None:
    draw = PairDraw(
        branch="interpolated",
        cost=PairCost(sequence_forwards=4, generated_tokens=9, labelled_responses=2),
        loss_weight=1.25,
        log_z_a=0.5,
        scorer_version=3,
    )
    drawn = replace(pair(0, version=2), draw=draw)
    ledger.add_plans([replace(plan(0), candidate_seeds=(5, 6))])
    ledger.add_responses([drawn])
    sampled = ledger.unfinished().sampled
    assert sampled == [replace(drawn, plan=replace(plan(0), candidate_seeds=(5, 6)))]
    assert (sampled[0].branch, sampled[0].loss_weight) == ("interpolated", 1.25)
    assert ledger.reset_after(1) == 1, "sampled under weights that are gone"
    ledger.add_responses([pair(0)])
    assert ledger.unfinished().sampled[0].draw is None


def test_repeats_change_nothing(ledger: PreferenceLedger) -> None:
    for _ in range(2):
        fill(ledger, 0, 1)
    for _ in range(2):
        ledger.mark_trained(1, ["pair-0"])
    fill(ledger, 0)
    assert count(ledger) == {"labeled": 1, "trained": 1}


def test_wrong_arrows_are_refused_whole(ledger: PreferenceLedger) -> None:
    ledger.add_plans([plan(0), plan(1)])
    ledger.add_responses([pair(0)])
    with pytest.raises(LedgerError, match="pair-0 is sampled; only a labeled pair can become trained"):
        ledger.mark_trained(1, ["pair-0"])
    with pytest.raises(LedgerError, match="pair-9 is not in the ledger"):
        ledger.add_responses([pair(1), pair(9)])
    assert count(ledger) == {"planned": 1, "sampled": 1}


def test_a_pair_is_trained_on_once(ledger: PreferenceLedger) -> None:
    fill(ledger, 0)
    ledger.mark_trained(1, ["pair-0"])
    with pytest.raises(LedgerError, match="already trained on at step 1"):
        ledger.mark_trained(2, ["pair-0"])


def test_abstentions_end_and_are_never_trained(ledger: PreferenceLedger) -> None:
    ledger.add_plans([plan(0)])
    ledger.add_responses([pair(0)])
    ledger.add_labels([label(0, None)], [reference(0)])
    ledger.add_responses([pair(0)])
    ledger.add_labels([label(0, None)], [reference(0)])
    assert count(ledger) == {"abstained": 1}, "repeats change nothing"
    with pytest.raises(LedgerError, match="is abstained"):
        ledger.mark_trained(1, ["pair-0"])


def test_resumption_keeps_what_older_weights_made_and_redoes_the_rest(ledger: PreferenceLedger) -> None:
    fill(ledger, 0, 1, version=0)
    fill(ledger, 2, version=1)
    fill(ledger, 3, version=2)
    fill(ledger, 4, version=2, source="human")
    ledger.add_plans([plan(5)])
    for step, name in ((1, "pair-0"), (2, "pair-1"), (3, "pair-2"), (3, "pair-3"), (3, "pair-4")):
        ledger.mark_trained(step, [name])
    assert ledger.reset_after(1) == 1
    left = ledger.unfinished()
    assert [p.index for p in left.planned] == [3, 5]
    assert left.sampled == []
    assert [item.pair.plan.index for item in left.labeled] == [1, 2, 4]
    assert ledger.counts()[PairState.TRAINED] == 1


def test_ledger_survives_reopening(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    first = PreferenceLedger(url)
    fill(first, 0)
    first.close()
    second = PreferenceLedger(url)
    assert count(second) == {"labeled": 1}
    second.close()


def test_a_writer_that_was_replaced_and_comes_back_changes_nothing(tmp_path: Path) -> None:
    """As one that was stopped, or cut off by the network, and is let go on."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    first = PreferenceLedger(url)
    fill(first, 0)
    second = PreferenceLedger(url)
    second.mark_trained(1, ["pair-0"])
    with pytest.raises(LedgerError, match="newer writer: this one was replaced"):
        first.reset_after(0)
    with pytest.raises(LedgerError, match="newer writer"):
        fill(first, 1)
    assert count(second) == count(first) == {"trained": 1}, "it may look"
    fill(second, 1)
    assert count(second) == {"trained": 1, "labeled": 1}
    for ledger in (first, second):
        ledger.close()


def test_a_full_database_is_one_line_and_loses_nothing_acknowledged(ledger: PreferenceLedger) -> None:
    fill(ledger, 0)
    with ledger._database.reading() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 4}")
    acknowledged = 1
    with pytest.raises(LedgerError, match=r"cannot be written .*full.*continue with --resume"):
        for index in range(1, 1000):
            fill(ledger, index)
            acknowledged += 1
    with ledger._database.reading() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=100000")
    assert count(ledger)["labeled"] == acknowledged
    assert acknowledged > 1


def test_rejection_is_open_to_every_unfinished_pair_and_keeps_its_first_reason(ledger: PreferenceLedger) -> None:
    ledger.add_plans([plan(i) for i in range(4)])
    ledger.add_responses([pair(i) for i in (1, 2, 3)])
    ledger.add_labels([label(i) for i in (2, 3)], [reference(i) for i in (2, 3)])
    ledger.mark_trained(1, ["pair-3"])
    for index in range(3):
        ledger.reject(f"pair-{index}", "poison")
        ledger.reject(f"pair-{index}", "again")
    assert count(ledger) == {"trained": 1, "rejected": 3}
    assert ledger.unfinished() == UnfinishedWork(planned=[], sampled=[], labeled=[])
    with pytest.raises(LedgerError, match="pair-3 is trained; only a labeled pair can become rejected"):
        ledger.reject("pair-3", "too late")
    with pytest.raises(LedgerError, match="pair-0 is rejected"):
        ledger.add_responses([pair(0)])
    assert ledger.reset_after(-1) == 1, "the trained one; what is rejected stays so"
    assert count(ledger) == {"planned": 1, "rejected": 3}


def test_only_a_sampled_pair_expires(ledger: PreferenceLedger) -> None:
    ledger.add_plans([plan(0), plan(1)])
    ledger.add_responses([pair(0)])
    ledger.expire("pair-0", "nobody answered within an hour")
    ledger.expire("pair-0", "again")
    ledger.add_responses([pair(0)])
    assert count(ledger) == {"planned": 1, "expired": 1}
    for arrow in (lambda: ledger.expire("pair-1", "x"), lambda: ledger.reject("pair-0", "x"), lambda: late(ledger)):
        with pytest.raises(LedgerError, match=r"pair-[01] is"):
            arrow()


def late(ledger: PreferenceLedger) -> None:
    ledger.add_labels([label(0)], [reference(0)])


def test_counts_that_do_not_add_up_are_an_error(ledger: PreferenceLedger) -> None:
    ledger.add_plans([plan(0), plan(1)])
    assert ledger.counts().check().in_flight == 2
    ledger.add_plans([plan(3)])
    with pytest.raises(LedgerError, match="does not add up: 4 pairs were planned, but there are 3 planned"):
        ledger.counts().check()


def test_every_change_has_its_time(tmp_path: Path) -> None:
    seconds = iter(range(1000, 2000))
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = PreferenceLedger(url, clock=lambda: float(next(seconds)))
    fill(ledger, 0, 1)
    ledger.mark_trained(1, ["pair-0"])
    ledger.reject("pair-1", "thrown out")
    reader = LedgerReader(url)
    assert reader.times("pair-0") == {
        PairState.PLANNED: 1_000_000,
        PairState.SAMPLED: 1_001_000,
        PairState.LABELED: 1_002_000,
        PairState.TRAINED: 1_003_000,
    }
    assert reader.times("pair-1")[PairState.REJECTED] == 1_004_000
    ledger.roll_back(0)
    assert PairState.TRAINED not in reader.times("pair-0")
    reader.close()
    ledger.close()


def test_readers_look_on_beside_the_writer(ledger: PreferenceLedger, tmp_path: Path) -> None:
    fill(ledger, *range(10))
    ledger.mark_trained(1, [f"pair-{i}" for i in range(0, 10, 3)])
    reader = LedgerReader(f"sqlite:///{tmp_path / 'ledger.db'}")
    assert [item.pair_id for item in reader.trained_sample(2)] == ["pair-0", "pair-6"]
    assert reader.trained_sample(100)[1] == LabeledPair(pair=pair(3), label=label(3), reference=reference(3))
    assert [event.probability for event in reader.labels("pair-1")] == [1.0]
    fill(ledger, 10)
    assert reader.counts().planned == 11
    reader.close()


def test_what_an_older_version_wrote_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE pairs (pair_id TEXT)")
    for opened in (PreferenceLedger, LedgerReader):
        with pytest.raises(LedgerError, match=r"has an older layout.*start a new run"):
            opened(f"sqlite:///{file}")
