"""Plain requests do not pay for the reference: it is asked for the rows of mixed ones, and not at all without any."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from pilaf_ray.engines import interpolated_model
from pilaf_ray.engines.interpolated_model import InterpolatedForCausalLM

LAYERS = ("reference.layers.0.attn",)


class Half(torch.nn.Module):
    """Counts the tokens that it computes."""

    tokens = 0

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.tokens += len(input_ids)
        return torch.ones(len(input_ids), 2)


@pytest.mark.parametrize(
    ("rows", "deferred", "layers", "asked", "tokens"),
    [
        ([], False, LAYERS, [], 0),
        ([1, 3], False, LAYERS, [[1, 3]], 0),
        # While the policy drafts, the reference waits for what it is to judge.
        ([1, 3], True, LAYERS, [], 0),
        # Where requests cannot be told apart it computes everybody's tokens.
        ([1], False, (), [], 5),
    ],
)
def test_the_reference_computes_rows_of_mixed_requests_only(
    rows: list[int],
    deferred: bool,
    layers: tuple[str, ...],
    asked: list[list[int]],
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[int]] = []

    def narrowed(_model: Any, input_ids: torch.Tensor, *_: Any, rows: list[int], layers: tuple[str, ...]) -> Any:
        assert layers == LAYERS
        seen.append(rows)
        return torch.zeros(len(input_ids), 2)

    monkeypatch.setattr(interpolated_model, "get_forward_context", lambda: None)
    monkeypatch.setattr(interpolated_model, "routable_layers", lambda _context, _prefix: layers)
    monkeypatch.setattr(interpolated_model, "forward_rows", narrowed)
    model = InterpolatedForCausalLM.__new__(InterpolatedForCausalLM)
    torch.nn.Module.__init__(model)
    model.policy, model.reference = Half(), Half()
    model.shelf = SimpleNamespace(mixed_rows=rows, deferred=deferred)  # type: ignore[assignment]
    model(torch.arange(5), torch.arange(5))
    assert (seen, model.reference.tokens, model.policy.tokens) == (asked, tokens, 5)
