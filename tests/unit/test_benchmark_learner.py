"""What benchmarks.learner makes of its learners' steps, and what it compiles."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.arithmetic import PairLengths, TrainedMatrices
from benchmarks.learner_compiled import compile_layers
from benchmarks.learner_rows import COMPILED, OURS, check_same_batch, check_same_training, ratios, summarize


def steps(*losses: float, seconds: float) -> list[dict[str, Any]]:
    own = {"seconds": seconds, "peak_mib": 100.0, "before_model_mib": 50.0, "threads": 1}
    return [{"loss": loss, **own} for loss in losses]


def test_compiled_layers_do_the_work_of_ours() -> None:
    answers = {OURS: steps(0.7, 0.6, seconds=4.0), COMPILED: steps(0.7, 0.6, seconds=2.0)}
    pair = PairLengths(prompt=5, a=2, b=3)
    rows = summarize(answers, TrainedMatrices(layers=12, head=30), [pair], shared=True)
    assert [row["learner"] for row in rows] == [OURS, COMPILED]
    assert rows[0]["flops"] == rows[1]["flops"] == 6 * (12 * 10 + 30 * 5)
    assert ratios(rows)[COMPILED]["tokens_per_second"] == pytest.approx(0.5)


def test_losses_that_part_after_the_first_step_are_those_of_other_gradients() -> None:
    same = {OURS: steps(0.7, 0.6, seconds=1.0), COMPILED: steps(0.7, 0.6001, seconds=1.0)}
    check_same_training(same, tolerance=1e-3)
    check_same_training({OURS: same[OURS]}, tolerance=1e-3)
    other = {OURS: steps(0.7, 0.6, seconds=1.0), COMPILED: steps(0.7, 0.7, seconds=1.0)}
    check_same_batch(
        summarize(other, TrainedMatrices(layers=1, head=1), [PairLengths(prompt=1, a=1, b=1)], shared=True),
        tolerance=1e-3,
    )
    with pytest.raises(SystemExit, match="another"):
        check_same_training(other, tolerance=1e-3)


def test_every_decoder_layer_is_compiled_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from pilaf_ray.data.tiny_models import make_tiny_llama
    from pilaf_ray.engines.direct_gradients import DirectLinear

    # Compiling replaces it for the process of the benchmark.
    monkeypatch.setattr(DirectLinear, "forward", DirectLinear.forward)
    network = transformers.AutoModelForCausalLM.from_pretrained(make_tiny_llama(tmp_path, seed=0))
    assert compile_layers(network) == 2
    compiled = {name for name, module in network.named_modules() if module._compiled_call_impl is not None}
    assert compiled == {"model.layers.0", "model.layers.1"}
    with pytest.raises(SystemExit, match="no layers"):
        compile_layers(torch.nn.Linear(1, 1))
