"""The gradient probe against autograd on all parameters at once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.engines.gradient_probe import GradientProbe
from pilaf_ray.errors import ConfigError

PROMPT, RESPONSES = (3, 7, 9), [(4, 8), (5, 6, 11, 2), (4, 8, 12)]


def probe(folder: Path, *, projections: int, parameters: str | None = None) -> GradientProbe:
    return GradientProbe(
        policy_path=str(folder),
        reference_path=str(folder),
        parameters=parameters,
        projections=projections,
        threads=1,
    )


def test_projected_inner_products_are_those_of_the_gradients(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    make_tiny_llama(tmp_path / "m", seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    last = model.config.num_hidden_layers - 1
    own = [p for name, p in model.named_parameters() if name.startswith(f"model.layers.{last}.")]
    rows, logprobs = [], []
    for response in RESPONSES:
        logits = model(torch.tensor([PROMPT + response])).logits[0, len(PROMPT) - 1 : -1]
        value = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()
        logprobs.append(float(value.detach()))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, own)]).double().numpy())
    wide = probe(tmp_path / "m", projections=2**14)
    assert wide.pattern == f"^model\\.layers\\.{last}\\." and wide.count == len(rows[0])
    found = [wide.measure(PROMPT, response) for response in RESPONSES]
    assert [f.policy_logprob for f in found] == pytest.approx(logprobs, abs=1e-4)
    assert [f.reference_logprob for f in found] == pytest.approx(logprobs, abs=1e-4)
    for i in range(3):
        for j in range(3):
            scale = np.linalg.norm(rows[i]) * np.linalg.norm(rows[j])
            # Five standard deviations of the sketch.
            assert abs(found[i].projected @ found[j].projected - rows[i] @ rows[j]) < 5 * scale / 2**7
    with pytest.raises(ConfigError, match="no parameter of"):
        probe(tmp_path / "m", projections=16, parameters="nothing")
