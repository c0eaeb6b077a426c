"""How a checkpoint's learners were spread over ranks, and whether a run can go on from it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pilaf_ray.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerLayout:
    """Ranks and ZeRO stage of one learner.

    Example: ``LearnerLayout(ranks=2, zero_stage=3)``
    """

    ranks: int
    zero_stage: int

    @property
    def state_form(self) -> str:
        """How the optimiser's state is kept: the stages of one form can read each other's."""
        return {0: "whole on every rank", 1: "parted", 2: "parted"}.get(self.zero_stage, "parted with the weights")


def described(layouts: Mapping[str, LearnerLayout]) -> dict[str, Any]:
    """What the manifest says of the learners, by the name of their part of the checkpoint."""
    return {"learners": {part: asdict(layout) for part, layout in layouts.items()}}


def require_loadable(checkpoint: Path, manifest: Mapping[str, Any], layouts: Mapping[str, LearnerLayout]) -> None:
    """Raises CheckpointError where the optimiser's state cannot be brought into ``layouts``.

    The number of ranks may differ. A checkpoint that says nothing of its learners is tried.
    """
    for part, saved in manifest.get("learners", {}).items():
        wanted = layouts.get(part)
        written = LearnerLayout(**saved)
        if wanted is not None and written.state_form != wanted.state_form:
            section = {"reward": "reward_model"}.get(part, part)
            raise CheckpointError(
                f"{checkpoint}: written with {section}.zero_stage: {written.zero_stage} on {written.ranks} ranks, it "
                f"cannot be loaded with {section}.zero_stage: {wanted.zero_stage}, whose optimiser state has another "
                f"form; set {section}.zero_stage: {written.zero_stage} (the number of ranks may change)"
            )
