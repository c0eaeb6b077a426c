"""A PostgreSQL server for tests: the one that PILAF_TEST_POSTGRES_URL names, or a private one from Debian's package."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

VARIABLE = "PILAF_TEST_POSTGRES_URL"
BINARIES = Path("/usr/lib/postgresql")


class PostgresServer:
    """A private server on a free port of the loopback, with its files in ``folder``."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        # The server refuses to run as root; its package brings a user for it.
        self._user = "postgres" if os.geteuid() == 0 else None
        self._binaries, self._folder, self._data = binaries, folder, folder / "data"
        if self._user is not None:
            shutil.chown(folder, self._user)
        self._run("initdb", "--auth=trust", "--encoding=UTF8", "--username=pilaf")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"postgresql+psycopg://pilaf@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Returns once it answers."""
        # Writers are killed here, not machines: nothing has to reach the disk.
        options = f"-F -c listen_addresses=127.0.0.1 -p {self._port} -k {self._folder}"
        self._run("pg_ctl", "--wait", "--log", self._folder / "log", "--options", options, "start")

    def stop(self) -> None:
        """At once, as where its machine is restarted; returns when it has ended."""
        self._run("pg_ctl", "--wait", "--mode=immediate", "stop")

    def _run(self, program: str, *arguments: str | Path) -> None:
        user = {} if self._user is None else {"user": self._user}
        command = [self._binaries / program, "--pgdata", self._data, *arguments]
        subprocess.run(command, check=True, cwd=self._folder, stdout=subprocess.DEVNULL, **user)


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A private server that runs; skips where there is no PostgreSQL."""
    found = sorted(BINARIES.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if not found:
        pytest.skip(f"no PostgreSQL: set {VARIABLE}, or install Debian's postgresql")
    folder = Path(tempfile.mkdtemp(prefix="pilaf-postgres-"))
    try:
        server = PostgresServer(found[-1].parent, folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@contextmanager
def postgres_url() -> Iterator[str]:
    """SQLAlchemy URL of an empty database, or of one where every test makes a schema of its own; skips without any."""
    if given := os.environ.get(VARIABLE):
        yield given
        return
    with postgres_server() as server:
        yield server.url
