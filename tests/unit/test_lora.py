"""What adapters are, what is refused before a model is loaded, and how little they take."""

from pathlib import Path

import pytest
import torch

from pilaf_ray.build import build_inputs
from pilaf_ray.config.loader import load_config
from pilaf_ray.data.tiny_models import make_tiny_gpt2, make_tiny_llama
from pilaf_ray.engines.generator import Generator
from pilaf_ray.engines.lora import merge_stream
from pilaf_ray.engines.lora_checks import LoraSettings, count_adapter_parameters
from pilaf_ray.engines.scoring import load_network
from pilaf_ray.errors import ConfigError, ModelError, WeightSyncError
from pilaf_ray.memory import MIB
from pilaf_ray.resource_plan import role_memory, shares_base

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
LORA = "model.lora={rank: 4, alpha: 8}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "policy", seed=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora={rank: 0, alpha: 8}"], "model.lora.rank: Input should be greater than or equal to 1"),
        (["model.lora={rank: 4, alpha: 8, targets: []}"], "model.lora.targets"),
        (
            [LORA, "model.reference=elsewhere"],
            "model.reference makes the policy start elsewhere: leave",
        ),
        ([LORA, "model.init_from=runs/other"], "model.init_from makes the policy start elsewhere"),
        (
            [LORA, "schedule={type: iterative, rounds: 2, pairs_per_round: 8, reset_reference: true}"],
            "set schedule.reset_reference: false, or leave model.lora out",
        ),
    ],
)
def test_settings_that_cannot_be_adapted_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("[query]", "no module is named 'query'; linear layers are named: down_proj, gate_proj, k_proj"),
        ("[q_proj, self_attn]", "'self_attn' names model.layers.0.self_attn, a LlamaAttention"),
        ("[lm_head]", "'lm_head' names lm_head, the output head"),
    ],
)
def test_targets_that_fit_no_layer_are_one_line_before_anything_is_loaded(
    model: Path, targets: str, message: str
) -> None:
    config = load_config(TINY, [f"model.policy={model}", f"model.lora={{rank: 4, alpha: 8, targets: {targets}}}"])
    with pytest.raises(ModelError) as caught:
        build_inputs(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_gpt2(tmp_path, seed=0)
    for targets in ("all-linear", ("c_attn",)):
        with pytest.raises(ModelError, match=r"no linear layer|a Conv1D"):
            count_adapter_parameters(str(folder), LoraSettings(rank=2, alpha=2.0, dropout=0.0, targets=targets))


def test_parameters_are_counted_layer_by_layer(model: Path) -> None:
    """Hidden 64, two heads of 32 and one for keys and values, inner 128, two layers."""
    both = LoraSettings(rank=4, alpha=8.0, dropout=0.0, targets=("q_proj", "v_proj"))
    assert count_adapter_parameters(str(model), both) == 2 * 4 * ((64 + 64) + (64 + 32))
    every = LoraSettings(rank=4, alpha=8.0, dropout=0.0, targets="all-linear")
    inner, outer = (64 + 64) * 2 + (64 + 32) * 2, (64 + 128) * 3
    assert count_adapter_parameters(str(model), every) == 2 * 4 * (inner + outer)


def test_the_estimate_of_the_learner_counts_states_of_adapters_only(model: Path) -> None:
    """ZeRO-1 in fp32 on one rank: 4 bytes of gradient and of master weight, 8 of moments."""
    sizes = []
    for lora in ([], [LORA]):
        words = [f"model.policy={model}", "weights.transport=gloo", *lora]
        estimates = {e.role: dict(e.host) for e in role_memory(load_config(TINY, words))}
        sizes.append((estimates["learner"], estimates["generator"]))
    (whole, served), (adapted, served_adapted) = sizes
    n, a = whole["weights"] / 4, 8192
    assert adapted["weights"] == 4 * (n + a)
    for part, each in (("gradients", 4), ("master weights", 4), ("optimizer", 8)):
        assert (whole[part], adapted[part]) == (each * n, each * a), part
    assert (adapted["weights to send"], whole["weights to send"]) == (4 * a, 4 * n)
    assert (served["weights received"], served_adapted["weights received"]) == (4 * n, 4 * a)
    assert adapted["activations"] == whole["activations"] > MIB / 1024


@pytest.mark.parametrize(
    ("overrides", "networks"),
    [
        ([], 1),
        (["generation.share_base=false"], 2),
        (["generation.enforce_eager=false"], 2),
        (["generation.tensor_parallel_size=2"], 2),
        (["model.lora=null"], 2),
    ],
)
def test_one_network_of_a_generator_serves_both_where_adapters_can_be_added(
    model: Path, overrides: list[str], networks: int
) -> None:
    words = [f"model.policy={model}", "model.lora={rank: 2, alpha: 4}", *overrides]
    generator = {e.role: dict(e.host) for e in role_memory(load_config(TINY, words))}["generator"]
    parameters = sum(p.numel() for p in load_network(str(model), dtype=torch.float32).parameters())
    assert generator["weights"] == networks * 4 * parameters


def test_an_evaluated_checkpoint_does_not_share_the_base(model: Path) -> None:
    config = load_config(TINY, [f"model.policy={model}", LORA])
    checkpoint = config.model.model_copy(update={"policy": "checkpoint/hf", "reference": str(model)})
    assert shares_base(config)
    assert not shares_base(config.model_copy(update={"model": checkpoint}))
    with pytest.raises(ConfigError, match="starts as the reference"):
        Generator(
            policy_path="checkpoint/hf", reference_path=str(model), dtype="float32", max_model_len=64, max_new_tokens=8,
            shares_base=True,
        )  # fmt: skip


def test_a_stream_is_merged_where_an_adapter_fits_and_leftovers_are_refused() -> None:
    base = [("x.weight", torch.eye(2)), ("x.bias", torch.ones(2)), ("y.weight", torch.zeros(2, 2))]
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    adapters = {"x.lora_A.weight": a, "x.lora_B.weight": b}
    found = dict(merge_stream(iter(base), adapters, scale=0.5, dtype=torch.float32))
    assert found["x.weight"].tolist() == [[1 + 1.5, 3.0], [2.0, 1 + 4.0]]
    assert torch.equal(found["x.bias"], torch.ones(2)) and torch.equal(found["y.weight"], torch.zeros(2, 2))
    with pytest.raises(WeightSyncError, match=r"1 adapter tensors fit no weight of the reference, e\.g\. x\.lora_A"):
        list(merge_stream(iter(base), {"x.lora_A.weight": a}, scale=0.5, dtype=torch.float32))


def test_a_stream_with_an_adapter_of_another_size_comes_to_its_end_before_it_is_refused() -> None:
    base = [("x.weight", torch.eye(2)), ("y.weight", torch.zeros(2, 2))]
    adapters = {"x.lora_A.weight": torch.ones(1, 3), "x.lora_B.weight": torch.ones(2, 1)}
    stream = merge_stream(iter(base), adapters, scale=0.5, dtype=torch.float32)
    assert [(name, tensor.tolist()) for name, tensor in (next(stream), next(stream))] == [
        ("x.weight", [[1.0, 0.0], [0.0, 1.0]]),
        ("y.weight", [[0.0, 0.0], [0.0, 0.0]]),
    ]
    with pytest.raises(WeightSyncError, match=r"1 adapters do not have the sizes .*, e\.g\. that of x"):
        next(stream)
