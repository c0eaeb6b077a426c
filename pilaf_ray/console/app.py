"""The console as one ASGI app."""

import ipaddress
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import RedirectResponse, Response
from fastapi.staticfiles import StaticFiles

from pilaf_ray.config.oracle import HumanOracleConfig
from pilaf_ray.console.access import AccessBook
from pilaf_ray.console.desk_access import DeskAccess
from pilaf_ray.console.entrance import entrance
from pilaf_ray.console.guard import Guard, RateLimit
from pilaf_ray.console.label_pages import label_pages, lead_pages
from pilaf_ray.console.labelling import Labelling
from pilaf_ray.console.ledger_reader import LedgerReader
from pilaf_ray.console.pages import dashboard
from pilaf_ray.console.records import RunRecords
from pilaf_ray.console.rendering import HERE, Pages
from pilaf_ray.console.visitors import Doorkeeper
from pilaf_ray.errors import PilafError
from pilaf_ray.store.location import ledger_location


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def human_settings(oracle: dict[str, Any]) -> HumanOracleConfig | None:
    """The part of the run's oracle that people are asked by, None where nobody is."""
    if oracle.get("type") == "mixture":
        oracle = oracle["people"]
    return HumanOracleConfig.model_validate(oracle) if oracle.get("type") == "human" else None


def open_reader(run: Path, config: dict[str, Any]) -> LedgerReader:
    """The run's ledger, in its folder or where its configuration says."""
    place = ledger_location(run, url=(config.get("store") or {}).get("url"))
    return LedgerReader(place.url, namespace=place.namespace)


def create_app(
    run: Path,
    *,
    host: str = "127.0.0.1",
    allowed_hosts: Sequence[str] = (),
    limit: RateLimit | None = None,
    desk: DeskAccess | None = None,
) -> FastAPI:
    """The console of a run folder.

    Args:
        run: the folder.
        host: address that the server will bind to. On loopback anyone may look; elsewhere a token is needed.
        allowed_hosts: further host names under which browsers may reach it.
        desk: where labels go; without one there is no labelling page.

    Raises:
        RunFolderError: the folder holds no run.
    """
    records = RunRecords(run)
    ledger = open_reader(run, records.config)
    doors = Doorkeeper(AccessBook(run / "access.json"), open_to_viewers=is_loopback(host))
    settings = human_settings(records.config["oracle"])
    pages = Pages(records, labelling=desk is not None and settings is not None)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        ledger.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    hosts = {"localhost", "127.0.0.1", "[::1]", host, *allowed_hosts}
    app.add_middleware(Guard, hosts=sorted(hosts), limit=limit or RateLimit(per_second=30, burst=120))
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    app.include_router(dashboard(records, ledger, pages, doors))
    if desk is not None and settings is not None:
        labelling = Labelling(settings, desk, ledger, run)
        app.include_router(label_pages(labelling, pages, doors))
        app.include_router(lead_pages(labelling, pages, doors))

    app.include_router(entrance(pages, doors))

    @app.exception_handler(PilafError)
    def trouble(request: Request, error: PilafError) -> Response:
        return pages.show(request, None, "problem.html.j2", code=503, problem=str(error))

    @app.exception_handler(HTTPException)
    def explain(request: Request, error: HTTPException) -> Response:
        if error.status_code == 401 and request.method == "GET":
            return RedirectResponse("/enter", 303)
        return pages.show(request, None, "problem.html.j2", code=error.status_code, problem=error.detail)

    return app
