"""Who is asking: from a request to a visitor, or a refusal."""

import hmac
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import HTTPException, Request

from pilaf_ray.console.access import AccessBook, AccessRole, Grant, form_token

COOKIE = "pilaf_token"


@dataclass(frozen=True, kw_only=True, slots=True)
class Visitor:
    """Someone with a role; without a token only where the console is open on loopback."""

    name: str
    role: AccessRole
    form: str
    """What forms of this visitor carry; empty without a token, and then no form is accepted."""
    paused: bool = False


ANYONE = Visitor(name="", role=AccessRole.VIEWER, form="")


class Doorkeeper:
    """Turns cookies into visitors.

    Args:
        open_to_viewers: whether someone without a token may look; meant for loopback only.
    """

    def __init__(self, book: AccessBook, *, open_to_viewers: bool) -> None:
        self.book = book
        self._open = open_to_viewers

    def visitor(self, request: Request) -> Visitor:
        """The visitor behind the request's cookie; 401 without a valid one where one is needed."""
        secret = request.cookies.get(COOKIE, "")
        grant = self.book.find(secret) if secret else None
        if grant is not None:
            return visitor_of(grant, secret)
        if secret or not self._open:
            raise HTTPException(401, "a valid token is needed")
        return ANYONE

    def allow(self, permitted: Callable[[AccessRole], bool]) -> Callable[[Request], Visitor]:
        """A FastAPI dependency: the visitor, or 403. What changes something must carry the form's token."""

        def check(request: Request) -> Visitor:
            visitor = self.visitor(request)
            if not permitted(visitor.role):
                raise HTTPException(403, f"this page is not for the role '{visitor.role}'")
            if request.method not in ("GET", "HEAD"):
                given = request.headers.get("x-form-token", "")
                if not visitor.form or not hmac.compare_digest(given, visitor.form):
                    raise HTTPException(403, "the page is out of date: load it again")
            return visitor

        return check


def visitor_of(grant: Grant, secret: str) -> Visitor:
    """The visitor that holds ``secret``."""
    return Visitor(name=grant.name, role=grant.role, form=form_token(secret), paused=grant.paused)
