"""What becomes of a step whose numbers are none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import label, pair, reference

from pilaf_ray.engines.finite_check import FiniteCheck
from pilaf_ray.errors import NonFiniteLossError
from pilaf_ray.types import LabeledPair


class Engine:
    """A rank of one; what it is asked is answered by PyTorch."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def all_finite(self, values: torch.Tensor) -> bool:
        return bool(torch.isfinite(values).all())


def check(rank: int, folder: Path) -> FiniteCheck:
    engine: Any = Engine(rank)
    return FiniteCheck(
        engine=engine,
        batch=[LabeledPair(pair=pair(3), label=label(3), reference=reference(3))],
        path=folder / "failed" / "step-7.json",
        step="step 7",
        outcome="no weight was changed, the batch is in",
        remedy="Lower the rate",
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused_on_every_rank_and_its_batch_is_saved_by_the_first(
    bad: float, tmp_path: Path
) -> None:
    values = torch.tensor([1.0, bad])
    for rank in (1, 0):
        tested = check(rank, tmp_path)
        tested("loss", torch.tensor([1.0, 2.0]))
        assert not tested.path.exists()
        with pytest.raises(NonFiniteLossError) as refusal:
            tested("gradient", values)
        assert str(refusal.value) == (
            f"step 7: the gradient is not finite; no weight was changed, the batch is in {tested.path}. Lower the rate"
        )
    (saved,) = json.loads(tested.path.read_text())
    assert saved["pair"]["plan"]["pair_id"] == "pair-3" and saved["label"]["probability"] == 1.0
