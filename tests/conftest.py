"""Which tests run."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--long`` adds the tests that ``make test`` leaves out."""
    parser.addoption("--long", action="store_true", help="also run the tests that are marked long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long tests out unless they are asked for, and say so."""
    if not config.getoption("--long"):
        skip = pytest.mark.skip(reason="long: run with --long, or make test-long")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)
