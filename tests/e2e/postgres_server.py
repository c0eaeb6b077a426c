"""A PostgreSQL server for tests: the one that PILAF_TEST_POSTGRES_URL names, or a private one from Debian's package."""

import getpass
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


@contextmanager
def postgres_url() -> Iterator[str]:
    """SQLAlchemy URL of an empty database, or of one where every test makes a schema of its own; skips without any."""
    if given := os.environ.get(VARIABLE):
        yield given
        return
    found = sorted(BINARIES.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if not found:
        pytest.skip(f"no PostgreSQL: set {VARIABLE}, or install Debian's postgresql")
    # The server refuses to run as root; its package brings a user for it.
    user = "postgres" if os.geteuid() == 0 else getpass.getuser()
    folder = Path(tempfile.mkdtemp(prefix="pilaf-postgres-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, user)
        yield from _serve(found[-1].parent, folder, user)
    finally:
        shutil.rmtree(folder)


def _serve(binaries: Path, folder: Path, user: str) -> Iterator[str]:
    def run(*command: str | Path) -> None:
        options = {"user": user} if os.geteuid() == 0 else {}
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, **options)

    data = folder / "data"
    run(binaries / "initdb", "--pgdata", data, "--auth=trust", "--encoding=UTF8", "--username=pilaf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Writers are killed here, not machines: nothing has to reach the disk.
    options = f"-F -c listen_addresses=127.0.0.1 -p {port} -k {folder}"
    run(binaries / "pg_ctl", "--pgdata", data, "--wait", "--log", folder / "log", "--options", options, "start")
    try:
        yield f"postgresql+psycopg://pilaf@127.0.0.1:{port}/postgres"
    finally:
        run(binaries / "pg_ctl", "--pgdata", data, "--wait", "--mode=immediate", "stop")
