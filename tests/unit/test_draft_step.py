"""What a step that drafts ahead gives a request, with two networks that look at one token only; no engine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from pilaf_ray.engines import draft_step
from pilaf_ray.engines.draft_step import DraftingRow, DraftStep
from pilaf_ray.engines.reference_shelf import ReferenceShelf
from pilaf_ray.engines.row_draws import Draw, Row
from pilaf_ray.engines.side_forward import Stretch
from pilaf_ray.sampling.draw import draw_mixed_tokens
from pilaf_ray.sampling.interpolation import mixed_logprobs

WORDS, END, LENGTH = 12, 0, 30
COEFFICIENTS = (0.0, 0.5, -0.5, -1.0, 2.0)


class Networks:
    """Logits of the next token by the last one; stands in for runner and model, and notes what it is asked."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.tables = {side: torch.randn(WORDS, WORDS, generator=draw) for side in ("policy", "reference")}
        sides = {side: SimpleNamespace(compute_logits=table.__getitem__) for side, table in self.tables.items()}
        self.model = SimpleNamespace(**sides)
        self.asked: list[tuple[str, list[Stretch]]] = []

    def states(self, runner: Any, side: str, stretches: list[Stretch]) -> torch.Tensor:
        """Tokens are their own states."""
        self.asked.append((side, list(stretches)))
        return torch.tensor([token for stretch in stretches for token in stretch.tokens])

    def by_hand(self, c: float, seed: int, prompt: int, *, greedy: bool) -> tuple[list[int], list[float]]:
        """A response a token at a time."""
        tokens, logprobs = [prompt], []
        while len(logprobs) < LENGTH and (not logprobs or tokens[-1] != END):
            policy, reference = (table[tokens[-1]].unsqueeze(0) for table in self.tables.values())
            row = mixed_logprobs(policy, reference, c)
            drawn = draw_mixed_tokens(policy.log_softmax(-1), row, [seed], [len(logprobs)])
            tokens.append(int(row.argmax() if greedy else drawn))
            logprobs.append(float(row[0, tokens[-1]]))
        return tokens[1:], logprobs


def respond(networks: Networks, *, window: int, greedy: bool) -> tuple[list[list[int]], list[list[float]]]:
    """Responses to all coefficients in one batch, step by step."""
    shelf = ReferenceShelf()
    draws = [
        None if greedy else Draw(seed=seed, temperature=1.0, top_p=1.0, record=str(seed))
        for seed in range(len(COEFFICIENTS))
    ]
    tokens: list[list[int]] = [[] for _ in draws]
    logprobs: list[list[float]] = [[] for _ in draws]
    while running := [n for n, found in enumerate(tokens) if len(found) < LENGTH and END not in found]:
        last = [tokens[n][-1] if tokens[n] else 1 + n for n in running]
        rows = [
            DraftingRow(
                row=Row(coefficient=COEFFICIENTS[n], draw=draws[n], output=tokens[n]),
                scheduled=Stretch(row=place, start=len(tokens[n]), tokens=[last[place]]),
                count=min(window, LENGTH - len(tokens[n])),
                ends=frozenset({END}),
            )
            for place, n in enumerate(running)
        ]
        step = DraftStep(networks, rows)
        step.draft(networks.tables["policy"][last])
        step.judge(shelf)
        for n, row in zip(running, rows, strict=True):
            tokens[n] += row.tokens
            logprobs[n] += row.logprobs
    mixed = sum(len(found) for found, c in zip(tokens, COEFFICIENTS, strict=True) if c)
    assert greedy or shelf.counter.judged == mixed
    return tokens, logprobs


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_responses_do_not_depend_on_the_window(window: int, greedy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = Networks()
    monkeypatch.setattr(draft_step, "side_states", networks.states)
    tokens, logprobs = respond(networks, window=window, greedy=greedy)
    for n, c in enumerate(COEFFICIENTS):
        expected, expected_logprobs = networks.by_hand(c, n, 1 + n, greedy=greedy)
        assert tokens[n] == expected
        torch.testing.assert_close(torch.tensor(logprobs[n]), torch.tensor(expected_logprobs))


def test_what_the_networks_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain request, a mixed one and a mixed prompt that is not complete; the reference sees the latter two, once."""
    networks = Networks()
    monkeypatch.setattr(draft_step, "side_states", networks.states)
    draw = Draw(seed=3, temperature=1.0, top_p=1.0, record="r")
    rows = [
        DraftingRow(
            row=Row(coefficient=c, draw=draw, output=[]),
            scheduled=Stretch(row=place, start=start, tokens=prompt),
            count=count,
            ends=frozenset(),
        )
        for place, (c, start, prompt, count) in enumerate(
            [(0.0, 4, [5], 3), (0.5, 0, [7, 8], 2), (0.5, 6, [9, 10, 11], 0)]
        )
    ]
    step = DraftStep(networks, rows)
    step.draft(networks.tables["policy"][[5, 8, 11]])
    step.judge(ReferenceShelf())
    plain, mixed = rows[0].drafts, rows[1].drafts
    assert (len(plain), len(mixed), rows[2].drafts) == (3, 2, [])
    first = [Stretch(row=0, start=5, tokens=plain[:1]), Stretch(row=1, start=2, tokens=mixed[:1])]
    second = [Stretch(row=0, start=6, tokens=plain[1:2])]
    judged = [Stretch(row=1, start=0, tokens=(7, 8, mixed[0])), Stretch(row=2, start=6, tokens=(9, 10, 11))]
    assert networks.asked == [("policy", first), ("policy", second), ("reference", judged)]
    assert rows[0].tokens == plain
    assert rows[2].tokens == []
