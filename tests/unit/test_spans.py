"""Spans on a clock set by hand."""

import pytest

from pilaf_ray.observability.spans import Spans


def test_spans_add_up_nest_and_count_failures() -> None:
    now = [0.0]
    spans = Spans(clock=lambda: now[0])
    with spans.measure("training"):
        now[0] += 2.0
        with spans.measure("checkpoint"):
            now[0] += 0.5
    with pytest.raises(KeyError), spans.measure("checkpoint"):
        now[0] += 0.25
        raise KeyError
    assert spans.seconds == {"checkpoint": 0.75, "training": 2.5}
