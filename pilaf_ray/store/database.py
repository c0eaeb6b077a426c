"""Opening the ledger's database: durability, one writer, and errors in one line."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, StaticPool, create_engine, event, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.schema import CreateSchema

from pilaf_ray.errors import LedgerError, RoleLostError
from pilaf_ray.store.tables import SCHEMA_VERSION, Base, ledger

_WRITES = "pilaf_writes"
# A writer that was killed is gone when the server has seen its connection close.
_LOCK_SECONDS = 20
_LOCK_NOT_AVAILABLE = "55P03"


class LedgerDatabase:
    """A database with the ledger's tables in it.

    On PostgreSQL the writer does everything on one connection, which also holds its lock: so it cannot write without
    it. Where that connection is lost, so is the writer; a commit that was not answered may have happened, which costs
    nothing, because what is repeated on another writer changes nothing.

    Args:
        url: SQLAlchemy URL, ``sqlite:///FILE`` or ``postgresql+psycopg://…``.
        namespace: schema that holds the tables on PostgreSQL, so that runs can share a database.
        read_only: change nothing, not even by opening.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str | None = None,
        read_only: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._read_only = read_only
        self._engine = _make_engine(url, read_only=read_only)
        self.name = self._engine.url.render_as_string(hide_password=True)
        self._has_lock = False
        self._turn: int | None = None
        """How many writers SQLite's file has had, this one included."""
        self._schema = namespace if self._engine.dialect.name == "postgresql" else None
        if self._schema is not None:
            if not read_only:
                self._keep_to_one_connection()
            self._engine = self._engine.execution_options(schema_translate_map={None: self._schema})
        self._writer = self._engine.execution_options(**{_WRITES: True})
        with self._explained("opened"):
            if not read_only:
                self._become_the_writer()
            self._check_layout()

    def now(self) -> int:
        """UTC in milliseconds."""
        return round(self._clock() * 1000)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction: all of it or nothing, and on disk when it returns.

        Raises:
            LedgerError: a newer writer has opened the file since: this one was given up, and must change nothing.
            RoleLostError: the connection to the server is lost; another writer may do the same again.
        """
        assert not self._read_only, "this ledger was opened for reading"
        with self._explained("written"), self._writer.begin() as connection:
            if self._turn is not None and _turn(connection) != self._turn:
                raise LedgerError(f"the ledger {self.name} has a newer writer: this one was replaced")
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One snapshot, beside the writer."""
        with self._explained("read"), self._engine.connect() as connection:
            yield connection

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()

    @contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        """A database that does not work is one clear line."""
        try:
            yield
        except DBAPIError as error:
            is_lost = self._has_lock and error.connection_invalidated
            if not is_lost and not isinstance(error, OperationalError):
                raise
            cause = str(error.orig).strip().splitlines()[0]
            line = f"the ledger {self.name} cannot be {verb} ({cause})"
            if is_lost:
                raise RoleLostError(line) from error
            hint = "is the disk full?" if self._engine.dialect.name == "sqlite" else "is the server well?"
            raise LedgerError(
                f"{line}; {hint} Nothing that was acknowledged is lost: mend it and continue with --resume"
            ) from error

    def _keep_to_one_connection(self) -> None:
        """Another one would not hold the lock; SQLAlchemy makes one in place of one that is lost, without a word."""

        @event.listens_for(self._engine, "do_connect")
        def _refuse(*_: object) -> None:
            if self._has_lock:
                raise RoleLostError(f"the ledger {self.name}: this writer's connection is lost, and its lock with it")

    def _become_the_writer(self) -> None:
        """Make the schema, and hold its lock for as long as this process lives."""
        if self._schema is None:
            # The run folder's lock keeps other runs away; a writer of this run that was given up may come back.
            with self._writer.begin() as connection:
                turn = _turn(connection) + 1
                connection.exec_driver_sql(f"PRAGMA user_version = {turn}")
            self._turn = turn
            return
        with self._engine.begin() as connection:
            connection.execute(CreateSchema(self._schema, if_not_exists=True))
        try:
            with self._engine.begin() as connection:
                connection.execute(text(f"SET lock_timeout = '{_LOCK_SECONDS}s'"))
                # The session's, which lasts longer than this transaction: as long as the connection.
                lock = text("SELECT pg_advisory_lock(hashtext(:name))")
                connection.execute(lock, {"name": f"pilaf-ray {self._schema}"})
                self._has_lock = True
                connection.execute(text("RESET lock_timeout"))
        except OperationalError as error:
            self.close()
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
            raise LedgerError(
                f"the ledger {self.name} of run '{self._schema}' is in use by a running job: stop it, or choose "
                "another run.name"
            ) from error

    def _check_layout(self) -> None:
        tables = set(inspect(self._engine).get_table_names(schema=self._schema))
        known: list[int] = []
        if ledger.name in tables:
            with self._engine.connect() as connection:
                known = list(connection.scalars(select(ledger.c.schema_version)))
        if known == [SCHEMA_VERSION]:
            return
        if "pairs" in tables or self._read_only:
            found = f"layout {known[0]}" if known else "an older layout"
            raise LedgerError(
                f"the ledger {self.name} has {found if tables else 'no tables'}, this version of pilaf-ray reads "
                f"{SCHEMA_VERSION}: go on with the version that wrote it, or start a new run"
            )
        with self.writing() as connection:
            Base.metadata.create_all(connection)
            connection.execute(ledger.insert().values(schema_version=SCHEMA_VERSION))


def _turn(connection: Connection) -> int:
    """The number of the file's newest writer; SQLite keeps it in the header for its users."""
    return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())


def _make_engine(url: str, *, read_only: bool) -> Engine:
    try:
        if read_only:
            engine = create_engine(_read_only_file(url))
        elif make_url(url).get_backend_name() == "postgresql":
            engine = create_engine(url, poolclass=StaticPool)
        else:
            engine = create_engine(url)
    except ModuleNotFoundError as error:
        raise LedgerError(
            f"store.url needs the Python package '{error.name}': install it, e.g. pip install 'pilaf-ray[postgres]'"
        ) from error
    except (ArgumentError, NoSuchModuleError) as error:
        # The text of the error may hold the URL, and with it a password.
        raise LedgerError(
            "store.url is no SQLAlchemy URL of a known database: write sqlite:///FILE or postgresql+psycopg://…"
        ) from error
    if engine.dialect.name == "sqlite":
        _set_up_sqlite(engine, read_only=read_only)
    return engine


def _read_only_file(url: str) -> str:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return url
    return parsed.set(database=f"file:{parsed.database}", query={"mode": "ro", "uri": "true"}).render_as_string()


def _set_up_sqlite(engine: Engine, *, read_only: bool) -> None:
    """Readers beside the writer, every commit on disk before it returns, and no lock taken half-way."""

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: object) -> None:
        # Otherwise the driver begins transactions by itself, and only at the first write.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA busy_timeout=30000")
        cursor.execute("PRAGMA foreign_keys=ON")
        if not read_only:
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
