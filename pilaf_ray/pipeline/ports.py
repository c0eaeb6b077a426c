"""What the pipeline may ask of each role.

The controller and its helpers know these protocols only. ``pilaf_ray/actors/handles.py`` and its neighbours turn
Ray actor handles into them; tests implement them by hand. Every call is
awaitable and may fail with a :class:`~pilaf_ray.errors.PilafError`. The adapters replace what
is lost and repeat its work; a PoisonPairError names work that no replica survives. So that it can, a
call that is about pairs says which.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pilaf_ray.types import (
    GenerationRequest,
    LabeledPair,
    PairPlan,
    PreferenceLabel,
    ReferenceLogprobs,
    ResponsePair,
    RewardScores,
    RewardStepResult,
    SampledResponse,
    ScoringItem,
    StepResult,
    TokenPair,
)


class GeneratorPort(Protocol):
    """All generator replicas behind one face; the adapter spreads the requests."""

    async def generate(self, request: GenerationRequest) -> SampledResponse:
        """Sample one response; returns as soon as *this* response is finished."""
        ...


class ReferencePort(Protocol):
    """Log-probabilities under the fixed reference model."""

    async def score(self, pairs: Sequence[ResponsePair]) -> list[ReferenceLogprobs]:
        """Sequence log-probabilities of both sides of each pair, in order."""
        ...


class SequenceScorer(Protocol):
    """log π_ref of single responses."""

    async def score_responses(self, items: Sequence[TokenPair], *, pairs: Sequence[str] = ()) -> list[float]:
        """The log-probability of each (prompt, response) token pair, summed over the response.

        Args:
            items: what is scored.
            pairs: ids of the pairs that the responses may become part of.
        """
        ...


class TokenScorer(Protocol):
    """log π_ref of the tokens of single responses."""

    async def score_tokens(self, items: Sequence[TokenPair], *, pairs: Sequence[str] = ()) -> list[list[float]]:
        """One list of log-probabilities for each (prompt, response) token pair, in order.

        ``pairs`` are the ids of what the responses belong to, as in :class:`SequenceScorer`.
        """
        ...


class OraclePort(Protocol):
    """Who prefers what."""

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        """One label a pair, in order."""
        ...


class TextScorer(Protocol):
    """The gold reward r* of single responses."""

    async def score_texts(self, prompts: list[str], responses: list[str], *, pairs: Sequence[str] = ()) -> list[float]:
        """One reward a response, on the Bradley–Terry log-odds scale; ``pairs`` as in :class:`SequenceScorer`."""
        ...


class LearnerPort(Protocol):
    """The policy learner: one group of ranks that steps together."""

    async def train_step(self, step: int, batch: Sequence[LabeledPair]) -> StepResult:
        """Take optimiser step ``step`` (from 1) on ``batch``; raises NonFiniteLossError."""
        ...


class RewardScorer(Protocol):
    """r̂ of single responses."""

    async def score(self, items: Sequence[ScoringItem]) -> RewardScores:
        """r̂ of each response, in order, all under the one version that the answer names."""
        ...


class RewardPort(RewardScorer, Protocol):
    """The reward model r̂: it trains beside the policy, and scores for whoever asks."""

    async def train_step(self, batch: Sequence[LabeledPair]) -> RewardStepResult:
        """One step of Bradley–Terry maximum likelihood; raises NonFiniteLossError."""
        ...

    async def save(self, folder: Path) -> None:
        """Write model, optimizer and RNG states into an existing empty folder."""
        ...

    async def load(self, folder: Path) -> None:
        """Restore exactly what :meth:`save` wrote."""
        ...


class WeightSyncPort(Protocol):
    """Moves the learner's weights to every generator, in the order push, serve, release."""

    async def push(self, version: int) -> Any:
        """Publish the learner's weights; on return the learner may change them. Raises WeightSyncError."""
        ...

    async def serve(self, version: int, update: Any) -> None:
        """On return every generator samples with what ``push`` returned; raises WeightSyncError."""
        ...


class StorePort(Protocol):
    """The durable ledger as the loops write it; every method is one transaction, and repeats are harmless."""

    async def add_plans(self, plans: Sequence[PairPlan]) -> None:
        """Record new pairs as PLANNED."""
        ...

    async def add_responses(self, pairs: Sequence[ResponsePair]) -> None:
        """PLANNED → SAMPLED."""
        ...

    async def add_labels(self, labels: Sequence[PreferenceLabel], references: Sequence[ReferenceLogprobs]) -> None:
        """SAMPLED → LABELED, or → ABSTAINED where the oracle declined."""
        ...

    async def reject(self, pair_id: str, reason: str) -> None:
        """PLANNED, SAMPLED or LABELED → REJECTED: the pair cannot be worked on."""
        ...

    async def mark_trained(self, step: int, pair_ids: Sequence[str]) -> None:
        """LABELED → TRAINED(step)."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Ports:
    """The roles that the controller talks to."""

    generator: GeneratorPort
    reference: ReferencePort
    oracle: OraclePort
    learner: LearnerPort
    store: StorePort
    weight_sync: WeightSyncPort
