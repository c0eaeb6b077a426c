"""Unit tests run without a cluster, whatever they import."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import pytest


@pytest.fixture(autouse=True)
def forbid_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """``ray.init`` raises where ray is imported already; ray is not imported for this.

    Returns what does it, for a test that imports ray itself.
    """

    def refuse(*_arguments: Any, **_settings: Any) -> NoReturn:
        raise AssertionError("a unit test started Ray: move it to tests/ray, or inject a fake")

    def forbid() -> None:
        if "ray" in sys.modules:
            monkeypatch.setattr(sys.modules["ray"], "init", refuse)

    forbid()
    return forbid
