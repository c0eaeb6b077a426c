"""The neural judge: what it prefers, and that padding changes nothing."""

import pytest
import torch

from pilaf_ray.oracle.positivity import embed, score

FILM = "Write a short review of a film about a lighthouse."


def test_praise_of_what_was_asked_for_beats_scolding_and_praise_of_something_else() -> None:
    warm = "The film about the lighthouse is lovely: warm, well played, and I enjoyed it from start to end."
    cold = "The film about the lighthouse is dull: cold, badly played, and I regretted it from start to end."
    aside = "The soup is lovely: warm, well spiced, and I enjoyed it from start to end."
    words = "Great great great great great!"
    best, worst, other, hacked = score([FILM] * 4, [warm, cold, aside, words])
    assert best > max(worst, other, hacked)


def test_a_text_has_the_same_unit_vector_alone_and_in_a_padded_batch() -> None:
    texts = ["Good.", "A long text about a journey by train through the mountains, with a stop for tea.", ""]
    together = embed(texts)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))
    for text, row in zip(texts, together, strict=True):
        torch.testing.assert_close(embed([text])[0], row, atol=1e-5, rtol=0)


def test_many_texts_are_taken_in_batches() -> None:
    texts = [f"Review number {number}." for number in range(70)]
    assert score([FILM] * 70, texts)[69] == pytest.approx(score([FILM], texts[69:])[0], abs=1e-5)
