"""Generators that come and go with a cluster's nodes."""

from typing import Self

from pydantic import Field, model_validator

from pilaf_ray.config.base import Section


class ElasticSection(Section):
    """Bounds between which the number of generators follows the cluster."""

    least: int = Field(default=1, ge=1)
    """Generators on nodes that are drained or lost are given up only while so many are left."""
    most: int = Field(ge=1)
    """New ones start where nodes have room, up to so many."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"generation.elastic.least: {self.least} is more than most: {self.most}")
        return self
