"""What every section of the configuration shares."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Dtype = Literal["auto", "float32", "bfloat16"]


class Section(BaseModel):
    """Base of every section: frozen, and no key that is not listed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
