"""In which number format each role computes: what ``auto`` stands for, and where float16 is."""

from dataclasses import dataclass

from pilaf_ray.config.oracle import RewardModelOracleConfig
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.device import resolve_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleFormats:
    """``float32``, ``bfloat16`` or ``float16`` for each role, by where it runs."""

    generator: str
    reference: str
    learner: str
    reward: str | None
    """None without a reward model."""


def role_formats(config: RunConfig) -> RoleFormats:
    """What ``auto`` stands for in each role, by the GPUs that it reserves."""
    r, reward = config.resources, config.reward_model
    return RoleFormats(
        generator=resolve_dtype(config.model.dtype, on_gpu=r.generator.gpus > 0),
        reference=resolve_dtype(config.model.dtype, on_gpu=r.reference.gpus > 0),
        learner=resolve_dtype(config.learner.precision, on_gpu=r.learner.gpus > 0),
        reward=None if reward is None else resolve_dtype(reward.precision, on_gpu=r.reward.gpus > 0),
    )


def oracle_format(oracle: RewardModelOracleConfig, *, gpus: float) -> str:
    """The same for an oracle that is a model; ``oracle.device`` says more than a reservation."""
    return resolve_dtype(oracle.dtype, on_gpu=oracle.device == "cuda" or (oracle.device == "auto" and gpus > 0))
