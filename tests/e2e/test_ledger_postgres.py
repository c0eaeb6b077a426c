"""The ledger's tests again, on a real PostgreSQL server."""

from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from ledger_machine import LedgerMachine
from pairs import label, pair, plan, reference
from postgres_server import postgres_url
from psycopg import OperationalError
from sqlalchemy import create_engine, event, text
from test_ledger import (  # noqa: F401 - collected here too, with this file's ledger
    test_a_pair_is_trained_on_once,
    test_abstentions_end_and_are_never_trained,
    test_counts_that_do_not_add_up_are_an_error,
    test_how_a_pair_was_drawn_survives_and_goes_with_its_responses,
    test_messages_come_back_as_they_went_in,
    test_only_a_sampled_pair_expires,
    test_rejection_is_open_to_every_unfinished_pair_and_keeps_its_first_reason,
    test_repeats_change_nothing,
    test_resumption_keeps_what_older_weights_made_and_redoes_the_rest,
    test_wrong_arrows_are_refused_whole,
)

from pilaf_ray.errors import LedgerError, RoleLostError
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.store.reading import LedgerReader
from pilaf_ray.types import PairState

numbers = count()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgres_url() as found:
        yield found


def drop(url: str, schema: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f'DROP SCHEMA IF EXISTS "{schema}" CASCADE'))
    engine.dispose()


@pytest.fixture
def schema(url: str) -> Iterator[str]:
    name = f"pilaf-test-{next(numbers)}"
    drop(url, name)
    yield name
    drop(url, name)


@pytest.fixture
def ledger(url: str, schema: str) -> Iterator[PreferenceLedger]:
    opened = PreferenceLedger(url, namespace=schema)
    yield opened
    opened.close()


def test_any_order_of_arrows_with_crashes_between_them(url: str) -> None:
    class PostgresBackend:
        """A killed writer is a connection that goes away; the server undoes what was under way."""

        def __init__(self) -> None:
            self._schema = f"pilaf-machine-{next(numbers)}"
            drop(url, self._schema)

        def open(self, clock) -> PreferenceLedger:
            return PreferenceLedger(url, namespace=self._schema, clock=clock)

        def at_kill(self) -> None: ...

        def after_kill(self, ledger: PreferenceLedger, clock) -> PreferenceLedger:
            ledger.close()
            return self.open(clock)

        def remove(self) -> None:
            drop(url, self._schema)

    class PostgresMachine(LedgerMachine):
        make_backend = PostgresBackend

    run_state_machine_as_test(
        PostgresMachine,
        settings=settings(
            max_examples=8,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_runs_share_a_database_and_each_has_one_writer(
    url: str, schema: str, ledger: PreferenceLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pilaf_ray.store.database._LOCK_SECONDS", 1)
    ledger.add_plans([plan(0)])
    with pytest.raises(LedgerError, match=f"of run '{schema}' is in use by a running job"):
        PreferenceLedger(url, namespace=schema)
    other = PreferenceLedger(url, namespace=f"{schema}-other")
    assert other.counts().planned == 0
    other.close()
    drop(url, f"{schema}-other")
    ledger.close()
    again = PreferenceLedger(url, namespace=schema)
    assert again.counts().check().planned == 1
    again.close()


def test_readers_see_what_is_committed(url: str, schema: str, ledger: PreferenceLedger) -> None:
    ledger.add_plans([plan(0)])
    ledger.add_responses([pair(0)])
    reader = LedgerReader(url, namespace=schema)
    ledger.add_labels([label(0)], [reference(0)])
    assert reader.counts().labels == 1
    assert [event.probability for event in reader.labels("pair-0")] == [1.0]
    reader.close()


def end_connections(url: str, schema: str) -> int:
    """Let the server end the connections that hold a lock of ``schema``'s writer; returns how many it were."""
    engine = create_engine(url)
    query = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_locks "
        "WHERE locktype = 'advisory' AND objid = (hashtext(:name)::bigint & 4294967295)::oid"
    )
    with engine.begin() as connection:
        ended = int(connection.scalar(text(query), {"name": f"pilaf-ray {schema}"}) or 0)
    engine.dispose()
    return ended


@pytest.mark.parametrize("between", ["calls", "statements", "statements and commit"])
def test_a_writer_whose_connection_is_ended_is_lost_and_the_next_one_goes_on(
    url: str, schema: str, ledger: PreferenceLedger, between: str
) -> None:
    ledger.add_plans([plan(0), plan(1)])
    if between == "calls":
        assert end_connections(url, schema) == 1, "what writes is what holds the lock"
    else:
        name = "before_cursor_execute" if between == "statements" else "commit"
        event.listen(ledger.database._engine, name, lambda *_: end_connections(url, schema), once=True)
    with pytest.raises(RoleLostError, match="cannot be written") as caught:
        ledger.add_responses([pair(0)])
    assert "\n" not in str(caught.value)
    for again in (lambda: ledger.add_responses([pair(0)]), ledger.counts):
        with pytest.raises(RoleLostError, match="this writer's connection is lost, and its lock with it"):
            again()
    newer = PreferenceLedger(url, namespace=schema)
    assert newer.counts().check()[PairState.PLANNED] == 2, "nothing of it happened"
    newer.add_responses([pair(0)])
    assert newer.counts().check()[PairState.SAMPLED] == 1
    newer.close()


def test_a_commit_whose_answer_is_lost_has_happened_once(url: str, schema: str, ledger: PreferenceLedger) -> None:
    ledger.add_plans([plan(0)])
    ledger.add_responses([pair(0)])
    dialect = ledger.database._engine.dialect
    commit = dialect.do_commit

    def commit_and_lose(connection) -> None:
        commit(connection)
        connection.driver_connection.close()
        raise OperationalError("server closed the connection unexpectedly")

    dialect.do_commit = commit_and_lose
    with pytest.raises(RoleLostError, match="server closed the connection unexpectedly"):
        ledger.add_labels([label(0)], [reference(0)])
    newer = PreferenceLedger(url, namespace=schema)
    assert newer.counts().check()[PairState.LABELED] == 1, "it has happened"
    newer.add_labels([label(0)], [reference(0)])
    counts = newer.counts().check()
    assert (counts[PairState.LABELED], counts.labels) == (1, 1), "and its repeat changes nothing"
    newer.close()


def test_a_reader_outlives_the_connection(url: str, schema: str, ledger: PreferenceLedger) -> None:
    ledger.add_plans([plan(0)])
    reader = LedgerReader(url, namespace=schema)
    assert reader.counts().planned == 1
    with reader._database.reading() as connection:
        backend = connection.scalar(text("SELECT pg_backend_pid()"))
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": backend})
    engine.dispose()
    with pytest.raises(LedgerError, match="cannot be read"):
        reader.counts()
    assert reader.counts().planned == 1
    reader.close()


def test_a_server_that_cannot_be_reached_is_one_line_without_the_password() -> None:
    with pytest.raises(LedgerError) as caught:
        PreferenceLedger("postgresql+psycopg://ada:hunter2@127.0.0.1:1/ledger", namespace="x")
    assert "cannot be opened" in str(caught.value) and "ada:***@127.0.0.1:1" in str(caught.value)
    assert "hunter2" not in str(caught.value)
