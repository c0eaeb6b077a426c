"""Where a run's ledger is, for its writer and for everybody who looks."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import make_url


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerLocation:
    """Arguments of :class:`pilaf_ray.store.database.LedgerDatabase`; its text never shows a password."""

    url: str = field(repr=False)
    namespace: str


def ledger_location(run_folder: Path, *, url: str | None) -> LedgerLocation:
    """The ledger of the run in ``run_folder``: at ``url``, or a file in the folder when that is None.

    A server's password comes from PGPASSWORD here, so that a writer on another node has it too;
    without that variable the client library looks for one, e.g. in ``~/.pgpass``.
    """
    folder = run_folder.resolve()
    if url is None:
        return LedgerLocation(url=f"sqlite:///{folder / 'preferences.db'}", namespace=folder.name)
    parsed = make_url(url)
    password = os.environ.get("PGPASSWORD")
    if parsed.get_backend_name() == "postgresql" and password:
        parsed = parsed.set(password=password)
    return LedgerLocation(url=parsed.render_as_string(hide_password=False), namespace=folder.name)
