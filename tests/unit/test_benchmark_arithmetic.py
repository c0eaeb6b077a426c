"""What the benchmarks compare with: operations of a step, and the bound of the asynchronous speed-up."""

import pytest

from benchmarks.arithmetic import (
    Latencies,
    PairLengths,
    TrainedMatrices,
    async_bound,
    role_seconds,
    spread,
    step_flops,
)


def test_operations_of_a_step_counted_by_hand() -> None:
    """A matrix of 3 × 4 below a head of 3 × 10; a prompt of 5 tokens with responses of 2 and 3."""
    matrices, pair = TrainedMatrices(layers=12, head=30), PairLengths(prompt=5, a=2, b=3)
    count = {
        (shared, prompts): step_flops(matrices, [pair, pair], shared_prompts=shared, head_on_prompts=prompts)
        for shared in (True, False)
        for prompts in (True, False)
    }
    # Two operations an element and token forward, four backward; for two pairs.
    assert count[True, False] == 2 * 6 * (12 * 10 + 30 * 5)
    assert count[False, False] == 2 * 6 * (12 * 15 + 30 * 5)
    assert count[False, True] == 2 * 6 * (12 * 15 + 30 * 15)


def test_operations_of_a_step_are_those_that_torch_counts() -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    layer, head = torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 10, bias=False)
    rows = torch.randn(10, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        head(layer(rows)[5:]).sum().backward()
    pair = PairLengths(prompt=5, a=2, b=3)
    found = step_flops(TrainedMatrices(layers=12, head=40), [pair], shared_prompts=True, head_on_prompts=False)
    assert found == counter.get_total_flops()


def test_work_of_a_step_by_role() -> None:
    latencies = Latencies(response=2.0, label=0.1, reference=0.4, step=3.0, push=0.5, pull=0.25)
    seconds = role_seconds(latencies, pairs=8, slots=4, oracles=2, references=4, reference_share=0.5)
    assert seconds == pytest.approx({"generator": 8.25, "oracle": 0.4, "reference": 0.4, "learner": 3.5})


@pytest.mark.parametrize(
    ("roles", "control", "staleness", "bound"),
    [
        ((4.0, 3.0, 1.0), 0.0, 5, 2.0),
        # A synchronous step waits for controller and ledger, too ...
        ((4.0, 3.0, 1.0), 2.0, 5, 2.5),
        # ... and no step is faster than they are.
        ((4.0, 3.0, 1.0), 8.0, 5, 2.0),
        # No more batches are under way than the staleness bound lets.
        ((1.0, 1.0, 1.0), 1.0, 1, 2.0),
        ((1.0, 1.0, 1.0), 1.0, 0, 1.0),
        ((1.0, 1.0, 1.0), 1.0, 9, 4.0),
    ],
)
def test_bound_is_the_slowest_part_or_the_batches_under_way(
    roles: tuple[float, ...], control: float, staleness: int, bound: float
) -> None:
    seconds = dict(zip(("generator", "learner", "oracle"), roles, strict=True))
    assert async_bound(seconds, control_seconds=control, max_staleness_steps=staleness) == bound


def test_spread() -> None:
    assert spread([2.0, 1.0, 4.0]) == 1.5
