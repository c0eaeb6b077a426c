"""The judge oracle against a real OpenAI-compatible server: vLLM's own."""

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from openai_server import MODEL, TEMPLATE, Served, openai_server
from pairs import pair

from pilaf_ray.config.oracle import JudgeOracleConfig
from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.errors import OracleError, OracleUnavailableError
from pilaf_ray.oracle import make_oracle
from pilaf_ray.store.reading import LedgerReader
from pilaf_ray.types import PreferenceLabel, ResponsePair

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
REQUESTS, INPUT, OUTPUT = "vllm:request_success_total", "vllm:prompt_tokens_total", "vllm:generation_tokens_total"
LONGER, SHORTER, EVEN = pair(0, a="a long answer", b="short"), pair(1, a="short", b="a long one"), pair(2, a="x", b="y")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with openai_server(tmp_path_factory.mktemp("judge")) as served:
        yield served


def judge(served: Served, memory: Path | None = None, **settings: Any) -> Any:
    """As a run makes it, from its configuration."""
    config = JudgeOracleConfig(
        url=served.url, model=MODEL, template=TEMPLATE, max_tokens=1, attempts=3, price_input=3.0, price_output=15.0
    )
    arguments = config.model_dump(exclude={"type"}) | {"memory": str(memory) if memory else None} | settings
    return make_oracle("judge", arguments)


async def labels_of(oracle: Any, *pairs: ResponsePair) -> list[PreferenceLabel]:
    found: list[PreferenceLabel] = await oracle.label(pairs)
    return found


async def test_verdicts_of_a_real_server_and_what_they_cost(server: Served, tmp_path: Path) -> None:
    before = {name: server.counted(name) for name in (REQUESTS, INPUT, OUTPUT)}
    oracle = judge(server, tmp_path / "judge.jsonl")
    found = await labels_of(oracle, LONGER, SHORTER, EVEN)
    assert [(label.probability, label.source) for label in found] == [(1.0, "judge"), (0.0, "judge"), (0.5, "judge")]
    requests, tokens_in, tokens_out = (server.counted(name) - before[name] for name in (REQUESTS, INPUT, OUTPUT))
    cost = oracle.cost
    assert (requests, tokens_out) == (6, 6) and tokens_in > 6
    assert (cost.calls, cost.input_tokens, cost.output_tokens) == (requests, tokens_in, tokens_out)
    assert cost.money == pytest.approx((3 * tokens_in + 15 * tokens_out) / 1e6)
    # A second asking is answered from memory, by this process and by one that comes after it.
    assert await labels_of(oracle, LONGER, SHORTER, EVEN) == found
    later = judge(server, tmp_path / "judge.jsonl")
    assert await labels_of(later, LONGER, SHORTER, EVEN) == found
    assert server.counted(REQUESTS) - before[REQUESTS] == 6
    assert (later.cost.calls, later.cost.cached, later.cost.money) == (6, 6, pytest.approx(cost.money))
    kept = [json.loads(line)["answer"] for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert sorted(kept) == ["A", "A", "B", "B", "T", "T"]


async def test_a_judge_that_decides_by_position_ties(server: Served) -> None:
    # The first answer is always the longer one for this server, whichever of the two it is.
    template = "{prompt}@@{first}" + "!" * 40 + "@@{second}"
    (label,) = await labels_of(judge(server, template=template), LONGER)
    assert label.probability == 0.5 and not label.is_abstention


async def test_answers_that_are_no_verdict_and_questions_that_are_refused_abstain(server: Served) -> None:
    oracle = judge(server, template="nonsense {prompt}@@{first}@@{second}")
    endless = pair(3, a="word " * 2000, b="short")
    silent, refused = await labels_of(oracle, LONGER, endless)
    assert silent.is_abstention and "names neither A, B nor T: '?'" in (silent.reason or "")
    assert refused.is_abstention and "refuses the question (400)" in (refused.reason or "")
    assert "maximum context length" in (refused.reason or "") and oracle.cost.calls == 2


async def test_eight_at_a_time_each_get_their_own_verdict(server: Served) -> None:
    pairs = [pair(100 + i, a="a" * (1 + i % 7), b="b" * (1 + i % 5)) for i in range(40)]
    found = await labels_of(judge(server), *pairs)
    expected = [1.0 if i % 7 > i % 5 else 0.0 if i % 7 < i % 5 else 0.5 for i in range(40)]
    assert [label.probability for label in found] == expected
    assert [label.pair_id for label in found] == [f"pair-{100 + i}" for i in range(40)]


async def test_a_wrong_model_is_one_line_and_no_outage(server: Served) -> None:
    with pytest.raises(OracleError, match=r"does not answer \(NotFoundError\)") as caught:
        await labels_of(judge(server, model="another"), LONGER)
    assert not isinstance(caught.value, OracleUnavailableError) and "\n" not in str(caught.value)


def test_a_run_is_labelled_by_the_server(server: Served, tmp_path: Path) -> None:
    section = f'{{type: judge, url: "{server.url}", model: {MODEL}, max_tokens: 1, template: "{TEMPLATE}"}}'
    policy = make_tiny_llama(tmp_path / "policy", seed=1)
    words = [f"run.folder={tmp_path}", "run.name=judged", f"model.policy={policy}", f"oracle={section}"]
    words += ["evaluation.oracle={type: function, target: 'pilaf_ray.oracle.sentiment:score'}"]
    before = server.counted(REQUESTS)
    subprocess.run([sys.executable, "-m", "pilaf_ray", "train", str(TINY), *words], check=True, timeout=500)
    reader = LedgerReader(f"sqlite:///{tmp_path / 'judged' / 'preferences.db'}")
    pairs = reader.trained_sample(12)
    reader.close()
    assert len(pairs) == 12 and {item.label.source for item in pairs} == {"judge"}
    for item in pairs:
        a, b = len(item.pair.a.text), len(item.pair.b.text)
        assert item.probability == (0.5 if a == b else float(a > b)), (item.pair.a.text, item.pair.b.text)
    kept = (tmp_path / "judged" / "judge.jsonl").read_text().splitlines()
    assert len(kept) == server.counted(REQUESTS) - before == json.loads(kept[-1])["cost"]["calls"] >= 20


async def test_a_server_that_is_gone_is_tried_again_and_then_an_outage(server: Served, tmp_path: Path) -> None:
    """The last test: it ends the server."""
    oracle = judge(server, tmp_path / "judge.jsonl")
    known = await labels_of(oracle, LONGER)
    server.end()
    with pytest.raises(OracleUnavailableError, match="does not answer") as caught:
        await labels_of(oracle, SHORTER)
    assert "\n" not in str(caught.value)
    assert await labels_of(oracle, LONGER) == known, "what was answered once needs no server"
    # In its place something that hangs up: every attempt is a connection.
    connections: list[float] = []

    def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.get_running_loop().time())
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", server.port, family=socket.AF_INET):
        with pytest.raises(OracleUnavailableError):
            await labels_of(oracle, SHORTER)
    assert len(connections) == 2 * 3, "three attempts in each order"
    assert oracle.cost.calls == 2
