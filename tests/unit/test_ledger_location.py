"""Where the ledger is: configuration, passwords, what is printed."""

import json
from pathlib import Path

import pytest

from pilaf_ray.config.loader import load_config
from pilaf_ray.errors import ConfigError, LedgerError
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.store.location import ledger_location

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+psycopg://ada:hunter2@db/x", "keep the password out of the URL: set PGPASSWORD"),
        ("postgresql+psycopg://db/x?password=hunter2", "keep the password out of the URL"),
        ("mysql://db/x", "'mysql' is none of the databases that are supported: sqlite, postgresql"),
        ("sqlite:///relative.db", "write the file's whole path"),
    ],
)
def test_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(TINY, [f"store.url={url}"])
    assert "hunter2" not in str(caught.value)


def test_the_default_is_a_file_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    assert load_config(TINY).store.url is None
    found = ledger_location(tmp_path / "quick", url=None)
    assert (found.url, found.namespace) == (f"sqlite:///{tmp_path}/quick/preferences.db", "quick")


def test_a_password_reaches_the_writer_and_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    config = load_config(TINY, ["store.url=postgresql+psycopg://ada@db:5432/x"])
    found = ledger_location(tmp_path / "quick", url=config.store.url)
    assert found.url == "postgresql+psycopg://ada:hunter2@db:5432/x"
    assert "hunter2" not in repr(found) + json.dumps(config.model_dump(mode="json"))


def test_nonsense_is_one_line_that_does_not_repeat_it() -> None:
    with pytest.raises(LedgerError, match="no SQLAlchemy URL of a known database") as caught:
        PreferenceLedger("nonsense://ada:hunter2@db/x")
    assert "hunter2" not in str(caught.value)
