"""A user's Python function as oracle."""

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from pilaf_ray.errors import ConfigError, OracleError, OracleUnavailableError
from pilaf_ray.observability.usage import UsageClock
from pilaf_ray.oracle.label_rules import LabelRule
from pilaf_ray.types import PreferenceLabel, ResponsePair, RoleUsage


def load_function(target: str) -> Callable[..., Any]:
    """Import ``package.module:callable``; raises ConfigError in one line."""
    module_name, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"oracle.target: cannot import '{target}': {error}") from error
    if not callable(function):
        raise ConfigError(f"oracle.target: '{target}' is not callable")
    loaded: Callable[..., Any] = function
    return loaded


class FunctionOracle:
    """Scores texts or compares pairs by a function, sync or async.

    ``score(prompts, responses) -> rewards`` or ``compare(prompts, firsts, seconds) -> P(first
    preferred)``, where None abstains. Comparers see each pair in its drawn order, so a
    position bias cannot leak which side was which.
    """

    def __init__(self, *, target: str, kind: str, scale: float, rule: LabelRule) -> None:
        self._target = target
        self._kind = kind
        self._scale = scale
        self._rule = rule
        self._function = load_function(target)
        self._clock = UsageClock("oracle")

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        """One label a pair."""
        with self._clock.busy():
            return await (self._by_score(pairs) if self._kind == "score" else self._by_comparison(pairs))

    async def score_texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Rewards on the log-odds scale; only for ``kind: score``."""
        if self._kind != "score":
            raise OracleError(f"{self._target} compares pairs and has no reward of a single response")
        return await self._numbers(list(prompts), list(responses))

    async def _by_score(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        prompts = [pair.plan.prompt.text for pair in pairs]
        rewards = await self._numbers(
            prompts + prompts, [pair.a.text for pair in pairs] + [pair.b.text for pair in pairs]
        )
        labels = []
        for pair, a, b in zip(pairs, rewards[: len(pairs)], rewards[len(pairs) :], strict=True):
            labels.append(
                PreferenceLabel(
                    pair_id=pair.plan.pair_id,
                    probability=self._rule(a - b, pair.plan.label_seed),
                    source="function",
                    reward_a=a,
                    reward_b=b,
                )
            )
        return labels

    async def _by_comparison(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        shown = [(p.b, p.a) if p.plan.present_b_first else (p.a, p.b) for p in pairs]
        answers = await self._call(
            [pair.plan.prompt.text for pair in pairs],
            [first.text for first, _ in shown],
            [second.text for _, second in shown],
            expected=len(pairs),
        )
        return [self._answer(pair, answer) for pair, answer in zip(pairs, answers, strict=True)]

    def _answer(self, pair: ResponsePair, answer: object) -> PreferenceLabel:
        name = pair.plan.pair_id
        if answer is None:
            reason = f"{self._target} abstained"
            return PreferenceLabel(pair_id=name, probability=None, source="function", reason=reason)
        first = self._finite(answer)
        if not 0.0 <= first <= 1.0:
            raise OracleError(f"{self._target} answered {first} for pair {name}; give a number in [0, 1] or None")
        probability = 1.0 - first if pair.plan.present_b_first else first
        return PreferenceLabel(pair_id=name, probability=probability, source="function")

    async def _numbers(self, prompts: list[str], responses: list[str]) -> list[float]:
        rewards = await self._call(prompts, responses, expected=len(prompts))
        return [self._finite(reward) * self._scale for reward in rewards]

    async def _call(self, *arguments: list[str], expected: int) -> list[object]:
        # The user's code may raise anything; it is named here. Networks are waited for, the rest stops the run.
        try:
            result = self._function(*arguments)
            if inspect.isawaitable(result):
                result = await result
        except OracleUnavailableError:
            raise
        except OSError as error:
            raise OracleUnavailableError(f"{self._target} raised {type(error).__name__}: {error}") from error
        except Exception as error:
            raise OracleError(f"{self._target} raised {type(error).__name__}: {error}") from error
        answers = list(result)
        if len(answers) != expected:
            raise OracleError(f"{self._target} gave {len(answers)} answers for {expected} inputs")
        return answers

    def _finite(self, value: object) -> float:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise OracleError(f"{self._target} returned {value!r}; give finite numbers")
        return float(value)

    def usage(self) -> RoleUsage:
        """Busy time and peak memory."""
        return self._clock.usage()
