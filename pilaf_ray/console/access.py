"""Who may see and do what: named tokens, hashed at rest.

A token is a 256-bit random secret, so one round of SHA-256 is enough at rest. It is shown once, when it is
issued; the file holds its hash only and can be read by its owner only.
"""

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

from pilaf_ray.errors import AccessError


class AccessRole(StrEnum):
    """What a visitor may do: see the run; label, blind to everything else; both, and manage the annotators."""

    VIEWER = "viewer"
    ANNOTATOR = "annotator"
    LEAD = "lead"

    @property
    def may_view(self) -> bool:
        """Whether the dashboard is open. Not to annotators: it shows what they must be blind to."""
        return self is not AccessRole.ANNOTATOR

    @property
    def may_label(self) -> bool:
        """Whether the labelling page is open."""
        return self is not AccessRole.VIEWER


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """A token that was issued, without its secret."""

    name: str
    role: AccessRole
    sha256: str
    created: float
    revoked: float | None = None
    paused: bool = False
    """A paused annotator keeps the page but gets no pairs."""


class AccessBook:
    """The grants of one run, in a file that several processes may change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._grants: list[Grant] = []

    def grants(self) -> list[Grant]:
        """All grants, in order of issue; read again when the file has changed."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return []
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp != self._seen:
            self._grants = self._read()
            self._seen = stamp
        return list(self._grants)

    def issue(self, name: str, role: AccessRole) -> str:
        """A new token for ``name``; returns the secret, which is kept nowhere.

        Raises:
            AccessError: the name is not plain, or holds a valid token already.
        """
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,40}", name):
            raise AccessError(f"'{name}' cannot be a name: use up to 40 letters, digits, dots, dashes or underscores")
        secret = secrets.token_urlsafe(32)
        with self._changed() as grants:
            if any(grant.name == name and grant.revoked is None for grant in grants):
                raise AccessError(f"{name} has a token already: revoke it first")
            grants.append(Grant(name=name, role=role, sha256=_digest(secret), created=time.time()))
        return secret

    def revoke(self, name: str) -> None:
        """End every token of ``name`` at once; AccessError if there is none."""
        with self._changed() as grants:
            found = [number for number, grant in enumerate(grants) if grant.name == name and grant.revoked is None]
            if not found:
                raise AccessError(f"{name} holds no valid token")
            for number in found:
                grants[number] = replace(grants[number], revoked=time.time())

    def pause(self, name: str, *, paused: bool) -> None:
        """Stop or resume handing pairs to ``name``."""
        with self._changed() as grants:
            for number, grant in enumerate(grants):
                if grant.name == name:
                    grants[number] = replace(grant, paused=paused)

    def find(self, secret: str) -> Grant | None:
        """The valid grant behind ``secret``. Every grant is compared, in constant time."""
        digest, found = _digest(secret), None
        for grant in self.grants():
            if hmac.compare_digest(grant.sha256, digest) and grant.revoked is None:
                found = grant
        return found

    def _read(self) -> list[Grant]:
        if not self._path.exists():
            return []
        rows = json.loads(self._path.read_text())["tokens"]
        return [Grant(**{**row, "role": AccessRole(row["role"])}) for row in rows]

    @contextmanager
    def _changed(self) -> Iterator[list[Grant]]:
        """The grants to change, written back whole under a lock."""
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            grants = self._read()
            yield grants
            draft = self._path.with_suffix(".tmp")
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
                json.dump({"tokens": [asdict(grant) for grant in grants]}, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(self._path)


def form_token(secret: str) -> str:
    """What a form of this visitor must carry. Another site can send the cookie but cannot read this."""
    return hmac.new(secret.encode(), b"pilaf-ray form", hashlib.sha256).hexdigest()


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
