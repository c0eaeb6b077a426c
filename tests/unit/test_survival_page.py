"""The page of faults holds what the command prints."""

import re
from pathlib import Path

import pytest

from benchmarks.chaos_journal import RESULTS
from benchmarks.chaos_table import main

PAGE = Path(__file__).parents[2] / "docs" / "survival.md"


def test_the_page_holds_the_table_of_all_faults(capsys: pytest.CaptureFixture[str]) -> None:
    main(RESULTS, "tiny.yaml", "")
    (shown,) = re.findall(r"<!-- python -m benchmarks.chaos_table -->\n(.*?)<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert capsys.readouterr().out == shown
