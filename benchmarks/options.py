"""Options that the benchmarks share."""

from collections.abc import Callable
from typing import TypeVar

import typer

Number = TypeVar("Number", int, float)


def several(text: str, kind: Callable[[str], Number]) -> list[Number]:
    """The numbers of ``"8,16,32"``; none in an empty text. Raises BadParameter where one is no number."""
    try:
        return [kind(part) for part in text.split(",") if part]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers with commas between them") from error
