"""What every section of the configuration shares."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CpuThreads = Annotated[int, Field(ge=1)] | Literal["auto"]
"""As :data:`pilaf_ray.threads.Threads`."""


class Section(BaseModel):
    """Base of every section: frozen, and no key that is not listed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
