"""Where the ledger lives."""

from urllib.parse import parse_qs, urlsplit

from pydantic import Field, field_validator

from pilaf_ray.config.base import Section

_KINDS = ("sqlite", "postgresql+psycopg")


class StoreSection(Section):
    """The ledger's database."""

    url: str | None = Field(default=None, examples=["postgresql+psycopg://pilaf@db.example/pilaf"])
    """SQLAlchemy URL without a password; preferences.db in the run folder when left out. See docs/operations.md."""

    compact_after_steps: int | None = Field(default=None, ge=1)
    """Drop answers of pairs this many steps after their training, but for those that people judged; None keeps all.
    Labels, plans and counts stay. See docs/operations.md for what needs the answers."""

    @field_validator("url")
    @classmethod
    def _is_safe_to_print(cls, url: str | None) -> str | None:
        """Configurations are saved, logged and handed to schedulers, so no password may stand in one."""
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.password is not None or "password" in parse_qs(parts.query):
            raise ValueError("keep the password out of the URL: set PGPASSWORD, or put it into ~/.pgpass")
        if parts.scheme not in _KINDS:
            raise ValueError(f"'{parts.scheme}' is none of the databases that are supported: {', '.join(_KINDS)}")
        if parts.scheme == "sqlite" and not parts.path.startswith("//"):
            raise ValueError("write the file's whole path, sqlite:////FOLDER/FILE: roles start in folders of their own")
        return url
