"""What every preference oracle offers."""

from collections.abc import Sequence
from typing import Protocol

from pilaf_ray.types import PreferenceLabel, ResponsePair, RoleUsage


class PreferenceOracle(Protocol):
    """Says which response of a pair is preferred."""

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        """One label a pair, in order; raises OracleError."""
        ...

    async def score_texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """The oracle's reward of single responses, on the log-odds scale; raises OracleError."""
        ...

    def usage(self) -> RoleUsage:
        """Busy time and peak memory."""
        ...
