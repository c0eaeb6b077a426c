"""Who prefers what."""

from typing import Any

from pilaf_ray.oracle.base import PreferenceOracle
from pilaf_ray.oracle.label_rules import make_label_rule


def make_oracle(kind: str, arguments: dict[str, Any]) -> PreferenceOracle:
    """The oracle that ``oracle.type: kind`` names.

    Args:
        kind: ``function``, ``reward_model`` or ``judge``.
        arguments: keyword arguments of the class, with ``label_rule`` as its settings.
    """
    if kind == "judge":
        from pilaf_ray.oracle.judge import JudgeOracle

        return JudgeOracle(**arguments)
    arguments = dict(arguments)
    rule = make_label_rule(**arguments.pop("label_rule"))
    if kind == "function":
        from pilaf_ray.oracle.function import FunctionOracle

        return FunctionOracle(rule=rule, **arguments)
    from pilaf_ray.oracle.reward_model import RewardModelOracle

    return RewardModelOracle(rule=rule, **arguments)
