"""Some pairs to people, the rest to a machine; the machine also stands in where people do not answer in time."""

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pilaf_ray.errors import OracleError
from pilaf_ray.oracle.human import NOBODY
from pilaf_ray.sampling.identity import derive_uniform
from pilaf_ray.types import PreferenceLabel, ResponsePair

logger = logging.getLogger(__name__)


class LabelSource(Protocol):
    """Labels pairs."""

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        """One label a pair, in order."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureRules:
    """Which pairs go to people."""

    share: float = 0.1
    """Random audit: this share of all pairs, drawn from each pair's identity."""
    margin: float | None = None
    """Also pairs on which the machine's two rewards differ by less than this, or its label is a tie."""
    disagreement: float | None = None
    """Also this share of pairs, those on which the heads of r̂ disagree most; see :class:`TopShare`."""
    disagreement_window: int = 256
    """The newest so many pairs are compared."""
    people_budget: int | None = None
    machine_budget: int | None = None
    """Most labels from each; no limit with None."""


class TopShare:
    """Whether a number is among the largest ``share`` of the newest ``window``, itself included.

    It needs no scale: what is a large disagreement changes as r̂ learns. Numbers that are all alike are none of
    them large, and nothing is before 1/share of them have been seen.
    """

    def __init__(self, share: float, window: int) -> None:
        self._share = share
        self._newest: deque[float] = deque(maxlen=max(window, math.ceil(1 / share)))

    def take(self, number: float) -> bool:
        """Remember ``number``; whether it is among the largest."""
        self._newest.append(number)
        as_large = sum(other >= number for other in self._newest)
        return as_large <= self._share * len(self._newest)


class MixtureOracle:
    """People and a machine behind one face.

    A machine's label is asked for first where the margin decides, and otherwise only where it is used.

    Args:
        disagreement: of the heads of r̂ on a pair, in log-odds; asked where there is a rule on it.
        people_spent, machine_spent: labels that an earlier attempt of the run has spent.
    """

    def __init__(
        self,
        *,
        people: LabelSource,
        machine: LabelSource,
        rules: MixtureRules,
        disagreement: Callable[[ResponsePair], Awaitable[float]] | None = None,
        people_spent: int = 0,
        machine_spent: int = 0,
    ) -> None:
        self._people, self._machine, self._rules = people, machine, rules
        assert (disagreement is None) == (rules.disagreement is None), "the rule and what it is about come together"
        self._disagreement = disagreement
        self._most = None if rules.disagreement is None else TopShare(rules.disagreement, rules.disagreement_window)
        self.people_spent, self.machine_spent = people_spent, machine_spent

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        """One label a pair; raises OracleError once every budget is spent."""
        return [await self._one(pair) for pair in pairs]

    async def _one(self, pair: ResponsePair) -> PreferenceLabel:
        first: PreferenceLabel | None = None
        wanted = derive_uniform(pair.plan.pair_id, "audit") < self._rules.share
        if not wanted and self._disagreement is not None and self._most is not None and self._people_left:
            wanted = self._most.take(await self._disagreement(pair))
        if not wanted and self._rules.margin is not None and self._machine_left:
            first = await self._ask_machine(pair)
            wanted = self._is_close(first)
        if self._people_left and (wanted or not (first or self._machine_left)):
            self.people_spent += 1
            (label,) = await self._people.label([pair])
            if not (label.is_abstention and (label.reason or "").startswith(NOBODY)):
                return label
            self.people_spent -= 1
            logger.info("pair %s: %s; the machine decides", pair.plan.pair_id, label.reason)
            if not (first or self._machine_left):
                return label
        if first is not None:
            return first
        if not self._machine_left:
            raise OracleError(
                f"all labels are spent: {self.people_spent} by people, {self.machine_spent} by the machine; raise "
                "oracle.people_budget or oracle.machine_budget, then continue with --resume"
            )
        return await self._ask_machine(pair)

    async def _ask_machine(self, pair: ResponsePair) -> PreferenceLabel:
        self.machine_spent += 1
        (label,) = await self._machine.label([pair])
        return label

    def _is_close(self, label: PreferenceLabel) -> bool:
        assert self._rules.margin is not None
        if label.reward_a is not None and label.reward_b is not None:
            return abs(label.reward_a - label.reward_b) < self._rules.margin
        return label.is_tie

    @property
    def _people_left(self) -> bool:
        return self._rules.people_budget is None or self.people_spent < self._rules.people_budget

    @property
    def _machine_left(self) -> bool:
        return self._rules.machine_budget is None or self.machine_spent < self._rules.machine_budget
