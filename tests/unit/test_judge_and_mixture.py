"""Judges over a scripted endpoint, and mixtures of people and machines."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from pairs import pair
from test_measures import result_of

from pilaf_ray.config.oracle import JUDGE_TEMPLATE, JudgeOracleConfig
from pilaf_ray.errors import ConfigError, OracleError, OracleUnavailableError
from pilaf_ray.evaluation.verdicts import verdict_pairs
from pilaf_ray.evaluation_run import judge_section
from pilaf_ray.oracle.human import NOBODY
from pilaf_ray.oracle.judge import JudgeOracle, fill, in_both_orders, verdict
from pilaf_ray.oracle.mixture import MixtureOracle, MixtureRules
from pilaf_ray.types import PreferenceLabel, ResponsePair


class Endpoint:
    """An OpenAI-compatible server in this process: answers by a rule, after some failures."""

    def __init__(self, rule: Any, *, failures: Sequence[int] = ()) -> None:
        self.rule, self.failures = rule, list(failures)
        self.questions: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.failures:
            return httpx.Response(self.failures.pop(0), json={"error": {"message": "no"}})
        question = json.loads(request.content)["messages"][0]["content"]
        self.questions.append(question)
        message = {"role": "assistant", "content": self.rule(question)}
        body = {
            "id": "x", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102},
        }  # fmt: skip
        return httpx.Response(200, json=body)


def judge(endpoint: Endpoint, *, memory: Path | None = None, attempts: int = 3) -> JudgeOracle:
    http = httpx.AsyncClient(transport=httpx.MockTransport(endpoint))
    client = AsyncOpenAI(base_url="http://judge/v1", api_key="none", max_retries=0, http_client=http)
    return JudgeOracle(
        url="http://judge/v1", model="m", template="{prompt}|{first}|{second}", client=client, attempts=attempts,
        price_input=10.0, price_output=1000.0, memory=str(memory) if memory else None,
    )  # fmt: skip


def longer(question: str) -> str:
    _, first, second = question.split("|")
    return "A" if len(first) > len(second) else "B."


async def test_both_orders_decide_and_a_judge_of_positions_ties() -> None:
    (found,) = await judge(Endpoint(longer)).label([pair(0, a="long answer", b="short")])
    assert (found.probability, found.source) == (1.0, "judge")
    (found,) = await judge(Endpoint(longer)).label([pair(0, a="no", b="longer")])
    assert found.probability == 0.0
    (found,) = await judge(Endpoint(lambda _: "A")).label([pair(0)])
    assert found.probability == 0.5
    (found,) = await judge(Endpoint(lambda _: "I cannot say")).label([pair(0)])
    assert found.is_abstention and "names neither A, B nor T" in (found.reason or "")


async def test_an_evaluation_asks_in_both_orders_and_pays_once_for_them(tmp_path: Path) -> None:
    """Verdict pairs are shown a first and b first; a judge asks both orders of each anyway, with the same questions."""
    first = result_of(rewards=[0.0, 0.0], kls=[0.0, 0.0], controls=[0.0, 0.0])
    endpoint = Endpoint(longer)
    oracle = judge(endpoint)
    theirs = replace(first, responses=["short", "a much longer answer than ours"])
    shown_first, shown_second = verdict_pairs(first, theirs)
    found = await asyncio.gather(oracle.label(shown_first), oracle.label(shown_second))
    assert [[label.probability for label in labels] for labels in found] == [[1.0, 0.0]] * 2
    assert (len(endpoint.questions), oracle.cost.cached) == (4, 4)


def test_people_cannot_judge_outside_a_run() -> None:
    machine = judge_section("{type: judge, url: 'http://x/v1', model: m}")
    assert isinstance(machine, JudgeOracleConfig)
    assert judge_section("{type: function, target: 'a.b:c', kind: compare}").type == "function"
    assert judge_section("{type: reward_model, path: x}").type == "reward_model"
    mixture = "{type: mixture, machine: {type: judge, url: 'http://x/v1', model: m}}"
    for text in ("{type: human}", mixture):
        with pytest.raises(ConfigError, match=r"^--judge: type: \w+ asks people, who can be asked in a run only; give"):
            judge_section(text)
    for text in ("{type: oracle}", "[", "{type: judge}"):
        with pytest.raises(ConfigError, match=r"^--judge: give an oracle section") as caught:
            judge_section(text)
        assert "\n" not in str(caught.value)


async def test_answers_are_paid_once_also_after_a_restart(tmp_path: Path) -> None:
    endpoint = Endpoint(longer)
    first = judge(endpoint, memory=tmp_path / "judge.jsonl")
    same = [pair(0, a="long answer", b="short"), pair(0, a="long answer", b="short")]
    await first.label(same[:1])
    await first.label(same[1:])
    assert (first.cost.calls, first.cost.cached, len(endpoint.questions)) == (2, 2, 2)
    # Two calls of 100 input tokens at 10 and 2 output tokens at 1000 for a million.
    assert first.cost.money == pytest.approx(2 * (100 * 10 + 2 * 1000) / 1e6)
    again = judge(endpoint, memory=tmp_path / "judge.jsonl")
    await again.label(same)
    assert len(endpoint.questions) == 2 and again.cost.money == pytest.approx(first.cost.money)


async def test_what_may_pass_is_tried_again_and_the_rest_is_one_line() -> None:
    endpoint = Endpoint(longer, failures=[503, 429])
    (found,) = await judge(endpoint, attempts=4).label([pair(0, a="long answer", b="short")])
    assert found.probability == 1.0
    refused = Endpoint(longer, failures=[401, 401])
    with pytest.raises(OracleError, match="does not answer") as caught:
        await judge(refused).label([pair(0)])
    assert not isinstance(caught.value, OracleUnavailableError), "waiting would not help"
    assert refused.failures == [] and refused.questions == []
    overloaded = Endpoint(longer, failures=[503] * 6)
    with pytest.raises(OracleUnavailableError, match="does not answer"):
        await judge(overloaded, attempts=3).label([pair(0)])
    assert overloaded.failures == [], "three attempts in each order"
    with pytest.raises(ConfigError, match="the environment has no NO_SUCH_KEY"):
        JudgeOracle(url="http://judge/v1", model="m", template="", api_key_variable="NO_SUCH_KEY")


async def test_a_question_that_is_refused_costs_its_pair_and_nothing_else() -> None:
    endpoint = Endpoint(longer, failures=[400, 400])
    oracle = judge(endpoint)
    refused, answered = [(await oracle.label([one]))[0] for one in (pair(0), pair(1, a="long answer", b="short"))]
    assert refused.is_abstention and "refuses the question (400)" in (refused.reason or "")
    assert answered.probability == 1.0 and endpoint.failures == [] and oracle.cost.calls == 2


async def test_the_same_question_at_the_same_time_is_paid_once() -> None:
    endpoint = Endpoint(lambda _: "A")
    oracle = judge(endpoint)
    labels = await oracle.label([pair(0, a="same", b="same")] * 3)
    assert [label.probability for label in labels] == [0.5] * 3
    assert (len(endpoint.questions), oracle.cost.calls, oracle.cost.cached) == (1, 1, 5)


async def test_half_a_line_of_a_killed_process_is_forgotten(tmp_path: Path) -> None:
    memory, endpoint = tmp_path / "judge.jsonl", Endpoint(longer)
    await judge(endpoint, memory=memory).label([pair(0, a="long answer", b="short")])
    whole = memory.read_text()
    memory.write_text(whole + '{"key": "0", "answ')
    again = judge(endpoint, memory=memory)
    assert memory.read_text() == whole and again.cost.calls == 2
    await again.label([pair(0, a="long answer", b="short"), pair(1, a="long answer", b="short")])
    assert len(endpoint.questions) == 4 and len(memory.read_text().splitlines()) == 4


def test_verdicts_and_templates() -> None:
    said = ["A", "**B**.", "Tie", "I prefer (B)", "", "Apples"]
    assert [verdict(text) for text in said] == [1.0, 0.0, 0.5, 0.0, None, None]
    assert [in_both_orders(1, 0), in_both_orders(0, 1), in_both_orders(1, 1), in_both_orders(0.5, 0)] == [
        1,
        0,
        0.5,
        0.5,
    ]
    parts = {"{prompt}": "say {second}", "{first}": "{0}", "{second}": "y"}
    assert fill("{prompt}/{first}/{second}/{first}", parts) == "say {second}/{0}/y/{0}"
    assert all(name in JUDGE_TEMPLATE for name in parts)
    with pytest.raises(ValueError, match=r"does not hold \{second\}"):
        JudgeOracleConfig(url="http://x", model="m", template="{prompt} {first}")


class Source:
    """Labels everything alike and counts."""

    def __init__(self, name: str, **label: Any) -> None:
        self.name, self.values = name, label
        self.asked: list[str] = []

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        self.asked += [p.plan.pair_id for p in pairs]
        values = {"probability": 1.0, **self.values}
        return [PreferenceLabel(pair_id=p.plan.pair_id, source=self.name, **values) for p in pairs]


async def test_a_share_is_audited_by_lot_that_does_not_depend_on_order() -> None:
    pairs = [pair(i) for i in range(400)]
    people, machine = Source("human"), Source("judge")
    labels = await MixtureOracle(people=people, machine=machine, rules=MixtureRules(share=0.2)).label(pairs)
    assert 50 < len(people.asked) < 110 and len(people.asked) + len(machine.asked) == 400
    again = Source("human")
    await MixtureOracle(people=again, machine=machine, rules=MixtureRules(share=0.2)).label(pairs[::-1])
    assert sorted(again.asked) == sorted(people.asked)
    assert {label.pair_id for label in labels if label.source == "human"} == set(people.asked)


async def test_close_calls_go_to_people_and_late_people_leave_them_to_the_machine() -> None:
    people = Source("human", probability=None, reason=f"{NOBODY} within 5 s")
    machine = Source("reward_model", reward_a=0.2, reward_b=0.1)
    mixture = MixtureOracle(people=people, machine=machine, rules=MixtureRules(share=0.0, margin=0.5))
    (label,) = await mixture.label([pair(0)])
    assert label.source == "reward_model" and people.asked == machine.asked == ["pair-0"]
    assert (mixture.people_spent, mixture.machine_spent) == (0, 1)
    sure = Source("reward_model", reward_a=2.0, reward_b=0.0)
    await MixtureOracle(people=people, machine=sure, rules=MixtureRules(share=0.0, margin=0.5)).label([pair(1)])
    assert people.asked == ["pair-0"]
    skipped = Source("human", probability=None, reason="skipped by 2 annotators: x")
    (label,) = await MixtureOracle(people=skipped, machine=sure, rules=MixtureRules(share=1.0)).label([pair(2)])
    assert label.is_abstention and label.source == "human"


async def test_budgets() -> None:
    people, machine = Source("human"), Source("judge")
    rules = MixtureRules(share=1.0, people_budget=2, machine_budget=3)
    mixture = MixtureOracle(people=people, machine=machine, rules=rules, machine_spent=1)
    labels = await mixture.label([pair(i) for i in range(4)])
    assert [label.source for label in labels] == ["human", "human", "judge", "judge"]
    with pytest.raises(OracleError, match="all labels are spent: 2 by people, 3 by the machine"):
        await mixture.label([pair(5)])
