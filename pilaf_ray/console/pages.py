"""The pages that show a run: overview, roles, pairs, samples, and the live stream behind them."""

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from pilaf_ray.console.charts import charts_for, columns
from pilaf_ray.console.differences import load_tokenizer, shaded_tokens, word_differences
from pilaf_ray.console.forecast import forecast
from pilaf_ray.console.frontier import frontier_figure
from pilaf_ray.console.ledger_reader import LedgerReader, PairFilter
from pilaf_ray.console.news import News
from pilaf_ray.console.records import RunRecords
from pilaf_ray.console.rendering import Pages
from pilaf_ray.console.role_reports import role_reports
from pilaf_ray.console.visitors import Doorkeeper, Visitor
from pilaf_ray.observability.metric_table import METRICS

POLL_SECONDS = 1.0
QUIET_SECONDS = 10.0
"""Figures that nothing has changed are sent so often, because they say how long ago things were."""
FIGURES = "_figures.html.j2"
AGE_STEPS = 50
SAMPLE_PROMPTS = 12
STATES = ("planned", "sampled", "labeled", "trained", "abstained", "rejected", "expired")


def dashboard(records: RunRecords, ledger: LedgerReader, pages: Pages, doors: Doorkeeper) -> APIRouter:
    """Routes for everyone who may view."""
    router = APIRouter()
    router.include_router(run_pages(records, ledger, pages, doors))
    router.include_router(pair_pages(records, ledger, pages, doors))
    return router


def run_pages(records: RunRecords, ledger: LedgerReader, pages: Pages, doors: Doorkeeper) -> APIRouter:
    """The run as a whole, and the live stream behind it."""
    router = APIRouter()
    values, news = partial(_figures, records, ledger), News(records)
    see = Annotated[Visitor, Depends(doors.allow(lambda role: role.may_view))]

    @router.get("/", response_class=HTMLResponse)
    def overview(request: Request, visitor: see) -> HTMLResponse:
        records.refresh()
        # A key without any value, such as the reward of answers that only people judge, gets no empty chart.
        keys = dict.fromkeys(key for row in records.metrics[-50:] for key, value in row.items() if value is not None)
        in_flight = (records.bound + 1) * records.batch_pairs
        shown = charts_for(keys, bound=records.bound, in_flight=in_flight)
        return pages.show(request, visitor, "overview.html.j2", charts=shown, figures=pages.shared(FIGURES, values))

    @router.get("/live", response_class=EventSourceResponse)
    async def live(request: Request, visitor: see) -> AsyncIterator[ServerSentEvent]:
        generation, sent = -1, 0
        records.refresh()
        while not await request.is_disconnected():
            stamp = records.stamp
            if records.generation != generation:
                generation, sent = records.generation, len(records.metrics)
                yield ServerSentEvent(event="snapshot", data=columns(records.metrics))
            elif sent < len(records.metrics):
                rows, sent = records.metrics[sent:], len(records.metrics)
                yield ServerSentEvent(event="rows", data=columns(rows))
            # Ready figures go out with the stream: a request of every viewer after every step would cost far more.
            figures = pages.kept(FIGURES) or await run_in_threadpool(pages.shared, FIGURES, values)
            yield ServerSentEvent(event="figures", data=figures)
            await news.after(stamp, seconds=QUIET_SECONDS)

    @router.get("/roles", response_class=HTMLResponse)
    def roles(request: Request, visitor: see) -> HTMLResponse:
        records.refresh()
        newest = list(records.events)[-200:][::-1]
        return pages.show(request, visitor, "roles.html.j2", roles=role_reports(records), events=newest)

    @router.get("/samples", response_class=HTMLResponse)
    def samples(request: Request, visitor: see) -> HTMLResponse:
        records.refresh()
        return pages.show(request, visitor, "samples.html.j2", samples=records.samples(SAMPLE_PROMPTS))

    return router


def pair_pages(records: RunRecords, ledger: LedgerReader, pages: Pages, doors: Doorkeeper) -> APIRouter:
    """The list of pairs, and each with its provenance."""
    router = APIRouter()
    see = Annotated[Visitor, Depends(doors.allow(lambda role: role.may_view))]
    tokenizer = load_tokenizer(records.path, records.config["model"]["policy"])

    @router.get("/pairs", response_class=HTMLResponse)
    def pairs(
        request: Request, visitor: see, state: str = "", branch: str = "", source: str = "", age: str = "",
        text: str = "", tie: str = "", split: str = "", before: int | None = None,
    ) -> HTMLResponse:  # fmt: skip
        wanted = PairFilter(
            state=state, branch=branch.strip(), source=source.strip(), text=text.strip()[:200],
            min_age=int(age) if age.isdigit() else None, tie=bool(tie), disagreement=bool(split),
        )  # fmt: skip
        page = ledger.page(wanted, before=before)
        query = {
            "state": state,
            "branch": branch,
            "source": source,
            "age": age,
            "text": text,
            "tie": tie,
            "split": split,
        }
        partial = request.headers.get("HX-Request") == "true"
        template = "_pair_rows.html.j2" if partial else "pairs.html.j2"
        return pages.show(
            request, visitor, template, page=page, wanted=wanted, states=STATES, before=before,
            query={key: value for key, value in query.items() if value},
        )  # fmt: skip

    @router.get("/pairs/{pair_id}", response_class=HTMLResponse)
    def pair(request: Request, visitor: see, pair_id: str) -> HTMLResponse:
        detail = ledger.pair(pair_id)
        if detail is None:
            raise HTTPException(404, "the ledger holds no such pair")
        sides: list[dict[str, Any]] = []
        if detail.pair is not None:
            diff_a, diff_b = word_differences(detail.pair.a.text, detail.pair.b.text)
            for name, response, segments in (("a", detail.pair.a, diff_a), ("b", detail.pair.b, diff_b)):
                reference = getattr(detail.reference, name) if detail.reference else None
                tokens = shaded_tokens(response, tokenizer)
                sides.append(
                    {"name": name, "response": response, "segments": segments, "tokens": tokens, "reference": reference}
                )
        return pages.show(request, visitor, "pair.html.j2", pair=detail, sides=sides)

    return router


def _figures(records: RunRecords, ledger: LedgerReader) -> dict[str, Any]:
    """What the overview says in figures."""
    counts = ledger.counts()
    step = int(records.latest.get("step", 0))
    ages = ledger.ages(newest_step=step, steps=AGE_STEPS)
    status = records.status()
    evaluations = records.evaluations
    versions = [event for event in records.events if event["event"] == "weights"]
    return {
        "latest": records.latest,
        "definitions": {d.key: d for d in METRICS},
        "counts": {state: counts.get(state, 0) for state in STATES},
        "total_pairs": sum(counts.values()),
        "ages": {age: ages.get(age, 0) for age in range(max([records.bound, *ages], default=0) + 1)} if ages else {},
        "age_steps": AGE_STEPS,
        "status": replace(status, roles=status.roles) if status else None,
        "evaluations": evaluations,
        "frontier": frontier_figure(evaluations, beta=records.beta),
        "version": versions[-1]["version"] if versions else 0,
        "version_time": versions[-1]["time"] if versions else None,
        "plan": forecast(records, counts, now=time.time()),
    }
