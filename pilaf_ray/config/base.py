"""What every section of the configuration shares."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CpuThreads = Annotated[int, Field(ge=1)] | Literal["auto"]
"""As :data:`pilaf_ray.threads.Threads`."""


def _without_secrets(name: str) -> str:
    if "://" in name and urlsplit(name).password is not None:
        raise ValueError("keep secrets out of the URL: set what the file system reads from the environment")
    return name


ModelName = Annotated[str, AfterValidator(_without_secrets)]
"""A model's folder, hub id, or the URL of its folder, which each node fetches once."""


class Section(BaseModel):
    """Base of every section: frozen, and no key that is not listed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
