"""Self-contained pages: templates filled in, figures and styles inside, no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts."""

    head: Sequence[str]
    body: Sequence[Sequence[str]]
    colours: Sequence[str] = ()
    """One a row, where rows are lines of the figures."""


def render_page(template: str, *, figures: Sequence[str], **values: Any) -> str:
    """The page as text. Values are escaped; those named in ``figures`` are lists of our own SVG."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    pages = Environment(
        loader=PackageLoader("pilaf_ray.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    safe = {name: [Markup(svg) for svg in values[name]] for name in figures}
    return pages.get_template(template).render(**{**values, **safe})


def write_page(path: Path, text: str) -> None:
    """Write a page, replacing an older one at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
