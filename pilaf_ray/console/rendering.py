"""Pages from templates; everything that a model or a person wrote is escaped."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from pilaf_ray.console.records import RunRecords
from pilaf_ray.console.visitors import Visitor

HERE = Path(__file__).parent
SHARED_SECONDS = 1.0
WAITS = {
    "labels": "The learner waits for labels: the next pairs in the order are not labelled yet.",
    "responses": "The learner waits for responses: the generators are still sampling the next pairs.",
}


class Pages:
    """Renders the console's templates around one run.

    Args:
        labelling: whether the run takes labels from people.
        clock: for the age of parts that visitors share.
    """

    def __init__(self, records: RunRecords, *, labelling: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sharing = Lock()
        self._shared: dict[str, tuple[tuple[float, ...], float, Markup]] = {}
        self._records = records
        self._labelling = labelling
        self._environment = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            # The files end in .j2, so the default, which looks for .html, would leave them unescaped.
            autoescape=select_autoescape(default=True, default_for_string=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters |= {"number": number, "ago": ago, "clock": clock_time, "share": share}

    def show(
        self, request: Request, visitor: Visitor | None, template: str, *, code: int = 200, **values: Any
    ) -> HTMLResponse:
        """``template`` with ``values``, inside the console's frame where it is a whole page."""
        text = self._render(template, values | {"visitor": visitor, "path": request.url.path})
        return HTMLResponse(text, status_code=code)

    def kept(self, template: str) -> Markup | None:
        """What :meth:`shared` has and would give, without waiting for anything."""
        stamp, until, text = self._shared.get(template, ((), 0.0, Markup()))
        return text if stamp == self._records.stamp and self._clock() < until else None

    def shared(self, template: str, values: Callable[[], Mapping[str, Any]]) -> Markup:
        """A part that says the same to every visitor: made anew when the run has news, else once a second."""
        with self._sharing:
            text = self.kept(template)
            if text is None:
                stamp = self._records.stamp
                text = Markup(self._render(template, values()))
                self._shared[template] = stamp, self._clock() + SHARED_SECONDS, text
            return text

    def _render(self, template: str, values: Mapping[str, Any]) -> str:
        status, now = self._records.status(), time.time()
        state = self._records.state(now)
        waits = status.waits_for if status and state == "running" else None
        return self._environment.get_template(template).render(
            **values,
            run=self._records,
            state=state,
            phase=status.phase if status else "",
            waits=WAITS.get(waits or ""),
            labelling=self._labelling,
            now=now,
        )


def number(value: float | None, digits: int = 4) -> str:
    """A figure with ``digits`` significant digits; a dash where there is none."""
    if value is None:
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.{digits}g}"


def share(value: float | None) -> str:
    """A share in per cent."""
    return "–" if value is None else f"{100 * value:.0f} %"


def ago(seconds: float | None) -> str:
    """A stretch of time in its two largest units."""
    if seconds is None:
        return "–"
    left = max(0, round(seconds))
    for name, size, smaller, unit in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if left >= size:
            return f"{left // size} {name} {left % size // unit} {smaller}"
    return f"{left} s"


def clock_time(seconds: float) -> str:
    """Wall-clock time of the machine that shows the page."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
