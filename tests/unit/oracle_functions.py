"""Functions that tests name as oracles."""

from collections.abc import Sequence


def lengths(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(len(response)) for response in responses]


async def lengths_async(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return lengths(prompts, responses)


def first(prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
    return [1.0] * len(prompts)


def abstains(prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[None]:
    return [None] * len(prompts)


def raises(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    raise ValueError("no idea")


def not_a_number(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float("nan")] * len(responses)


def too_few(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [0.0]
