"""Drawing a token: the rule, its numbers and its distribution."""

import numpy as np
import torch
from scipy.stats import chisquare, kstest

from pilaf_ray.sampling.draw import draw_tokens, token_uniform


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
