"""Unit tests run without a cluster, whatever they import."""

import sys
from typing import Any, NoReturn

import pytest


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """``ray.init`` raises; ray itself is not imported for this."""

    def refuse(*_arguments: Any, **_settings: Any) -> NoReturn:
        raise AssertionError("a unit test started Ray: move it to tests/ray, or inject a fake")

    if "ray" in sys.modules:
        monkeypatch.setattr(sys.modules["ray"], "init", refuse)
