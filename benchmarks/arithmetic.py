"""What a figure is compared with, and how far the repetitions lie apart; no measuring here."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedMatrices:
    """Elements of the matrices that a step multiplies with."""

    layers: int
    """Of all linear layers below the output head; every token of a row goes through them."""
    head: int
    """Width times vocabulary; only tokens whose logits are wanted go through it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLengths:
    """Tokens of one pair."""

    prompt: int
    a: int
    b: int

    @property
    def responses(self) -> int:
        """Tokens of both responses."""
        return self.a + self.b

    @property
    def sequences(self) -> int:
        """Tokens of both sequences, each with a prompt of its own."""
        return 2 * self.prompt + self.responses


def step_flops(
    matrices: TrainedMatrices, pairs: Sequence[PairLengths], *, shared_prompts: bool, head_on_prompts: bool
) -> int:
    """Floating-point operations of the products of one forward and backward, without padding.

    A token costs two operations an element of a matrix forward, and four backward: for the gradients of the
    input and of the matrix. Attention's own products, norms, the loss and the optimizer are not in it, nor what is
    computed twice to save memory: it is the work that the batch asks for, not what somebody makes of it.

    Args:
        shared_prompts: a prompt is computed once for both of its responses.
        head_on_prompts: logits of prompt tokens are computed too.
    """
    rows = sum(pair.prompt + pair.responses if shared_prompts else pair.sequences for pair in pairs)
    logits = sum(pair.sequences if head_on_prompts else pair.responses for pair in pairs)
    return 6 * (matrices.layers * rows + matrices.head * logits)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latencies:
    """How long the roles of a simulated run take, in seconds."""

    response: float = 0.0
    """Of one response on one slot of a generator."""
    label: float = 0.0
    """Of one pair at one replica of the oracle."""
    reference: float = 0.0
    """Of one pair at one replica of the reference model."""
    step: float = 0.0
    """Of one optimiser step."""
    push: float = 0.0
    """Of publishing a version, which the learner cannot train through."""
    pull: float = 0.0
    """Of taking a version, which a generator cannot sample through."""


def role_seconds(
    latencies: Latencies, *, pairs: int, slots: int, oracles: int, references: int, reference_share: float
) -> dict[str, float]:
    """What each role works for one step of ``pairs`` pairs when all of its slots or replicas are always taken.

    Args:
        slots: responses that all generators together sample at one time.
        reference_share: of the pairs, those that the reference model is asked about.
    """
    return {
        "generator": 2 * pairs * latencies.response / slots + latencies.pull,
        "oracle": pairs * latencies.label / oracles,
        "reference": pairs * reference_share * latencies.reference / references,
        "learner": latencies.step + latencies.push,
    }


def async_bound(seconds: Mapping[str, float], *, control_seconds: float, max_staleness_steps: int) -> float:
    """How many times more steps a second than one role after the other, at the most.

    No order of work is faster than its slowest part: the sum of all seconds over the largest. And no
    more than ``max_staleness_steps`` + 1 batches are under way at a time, each for at least the sum.

    Args:
        seconds: of each role, a step.
        control_seconds: of controller and ledger together, which share a core: a synchronous step waits for them,
            too, and an asynchronous one is not faster than they are.
    """
    parts = [*seconds.values(), control_seconds]
    return min(sum(parts) / max(parts), max_staleness_steps + 1.0)


def spread(values: Sequence[float]) -> float:
    """(largest − smallest) over the median."""
    return (max(values) - min(values)) / statistics.median(values)
