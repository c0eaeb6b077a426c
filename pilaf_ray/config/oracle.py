"""Settings of the preference oracles."""

from typing import Annotated, Literal

from pydantic import Field

from pilaf_ray.config.base import Dtype, Section


class BradleyTerryRuleConfig(Section):
    """A label drawn with probability σ((r_a − r_b) / temperature)."""

    type: Literal["bradley_terry"] = "bradley_terry"
    """Discriminator."""
    temperature: float = Field(default=1.0, gt=0)
    """Label noise: higher is noisier."""


class ArgmaxRuleConfig(Section):
    """The higher reward wins; equal rewards are a tie."""

    type: Literal["argmax"] = "argmax"
    """Discriminator."""


class SoftRuleConfig(Section):
    """The probability itself is the label."""

    type: Literal["soft"] = "soft"
    """Discriminator."""


LabelRuleConfig = Annotated[BradleyTerryRuleConfig | ArgmaxRuleConfig | SoftRuleConfig, Field(discriminator="type")]


class FunctionOracleConfig(Section):
    """A Python function that scores texts or compares pairs."""

    type: Literal["function"] = "function"
    """Discriminator."""
    target: str = Field(pattern=r"^[\w.]+:\w+$")
    """Importable function, package.module:callable."""
    kind: Literal["score", "compare"] = "score"
    """score(prompts, responses) -> rewards, or compare(prompts, a, b) -> P(a preferred) or None."""
    scale: float = Field(default=1.0, gt=0)
    """Multiplies rewards, so that they are log-odds."""
    replicas: int = Field(default=1, ge=1)
    """Number of replicas."""
    label_rule: LabelRuleConfig = BradleyTerryRuleConfig()
    """From rewards to a label."""


class RewardModelOracleConfig(Section):
    """A sequence-classification model with one output."""

    type: Literal["reward_model"] = "reward_model"
    """Discriminator."""
    path: str
    """Folder or hub id."""
    dtype: Dtype = "auto"
    """Number format."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs."""
    max_length: int = Field(default=1024, ge=8)
    """Longest text, in tokens."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Texts of one forward."""
    cpu_threads: int = Field(default=1, ge=1)
    """Threads on a CPU."""
    chat_template: bool = True
    """Render prompt and response with the model's own chat template."""
    replicas: int = Field(default=1, ge=1)
    """Number of replicas."""
    label_rule: LabelRuleConfig = BradleyTerryRuleConfig()
    """From rewards to a label."""


OracleConfig = Annotated[FunctionOracleConfig | RewardModelOracleConfig, Field(discriminator="type")]
