"""A gold reward that even a model of random weights can learn: how much of a text is letters and spaces."""

from collections.abc import Sequence


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Share of the characters of each response that are ASCII letters or spaces, in [0, 1]; 0 of an empty one."""
    return [sum(map(_counts, response)) / max(1, len(response)) for response in responses]


def _counts(character: str) -> bool:
    return character == " " or (character.isascii() and character.isalpha())
