"""The section ``model``: which networks a run is about, and what of the policy is trained."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pilaf_ray.config.base import Dtype, ModelName, Section


class LoraSection(Section):
    """Low-rank adapters: the reference's weights stay, and rank-sized matrices beside them are trained and sent."""

    rank: int = Field(ge=1)
    """Rank of each adapter."""
    alpha: float = Field(gt=0)
    """The policy is reference + alpha/rank · B·A."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the adapters' inputs, in training only."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Names of the modules that are adapted, e.g. [q_proj, v_proj]; all-linear: every linear layer below the head."""
    quantise: Literal["nf4"] | None = None
    """The learner holds the model in 4 bits; it, generators and reference then start from what those stand for."""


class ModelSection(Section):
    """The policy and the reference: Hugging Face folders, hub ids, or URLs of folders (s3://…), fetched once a node."""

    policy: ModelName
    """Start of the policy."""
    reference: ModelName | None = None
    """The fixed reference; model.policy when left out."""
    init_from: str | None = None
    """A run, a checkpoint of one or a model folder that the policy starts from; the reference stays what it is."""
    dtype: Dtype = "auto"
    """Of generation and reference; auto: bfloat16 where it is multiplied, else float16 on GPUs and float32 on CPUs."""
    max_length: int = Field(ge=8)
    """Longest prompt and response together, in tokens."""
    lora: LoraSection | None = None
    """Train low-rank adapters of the reference; every weight when left out."""

    @field_validator("init_from")
    @classmethod
    def _is_a_folder(cls, path: str | None) -> str | None:
        if path is not None and "://" in path:
            raise ValueError(
                f"'{path}' is a URL, and a run or a checkpoint is a folder: name it as model.policy, and what "
                "model.policy names now as model.reference"
            )
        return path

    @model_validator(mode="after")
    def _adapters_start_at_the_reference(self) -> Self:
        if self.lora is None:
            return self
        other = "model.init_from" if self.init_from is not None else "model.reference"
        if self.init_from is not None or self.reference not in (None, self.policy):
            raise ValueError(
                f"model.lora adapts the reference, and {other} makes the policy start elsewhere: leave {other} out "
                "and name the starting model as model.policy, or leave model.lora out"
            )
        return self

    @property
    def reference_path(self) -> str:
        """The reference that is used."""
        return self.reference or self.policy
