"""How visitors come in with a token, and leave."""

from typing import Annotated

from fastapi import APIRouter, Form, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from pilaf_ray.console.access import AccessRole
from pilaf_ray.console.guard import RateLimit
from pilaf_ray.console.rendering import Pages
from pilaf_ray.console.visitors import COOKIE, Doorkeeper

COOKIE_SECONDS = 30 * 24 * 3600


def entrance(pages: Pages, doors: Doorkeeper) -> APIRouter:
    """Routes for everyone. After ten wrong tokens from one address, the next may come every five seconds."""
    router = APIRouter()
    failures = RateLimit(per_second=0.2, burst=10)

    @router.get("/enter", response_class=HTMLResponse)
    def ask(request: Request) -> HTMLResponse:
        return pages.show(request, None, "enter.html.j2", problem="")

    @router.post("/enter")
    def enter(request: Request, token: Annotated[str, Form(max_length=200)]) -> Response:
        client = request.client.host if request.client else ""
        grant = doors.book.find(token.strip())
        if grant is None:
            if failures.wait_seconds(client) > 0:
                raise HTTPException(429, "too many wrong tokens; wait a little")
            problem = "This token is not valid; ask whoever runs the training for a new one."
            return pages.show(request, None, "enter.html.j2", code=401, problem=problem)
        home = "/label" if grant.role is AccessRole.ANNOTATOR else "/"
        answer = RedirectResponse(home, 303)
        answer.set_cookie(
            COOKIE, token.strip(), max_age=COOKIE_SECONDS, httponly=True, samesite="strict",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return answer

    @router.post("/leave")
    def leave() -> Response:
        answer = RedirectResponse("/enter", 303)
        answer.delete_cookie(COOKIE)
        return answer

    return router
