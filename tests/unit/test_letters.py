"""The reward that models of random weights can learn."""

import pytest

from pilaf_ray.oracle.letters import score


def test_the_share_of_letters_and_spaces() -> None:
    texts = ["a cat", "a1b2", "\x15é\n", "", "Z"]
    # One letter of ASCII and one space count alike; é and the newline do not; of nothing, nothing.
    assert score([""] * 5, texts) == pytest.approx([1.0, 0.5, 0.0, 0.0, 1.0])
