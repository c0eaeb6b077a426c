"""Which checkpoints there are, and where."""

from urllib.parse import urlsplit

from pydantic import Field, field_validator

from pilaf_ray.config.base import Section


class CheckpointSection(Section):
    """Checkpoints."""

    every_steps: int = Field(default=50, ge=1)
    """One is always written at the end, too."""
    keep_last: int = Field(default=2, ge=1)
    """Older ones are removed, except for:"""
    keep_best: int = Field(default=0, ge=0)
    """So many with the highest J on the held-out prompts, of those that were evaluated (evaluation.every_steps)."""
    keep_every: int | None = Field(default=None, ge=1)
    """Those of steps that are multiples of it."""
    mirror: str | None = Field(default=None, examples=["s3://bucket/runs"])
    """An fsspec location that checkpoints are copied to beside the run, with what else a resumption needs."""
    mirror_seconds: float = Field(default=600.0, gt=0)
    """Deadline of each call to that location, e.g. for the files of one checkpoint."""

    @field_validator("mirror")
    @classmethod
    def _is_a_url_without_secrets(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if not parts.scheme:
            raise ValueError(f"'{url}' is no location: write s3://BUCKET/FOLDER, say, or file:///FOLDER")
        if parts.password is not None:
            raise ValueError("keep secrets out of the URL: set what the file system reads from the environment")
        return url
