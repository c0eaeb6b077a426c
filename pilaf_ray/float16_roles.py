"""What float16 needs of this machine's CPU where roles run on it: said before anything is loaded."""

from collections.abc import Callable, Iterator

from pilaf_ray.config.oracle import RewardModelOracleConfig
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.device import cpu_has_float16
from pilaf_ray.engines.loss_scale import FLOAT16, float16_refusal
from pilaf_ray.errors import ConfigError
from pilaf_ray.resource_plan import cluster_address
from pilaf_ray.role_formats import oracle_format, role_formats


def check_float16_roles(config: RunConfig, *, has_units: Callable[[], bool] = cpu_has_float16) -> None:
    """Refuse learners in float16 on a CPU that has no units for it; elsewhere ranks look at their own nodes.

    Raises:
        ConfigError: DeepSpeed would refuse.
    """
    resources, formats = config.resources, role_formats(config)
    learners = {
        "learner.precision": formats.learner == FLOAT16 and not resources.learner.gpus,
        "reward_model.precision": formats.reward == FLOAT16 and not resources.reward.gpus,
    }
    for setting, on_cpu in learners.items():
        if on_cpu and cluster_address(config) is None and not has_units():
            raise ConfigError(float16_refusal(setting))


def slow_float16_roles(config: RunConfig, *, has_units: Callable[[], bool] = cpu_has_float16) -> list[str]:
    """One line for each setting whose roles will compute in float16 on a CPU that has no units for it."""
    settings = list(dict.fromkeys(_forward_only(config)))
    if not settings or cluster_address(config) is not None or has_units():
        return []
    return [
        f"{setting}: float16 is many times slower than float32 on this machine's CPU, which has no fp16 units: "
        f"set {setting}: float32"
        for setting in settings
    ]


def _forward_only(config: RunConfig) -> Iterator[str]:
    """Settings that put roles which train nothing in float16 on CPUs."""
    resources, formats = config.resources, role_formats(config)
    for role, dtype in (("generator", formats.generator), ("reference", formats.reference)):
        if dtype == FLOAT16 and not getattr(resources, role).gpus:
            yield "model.dtype"
    oracle = config.scoring_oracle
    if isinstance(oracle, RewardModelOracleConfig) and oracle.device != "cuda" and not resources.oracle.gpus:
        setting = "oracle.dtype" if config.evaluation.oracle is None else "evaluation.oracle.dtype"
        if oracle_format(oracle, gpus=0) == FLOAT16:
            yield setting
