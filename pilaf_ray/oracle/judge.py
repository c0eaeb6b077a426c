"""A language model as the judge, behind any OpenAI-compatible endpoint.

Each pair is asked in both orders; a judge that prefers whichever comes first has no opinion, so
disagreement is a tie. Answers are kept by content: the same question is never paid for twice. A question that
the endpoint refuses, e.g. for its length, costs its pair a label; an endpoint that cannot be reached is waited for.
"""

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from openai import APIConnectionError, APIStatusError, AsyncOpenAI
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from pilaf_ray.errors import ConfigError, OracleError, OracleUnavailableError
from pilaf_ray.observability.progress import PROGRESS
from pilaf_ray.observability.usage import UsageClock
from pilaf_ray.types import PreferenceLabel, ResponsePair, RoleUsage

logger = logging.getLogger(__name__)

T = TypeVar("T")

_REFUSED = (400, 413, 422)
"""Status codes that are about one question and not about the endpoint."""


@dataclass(kw_only=True, slots=True)
class JudgeCost:
    """What the judge has cost so far."""

    calls: int = 0
    cached: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    money: float = 0.0
    """In the unit of the prices in the configuration."""


class JudgeOracle:
    """Asks a chat model which of two answers is better.

    Args:
        template: of the question, with {prompt}, {first} and {second}; the answer must hold A, B or T (a tie).
        api_key_variable: environment variable with the key; None sends none.
        memory: file in which answers and costs are kept, None to keep them in this process only.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        template: str,
        api_key_variable: str | None = None,
        max_tokens: int = 8,
        attempts: int = 5,
        call_seconds: float = 60.0,
        concurrency: int = 8,
        price_input: float = 0.0,
        price_output: float = 0.0,
        memory: str | None = None,
        client: AsyncOpenAI | None = None,
    ) -> None:
        key = os.environ.get(api_key_variable, "") if api_key_variable else "none"
        if not key:
            raise ConfigError(
                f"oracle.api_key_variable: the environment has no {api_key_variable} where the oracle runs"
            )
        self._client = client or AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=call_seconds)
        self._url, self._model, self._template, self._max_tokens = url, model, template, max_tokens
        self._attempts, self._slots = attempts, asyncio.Semaphore(concurrency)
        self._prices = (price_input / 1e6, price_output / 1e6)
        self._memory = Path(memory) if memory else None
        self._answers: dict[str, str] = {}
        self._under_way: dict[str, asyncio.Task[str]] = {}
        self.cost = JudgeCost()
        self._clock = UsageClock("oracle")
        if self._memory is not None and self._memory.exists():
            self._remember(self._memory)

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        """One label a pair.

        Raises:
            OracleUnavailableError: the endpoint cannot be reached, or is overloaded, after all attempts.
            OracleError: it wants another key, or has no such model.
        """
        with self._clock.busy():
            return await _all_of(*(self._label(pair) for pair in pairs))

    async def score_texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """A judge compares and does not score."""
        raise OracleError("a judge gives no rewards of single responses: set evaluation.oracle")

    def usage(self) -> RoleUsage:
        """Busy time and peak memory."""
        return self._clock.usage()

    async def _label(self, pair: ResponsePair) -> PreferenceLabel:
        prompt, name = pair.plan.prompt.text, pair.plan.pair_id
        try:
            forward, backward = await _all_of(
                self._ask(prompt, pair.a.text, pair.b.text), self._ask(prompt, pair.b.text, pair.a.text)
            )
        except APIStatusError as error:
            reason = f"the judge refuses the question ({error.status_code}): {' '.join(error.message.split())[:200]}"
            logger.warning("pair %s: %s", name, reason)
            return PreferenceLabel(pair_id=name, probability=None, source="judge", reason=reason)
        first, second = verdict(forward), verdict(backward)
        if first is None or second is None:
            said = forward if first is None else backward
            reason = f"the judge's answer names neither A, B nor T: {said[:80]!r}"
            return PreferenceLabel(pair_id=name, probability=None, source="judge", reason=reason)
        return PreferenceLabel(pair_id=name, probability=in_both_orders(first, second), source="judge")

    async def _ask(self, prompt: str, first: str, second: str) -> str:
        # Filled by replacement, not by str.format: answers hold braces of their own.
        parts = {"{prompt}": prompt, "{first}": first, "{second}": second}
        question = fill(self._template, parts)
        key = hashlib.sha256(json.dumps([self._url, self._model, self._max_tokens, question]).encode()).hexdigest()
        if key not in self._answers and key not in self._under_way:
            # A task of its own: who waits for it may change, and what it costs is paid once.
            self._under_way[key] = task = asyncio.create_task(self._pay(key, question))
            task.add_done_callback(lambda _: self._under_way.pop(key))
            return await asyncio.shield(task)
        text = self._answers[key] if key in self._answers else await asyncio.shield(self._under_way[key])
        self.cost.cached += 1
        return text

    async def _pay(self, key: str, question: str) -> str:
        # Each attempt has a deadline of its own, and their number is bounded.
        async with self._slots:
            with PROGRESS.excused():
                reply = await self._call(question)
        text = reply.choices[0].message.content or ""
        self.cost.calls += 1
        if reply.usage is not None:
            self.cost.input_tokens += reply.usage.prompt_tokens
            self.cost.output_tokens += reply.usage.completion_tokens
            self.cost.money += (
                reply.usage.prompt_tokens * self._prices[0] + reply.usage.completion_tokens * self._prices[1]
            )
        self._answers[key] = text
        if self._memory is not None:
            with self._memory.open("a") as stream:
                stream.write(json.dumps({"key": key, "answer": text, "cost": asdict(self.cost)}) + "\n")
        return text

    async def _call(self, question: str) -> Any:
        try:
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(self._attempts),
                wait=wait_random_exponential(multiplier=0.5, max=30),
                retry=retry_if_exception(_passes),
                reraise=True,
            ):
                with attempt:
                    return await self._client.chat.completions.create(
                        model=self._model,
                        messages=[{"role": "user", "content": question}],
                        max_tokens=self._max_tokens,
                        temperature=0.0,
                    )
        except (APIConnectionError, APIStatusError) as error:
            if isinstance(error, APIStatusError) and error.status_code in _REFUSED:
                raise
            kind = OracleUnavailableError if _passes(error) else OracleError
            raise kind(
                f"the judge at {self._url} does not answer ({type(error).__name__}): "
                "look at oracle.url, oracle.model and the key, then continue with --resume"
            ) from error
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _remember(self, memory: Path) -> None:
        """Take up the answers and costs of an earlier process, less a line that it was killed in."""
        written = memory.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        os.truncate(memory, len(whole))
        for line in whole.decode().splitlines():
            row = json.loads(line)
            self._answers[row["key"]] = row["answer"]
            self.cost = JudgeCost(**row["cost"])


async def _all_of(*calls: Coroutine[Any, Any, T]) -> list[T]:
    """Results in order, or the first error once every call has ended: none goes on unheeded, and answers are kept."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    done: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done


def _passes(error: BaseException) -> bool:
    """Whether an error may pass by itself: no connection, too many requests, or the server's own fault."""
    if isinstance(error, APIStatusError):
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, APIConnectionError)


def fill(template: str, parts: dict[str, str]) -> str:
    """``template`` with each name replaced once, so that a text in it cannot name another."""
    out: list[str] = []
    rest = template
    while rest:
        found = [(rest.find(name), name) for name in parts if name in rest]
        if not found:
            break
        at, name = min(found)
        out += [rest[:at], parts[name]]
        rest = rest[at + len(name) :]
    return "".join([*out, rest])


def verdict(text: str) -> float | None:
    """P(first is better) of a judge's answer: its first word that is A, B or T; None where there is none."""
    for word in text.upper().replace("*", " ").split():
        name = word.strip(".,:;!()[]\"'`")
        if name in ("A", "B", "T", "TIE"):
            return {"A": 1.0, "B": 0.0}.get(name, 0.5)
    return None


def in_both_orders(first: float, second: float) -> float:
    """P(a ≻ b) of two verdicts, a having been shown first and then second; a tie unless they agree."""
    return first if first == 1.0 - second else 0.5
