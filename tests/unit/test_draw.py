"""Drawing a token: the rule, its numbers and its distribution."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from pilaf_ray.sampling.draw import Purpose, draw_mixed_tokens, draw_tokens, settle_drafts, token_uniform


def test_inversion_by_hand() -> None:
    logprobs = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log().repeat(6, 1)
    tokens = draw_tokens(logprobs, [0.0, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 2**-53])
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]


def test_impossible_tokens_are_never_drawn() -> None:
    logprobs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log().repeat(3, 1)
    assert draw_tokens(logprobs, [0.0, 0.5, 1 - 2**-53]).tolist() == [1, 3, 3]


def test_numbers_are_uniform_over_seeds_and_positions() -> None:
    numbers = np.array([[token_uniform(seed, position) for position in range(100)] for seed in range(100)])
    assert kstest(numbers.ravel(), "uniform").pvalue > 0.001
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.04
    assert token_uniform(7, 3) == token_uniform(7, 3) != token_uniform(3, 7)


def test_drawn_tokens_have_the_given_probabilities() -> None:
    torch.manual_seed(0)
    row = torch.randn(20).log_softmax(-1)
    draws = draw_tokens(row.expand(10_000, 20), [token_uniform(seed, 0) for seed in range(10_000)])
    counts = torch.bincount(draws, minlength=20).double().numpy()
    expected = row.double().exp().numpy()
    assert chisquare(counts, expected / expected.sum() * 10_000).pvalue > 0.001


POLICY = [0.5, 0.3, 0.0, 0.2]
MIXED = [0.2, 0.5, 0.1, 0.2]
"""Drafts of 0 are kept with 0.4, of 1 and 3 always; drawn anew are 1 (2/3) and 2 (1/3)."""


@pytest.mark.parametrize(
    ("draft", "keep", "redraw", "token"),
    [(0, 0.39, 0.9, 0), (0, 0.41, 0.66, 1), (0, 0.41, 0.67, 2), (1, 1 - 2**-53, 0.9, 1), (3, 1 - 2**-53, 0.9, 3)],
)
def test_a_draft_is_kept_or_replaced_by_hand(draft: int, keep: float, redraw: float, token: int) -> None:
    policy, mixed = torch.tensor([POLICY]).log(), torch.tensor([MIXED]).log()
    tokens, kept = settle_drafts(policy, mixed, torch.tensor([draft]), keep=[keep], redraw=[redraw])
    assert tokens.tolist() == [token]
    assert kept.tolist() == [token == draft]


def test_settled_drafts_have_the_mixture_exactly() -> None:
    """All combinations of 20 x 20 x 20 numbers in the middles of their cells, counted."""
    policy, mixed = torch.tensor([POLICY]).log(), torch.tensor([MIXED]).log()
    numbers = [(cell + 0.5) / 20 for cell in range(20)]
    counts = torch.zeros(4)
    for draft in draw_tokens(policy.repeat(20, 1), numbers).tolist():
        keep, redraw = (list(side) for side in zip(*itertools.product(numbers, numbers), strict=True))
        rows = len(keep)
        drafts = torch.full((rows,), draft)
        tokens, _ = settle_drafts(policy.repeat(rows, 1), mixed.repeat(rows, 1), drafts, keep=keep, redraw=redraw)
        counts += torch.bincount(tokens, minlength=4)
    # A third of 20 cells is not a whole number of them.
    torch.testing.assert_close(counts / 20**3, torch.tensor(MIXED), atol=0.3 / 20, rtol=0)


def test_mixed_draws_have_the_mixture() -> None:
    torch.manual_seed(0)
    policy, mixed = torch.randn(2, 30).log_softmax(-1)
    many = 20_000
    tokens = draw_mixed_tokens(policy.expand(many, 30), mixed.expand(many, 30), range(many), [5] * many)
    expected = mixed.double().exp().numpy()
    counts = torch.bincount(tokens, minlength=30).double().numpy()
    assert chisquare(counts, expected / expected.sum() * many).pvalue > 0.001


def test_a_mixture_that_is_the_policy_keeps_every_draft() -> None:
    policy = torch.randn(100, 30).log_softmax(-1)
    uniforms = [token_uniform(seed, 3) for seed in range(100)]
    tokens = draw_mixed_tokens(policy, policy.clone(), range(100), [3] * 100)
    assert tokens.tolist() == draw_tokens(policy, uniforms).tolist()


def test_numbers_of_different_purposes_are_unrelated() -> None:
    columns = [[token_uniform(seed, 0, purpose) for seed in range(4000)] for purpose in Purpose]
    matrix = np.corrcoef(np.array(columns))
    assert np.abs(matrix - np.eye(len(Purpose))).max() < 0.06
