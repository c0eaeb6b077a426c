"""The pages for people: labelling, and the lead's view of the annotators."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, HTTPException, Request
from fastapi.responses import HTMLResponse, Response

from pilaf_ray.console.access import AccessRole
from pilaf_ray.console.annotators import annotator_reports
from pilaf_ray.console.labelling import BUTTONS, MAX_TEXT, Answer, Labelling, as_choice
from pilaf_ray.console.rendering import Pages
from pilaf_ray.console.visitors import Doorkeeper, Visitor
from pilaf_ray.errors import AccessError, LedgerError

MAX_REASON_SECONDS = 24 * 3600.0


def label_pages(labelling: Labelling, pages: Pages, doors: Doorkeeper) -> APIRouter:
    """Routes for annotators."""
    router = APIRouter()
    label = Annotated[Visitor, Depends(doors.allow(lambda role: role.may_label))]

    async def shown(request: Request, visitor: Visitor, template: str, notice: str = "") -> HTMLResponse:
        task = None if visitor.paused else await labelling.task(visitor.name)
        progress, backlog = await labelling.standing(visitor.name)
        return pages.show(
            request, visitor, template, task=task, progress=progress, backlog=backlog, notice=notice,
            buttons=BUTTONS, settings=labelling.settings, guidelines=labelling.guidelines, max_text=MAX_TEXT,
        )  # fmt: skip

    @router.get("/label", response_class=HTMLResponse)
    async def page(request: Request, visitor: label) -> HTMLResponse:
        return await shown(request, visitor, "label.html.j2")

    @router.get("/label/task", response_class=HTMLResponse)
    async def task(request: Request, visitor: label) -> HTMLResponse:
        return await shown(request, visitor, "_task.html.j2")

    @router.post("/label/answer", response_class=HTMLResponse)
    async def answer(
        request: Request, visitor: label,
        number: Annotated[int, Form()], pair: Annotated[str, Form(max_length=80)],
        choice: Annotated[str, Form(max_length=20)], reason: Annotated[str, Form(max_length=MAX_TEXT)] = "",
        seconds: Annotated[float | None, Form(ge=0)] = None,
    ) -> HTMLResponse:  # fmt: skip
        try:
            given = Answer(
                number=number, pair_id=pair, choice=as_choice(choice), reason=reason.strip(),
                seconds=None if seconds is None else min(seconds, MAX_REASON_SECONDS),
                aspects=_aspects(await request.form(), labelling.settings.aspects),
            )  # fmt: skip
            kept = await labelling.answer(visitor.name, given)
        except (LedgerError, ValueError) as error:
            raise HTTPException(409, str(error)) from error
        notice = "Saved."
        if kept.late:
            notice = "Saved, but late: the pair had gone on without this answer, which will not be trained on."
        return await shown(request, visitor, "_task.html.j2", notice)

    @router.post("/label/undo", response_class=HTMLResponse)
    async def undo(request: Request, visitor: label) -> HTMLResponse:
        event = await labelling.desk.undo(visitor.name)
        notice = "Your last answer is taken back."
        if event is None:
            notice = "There is nothing to take back."
        elif event.late:
            notice = "Your last answer is in use already and cannot be taken back."
        return await shown(request, visitor, "_task.html.j2", notice)

    @router.post("/label/renew")
    async def renew(visitor: label, number: Annotated[int, Form()]) -> Response:
        try:
            await labelling.desk.renew(number, visitor.name)
        except LedgerError as error:
            raise HTTPException(409, str(error)) from error
        return Response(status_code=204)

    return router


def _aspects(form: Any, known: tuple[str, ...]) -> tuple[tuple[str, str, int], ...]:
    """Ratings of the form's fields ``aspect-<n>-<side>``; what is no rating from 1 to 5 is left out."""
    found = []
    for number, aspect in enumerate(known):
        for side in ("left", "right"):
            value = str(form.get(f"aspect-{number}-{side}", ""))
            if value in ("1", "2", "3", "4", "5"):
                found.append((aspect, side, int(value)))
    return tuple(found)


def lead_pages(labelling: Labelling, pages: Pages, doors: Doorkeeper) -> APIRouter:
    """Routes for the lead of the annotators."""
    router = APIRouter()
    lead = Annotated[Visitor, Depends(doors.allow(lambda role: role is AccessRole.LEAD))]

    async def shown(request: Request, visitor: Visitor, notice: str = "", link: str = "") -> HTMLResponse:
        reports = annotator_reports(await labelling.desk.history(), doors.book.grants(), labelling.gold)
        backlog = await labelling.desk.backlog()
        return pages.show(
            request, visitor, "lead.html.j2", reports=reports, backlog=backlog, notice=notice, link=link,
            has_gold=labelling.settings.gold is not None, clock=time.time(),
        )  # fmt: skip

    @router.get("/lead", response_class=HTMLResponse)
    async def page(request: Request, visitor: lead) -> HTMLResponse:
        return await shown(request, visitor)

    @router.post("/lead/act", response_class=HTMLResponse)
    async def act(
        request: Request, visitor: lead, name: Annotated[str, Form(max_length=40)],
        action: Annotated[str, Form(pattern="^(pause|resume|requeue|revoke)$")],
    ) -> HTMLResponse:  # fmt: skip
        try:
            if action == "requeue":
                count = await labelling.desk.requeue(name)
                return await shown(request, visitor, f"{count} answers of {name} are taken back and asked again.")
            if action == "revoke":
                doors.book.revoke(name)
                return await shown(request, visitor, f"{name}'s token opens nothing any more.")
        except AccessError as error:
            return await shown(request, visitor, str(error))
        doors.book.pause(name, paused=action == "pause")
        return await shown(request, visitor, f"{name} is {'paused' if action == 'pause' else 'at work again'}.")

    @router.post("/lead/invite", response_class=HTMLResponse)
    async def invite(
        request: Request, visitor: lead, name: Annotated[str, Form(max_length=40)],
        role: Annotated[AccessRole, Form()] = AccessRole.ANNOTATOR,
    ) -> HTMLResponse:  # fmt: skip
        try:
            secret = doors.book.issue(name.strip(), role)
        except AccessError as error:
            return await shown(request, visitor, str(error))
        link = f"{request.url.scheme}://{request.headers['host']}/enter#{secret}"
        return await shown(request, visitor, f"The invitation of {name}, shown this once:", link)

    return router
