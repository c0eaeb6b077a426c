"""What a role on CPUs takes at its fullest moment, by hand."""

from pathlib import Path

import pytest

from benchmarks.memory import Row, main
from pilaf_ray.memory import (
    MIB,
    RUNTIME_MIB,
    LearnerSettings,
    ModelShape,
    learner_memory,
    scalar_head_memory,
    scorer_memory,
)

N = 134_515_008
SHAPE = ModelShape(
    parameters=N, layers=30, hidden=576, intermediate=1536, vocabulary=49_152, heads=9, kv_heads=3, head_size=64,
    tied=True,
)  # fmt: skip


def settings(**changes: object) -> LearnerSettings:
    values = {
        "precision": "float32", "zero_stage": 1, "ranks": 1, "micro_batch_tokens": 1024, "logprob_chunk_tokens": 512,
        "gradient_checkpointing": False, "transport": "gloo", "on_gpu": False,
    }  # fmt: skip
    return LearnerSettings(**(values | changes))  # type: ignore[arg-type]


def test_a_learner_is_fullest_in_a_forward_when_batches_are_large_and_in_the_backward_when_they_are_small() -> None:
    forward = dict(learner_memory(SHAPE, settings()).host)
    assert {"activations", "logits", "allocator"} <= forward.keys() and "communication" not in forward
    lasting = 4 * N * (1 + 1 + 2 + 1)  # weights, masters, two moments, the version that generators may still fetch
    assert sum(forward[part] for part in ("weights", "master weights", "optimizer", "weights to send")) == lasting
    small = learner_memory(SHAPE, settings(micro_batch_tokens=16, logprob_chunk_tokens=16))
    assert small.host_bytes == lasting + 3 * 4 * N + RUNTIME_MIB["learner"] * MIB
    assert dict(small.host)["communication"] == 4 * N, "a bucket is no larger than what goes into it"


def test_a_model_that_is_cut_was_whole_while_it_was_loaded() -> None:
    cut = ModelShape(
        parameters=N // 2,
        layers=10,
        hidden=576,
        intermediate=1536,
        vocabulary=49_152,
        heads=9,
        kv_heads=3,
        head_size=64,
    )
    small = settings(micro_batch_tokens=16, logprob_chunk_tokens=0, zero_stage=0, transport="none")
    head = scalar_head_memory("reward", cut, small, trained=0.1, loaded=SHAPE)
    assert dict(head.host) == {"weights": 4 * N, "their files": 2 * N, "runtime": RUNTIME_MIB["learner"] * MIB}


@pytest.mark.parametrize(("tokens", "fullest"), [(64, "their files"), (8192, "activations")])
def test_a_scorer_is_fullest_while_it_loads_or_while_it_scores(tokens: int, fullest: str) -> None:
    estimate = scorer_memory("reference", SHAPE, dtype="float32", tokens=tokens, chunk=128, on_gpu=False)
    assert fullest in dict(estimate.host)
    on_gpu = scorer_memory("reference", SHAPE, dtype="float32", tokens=tokens, chunk=128, on_gpu=True)
    assert "their files" not in dict(on_gpu.host) | dict(on_gpu.device)


@pytest.mark.parametrize(
    ("words", "code"),
    [([], 0), (["--within", "0.15"], 0), (["--within", "0.125"], 1), (["--within", "0.11"], 1)],
)
def test_an_estimate_that_is_too_far_off_is_an_exit_code(
    words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: dict[str, list[Row]] = {
        "first": [("first", "generator", 1120.0, 1000.0), ("first", "oracle", 500.0, 500.0)],
        "second": [("second", "learner", 870.0, 1000.0)],
    }
    assert main(["first", "second", *words], read=lambda folder: measured[Path(folder).name]) == code
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [line[-2].strip() for line in lines] == ["+12.0%", "+0.0%", "-13.0%"]
