"""What a role takes: on CPUs at its fullest moment, by hand, and what holds for every model and setting."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.memory import Row, main
from pilaf_ray.engines.zero_options import OffloadSettings
from pilaf_ray.memory import (
    BYTES,
    MIB,
    RUNTIME_MIB,
    GeneratorSettings,
    LearnerSettings,
    MemoryEstimate,
    ModelShape,
    function_memory,
    generator_memory,
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


def test_without_a_stage_every_rank_keeps_all_masters() -> None:
    device = dict(learner_memory(SHAPE, settings(zero_stage=0, ranks=4, precision="bfloat16", on_gpu=True)).device)
    assert (device["master weights"], device["optimizer"]) == (4 * N, 8 * N)


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


STATES = ("weights", "master weights", "optimizer", "gradients", "reduced gradients")
formats = st.sampled_from(sorted(BYTES))
tokens = st.integers(1, 1 << 20)
shapes = st.builds(
    ModelShape,
    # More than the embeddings, as in every model.
    parameters=st.integers(1 << 29, 1 << 40),
    layers=st.integers(1, 128),
    hidden=st.sampled_from([64, 576, 4096]),
    intermediate=st.sampled_from([128, 1536, 14336]),
    vocabulary=st.sampled_from([256, 49_152]),
    heads=st.integers(1, 64),
    kv_heads=st.integers(1, 64),
    head_size=st.sampled_from([16, 64, 128]),
    tied=st.booleans(),
    stored=st.sampled_from([2, 4]),
)
adapters = st.none() | st.integers(1, 1 << 27)
learners = st.builds(
    LearnerSettings,
    precision=formats,
    zero_stage=st.integers(0, 3),
    ranks=st.integers(1, 64),
    micro_batch_tokens=tokens,
    logprob_chunk_tokens=st.integers(0, 1 << 14),
    gradient_checkpointing=st.booleans(),
    transport=st.sampled_from(["filesystem", "gloo", "nccl", "shared_memory", "none"]),
    on_gpu=st.booleans(),
    adapter_parameters=adapters,
    quantised=st.booleans(),
    sequence_parallel=st.sampled_from([1, 2, 4]),
    hybrid_ranks=st.sampled_from([1, 2, 4]),
    offload=st.builds(
        OffloadSettings, optimizer=st.sampled_from([None, "cpu", "nvme"]), parameters=st.sampled_from([None, "cpu"])
    ),
)
generators = st.builds(
    GeneratorSettings,
    dtype=formats,
    kv_cache_gib=st.floats(0.0, 512.0),
    max_num_seqs=st.integers(1, 4096),
    max_num_batched_tokens=tokens,
    tensor_parallel_size=st.sampled_from([1, 2, 4, 8]),
    on_gpu=st.booleans(),
    adapter_parameters=adapters,
    shares_base=st.booleans(),
)


def states(estimate: MemoryEstimate) -> float:
    return sum(size for name, size in estimate.device if name in STATES)


def no_more(less: float, than: float) -> bool:
    """Sums of the same parts in another order differ in the last bits."""
    return less <= than * (1 + 1e-9)


def require_coherent(estimate: MemoryEstimate) -> None:
    for parts, total in ((estimate.device, estimate.device_bytes), (estimate.host, estimate.host_bytes)):
        assert all(size > 0 for _, size in parts), parts
        assert len({name for name, _ in parts}) == len(parts), "each part is named once"
        assert sum(size for _, size in parts) == total
    later = sum(size for name, size in estimate.host if name not in estimate.first_only)
    assert estimate.host_bytes_of(0) == estimate.host_bytes and estimate.host_bytes_of(1) == later


@given(shapes, learners, generators, st.floats(0.05, 1.0))
def test_parts_are_positive_and_sum_to_what_is_reported(
    shape: ModelShape, learner: LearnerSettings, generator: GeneratorSettings, trained: float
) -> None:
    require_coherent(learner_memory(shape, learner))
    require_coherent(generator_memory(shape, generator))
    require_coherent(scalar_head_memory("reward", shape, learner, trained=trained, loaded=shape))
    for on_gpu in (False, True):
        require_coherent(
            scorer_memory(
                "reference",
                shape,
                dtype=generator.dtype,
                tokens=learner.micro_batch_tokens,
                chunk=learner.logprob_chunk_tokens,
                on_gpu=on_gpu,
            )
        )
    require_coherent(function_memory())


@given(shapes, learners, st.integers(1, 64))
def test_more_ranks_never_raise_the_states_of_one(shape: ModelShape, settings: LearnerSettings, more: int) -> None:
    settings = replace(settings, on_gpu=True)
    found = learner_memory(shape, settings)
    wider = learner_memory(shape, replace(settings, ranks=settings.ranks + more))
    assert no_more(states(wider), states(found))


@given(shapes, learners, st.integers(2, 64))
def test_a_higher_stage_never_raises_the_states_of_a_rank(
    shape: ModelShape, settings: LearnerSettings, ranks: int
) -> None:
    """Among stages that divide; stage 0 keeps no masters in fp32 and no reduced gradients, so it may take less."""
    sizes = [
        states(learner_memory(shape, replace(settings, on_gpu=True, ranks=ranks, zero_stage=stage)))
        for stage in (1, 2, 3)
    ]
    assert no_more(sizes[1], sizes[0]) and no_more(sizes[2], sizes[1])


@given(shapes, learners, tokens, st.integers(0, 1 << 14))
def test_shorter_micro_batches_and_limits_never_raise_a_sum(
    shape: ModelShape, settings: LearnerSettings, fewer: int, chunk: int
) -> None:
    fewer = min(fewer, settings.micro_batch_tokens)
    found = learner_memory(shape, settings)
    for smaller in (
        replace(settings, micro_batch_tokens=fewer),
        replace(settings, logprob_chunk_tokens=min(chunk, settings.logprob_chunk_tokens)),
    ):
        estimate = learner_memory(shape, smaller)
        assert no_more(estimate.device_bytes, found.device_bytes) and no_more(estimate.host_bytes, found.host_bytes)
    several = [
        scorer_memory("reference", shape, dtype=settings.precision, tokens=n, chunk=c, on_gpu=settings.on_gpu)
        for n, c in ((fewer, min(chunk, 128) + 1), (settings.micro_batch_tokens, chunk + 1))
    ]
    assert no_more(several[0].device_bytes + several[0].host_bytes, several[1].device_bytes + several[1].host_bytes)


@given(shapes, generators, tokens, st.integers(1, 4096))
def test_smaller_limits_and_more_workers_never_raise_what_one_takes(
    shape: ModelShape, settings: GeneratorSettings, fewer: int, sequences: int
) -> None:
    found = generator_memory(shape, settings)
    shorter = replace(
        settings,
        max_num_batched_tokens=min(fewer, settings.max_num_batched_tokens),
        max_num_seqs=min(sequences, settings.max_num_seqs),
    )
    for smaller in (shorter, replace(settings, tensor_parallel_size=2 * settings.tensor_parallel_size)):
        estimate = generator_memory(shape, smaller)
        assert no_more(estimate.device_bytes, found.device_bytes) and no_more(estimate.host_bytes, found.host_bytes)
        weights, before = dict(estimate.device).get("weights", 0.0), dict(found.device).get("weights", 0.0)
        assert no_more(weights, before)
