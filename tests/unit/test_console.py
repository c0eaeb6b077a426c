"""The console's pages, their numbers, and who may see them."""

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from console_run import ATTACK, make_run, metrics_row
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from pilaf_ray.cli import app
from pilaf_ray.console.access import AccessBook, AccessRole, form_token
from pilaf_ray.console.app import create_app, is_loopback
from pilaf_ray.console.charts import charts_for, columns
from pilaf_ray.console.frontier import frontier_figure
from pilaf_ray.console.guard import RateLimit
from pilaf_ray.console.ledger_reader import LedgerReader, PairFilter
from pilaf_ray.console.news import News
from pilaf_ray.console.records import Evaluation, JsonlTail, RunRecords
from pilaf_ray.console.rendering import Pages
from pilaf_ray.errors import AccessError, ConfigError, RunFolderError
from pilaf_ray.observability.sinks import JsonlSink

PAGES = ("/", "/roles", "/pairs", "/pairs/pair-0", "/samples")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "example")


@pytest.fixture
def client(run: Path) -> Iterator[TestClient]:
    with TestClient(create_app(run), base_url="http://127.0.0.1", follow_redirects=False) as opened:
        yield opened


def test_the_overview_says_what_metrics_and_evaluations_say(client: TestClient) -> None:
    page = client.get("/").text
    shown = dict(re.findall(r'data-metric="([^"]+)" data-value="([^"]*)"', page))
    expected = {key: "" if value is None else str(value) for key, value in metrics_row(4).items()}
    assert shown == expected
    assert "2.5" in page and "> 2<" in page.replace("<b>", "> ").replace("</b>", "<")  # reward, and J = 2.5 − 0.1·5
    states = dict(re.findall(r'data-state="(\w+)">(\d+)', page))
    assert states == {
        "planned": "0", "sampled": "0", "labeled": "4", "trained": "4",
        "abstained": "0", "rejected": "0", "expired": "0",
    }  # fmt: skip
    # 2 pairs a step, and 4 s a step.
    assert re.search(r"Pairs per second</span><b>0\.5<", page)
    # (12 + 24 + 36 + 48) tokens in four steps of four seconds.
    assert "7.5 tokens/s" in page


def test_markup_of_models_and_messages_is_text(client: TestClient) -> None:
    for address in PAGES:
        answer = client.get(address)
        assert answer.status_code == 200
        assert "document.title" not in answer.text or "<script>document" not in answer.text
        assert "<img" not in answer.text and "<b>killed" not in answer.text
    # The comparison of words may cut the text; what is left of its markup is escaped all the same.
    shown = re.sub(r"</?mark>", "", client.get("/pairs/pair-0").text)
    assert "&lt;script&gt;document.title=&#39;taken&#39;&lt;/script&gt;" in shown
    assert "&lt;script&gt;" in client.get("/samples").text
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_no_page_needs_an_inline_script_or_style(client: TestClient) -> None:
    for address in (*PAGES, "/enter"):
        page = client.get(address).text
        assert re.findall(r"<script(?![^>]*\bsrc=)", page) == []
        assert re.findall(r"""\s(?:style|on\w+)\s*=\s*["']""", page) == []
        assert re.findall(r'(?:src|href)="(?:https?:)?//', page) == []


def test_secrets_in_logs_are_struck_out(client: TestClient) -> None:
    page = client.get("/roles").text
    assert "0123456789abcdef" not in page and "WANDB_API_KEY=•••" in page
    for name, text in (("times lost", "1"), ("memory", "1.5 GiB"), ("state", "serving")):
        assert f"<dt>{name}</dt><dd>{text}</dd>" in page
    assert "&lt;b&gt;killed" in page and "<b>killed" not in page


def test_only_the_roles_that_may_see_a_page_see_it(run: Path) -> None:
    book = AccessBook(run / "access.json")
    secrets = {role: book.issue(role, role) for role in AccessRole}
    with TestClient(create_app(run, host="0.0.0.0"), base_url="http://0.0.0.0", follow_redirects=False) as client:
        for address in PAGES:
            refused = client.get(address)
            assert (refused.status_code, refused.headers["location"]) == (303, "/enter")
        for role, code in ((AccessRole.VIEWER, 200), (AccessRole.LEAD, 200), (AccessRole.ANNOTATOR, 403)):
            client.cookies.set("pilaf_token", secrets[role])
            assert [client.get(address).status_code for address in PAGES] == [code] * len(PAGES)
        book.revoke("viewer")
        client.cookies.set("pilaf_token", secrets[AccessRole.VIEWER])
        assert client.get("/").status_code == 303


def test_entering_sets_a_cookie_that_scripts_and_other_sites_cannot_use(run: Path, client: TestClient) -> None:
    secret = AccessBook(run / "access.json").issue("lee", AccessRole.ANNOTATOR)
    answer = client.post("/enter", data={"token": secret})
    assert (answer.status_code, answer.headers["location"]) == (303, "/label")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    codes = [client.post("/enter", data={"token": f"wrong-{n}"}).status_code for n in range(12)]
    assert codes[:10] == [401] * 10 and codes[-1] == 429
    foreign = client.post("/enter", data={"token": secret}, headers={"origin": "http://elsewhere.example"})
    assert foreign.status_code == 403


def test_hosts_sizes_and_rates_are_bounded(run: Path) -> None:
    time = [0.0]
    limit = RateLimit(per_second=2, burst=3, clock=lambda: time[0])
    with TestClient(create_app(run, limit=limit), base_url="http://localhost") as client:
        assert client.get("/enter", headers={"host": "attacker.example"}).status_code == 400
        assert client.post("/enter", content=b"x" * 70_000).status_code == 413
        codes = [client.get("/enter").status_code for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429]
        assert client.get("/enter").headers["retry-after"] == "1"
        time[0] = 1.0
        assert [client.get("/enter").status_code for _ in range(3)] == [200, 200, 429]


def test_tokens_are_hashed_and_named_once(tmp_path: Path) -> None:
    book = AccessBook(tmp_path / "access.json")
    secret = book.issue("kim", AccessRole.LEAD)
    assert secret not in (tmp_path / "access.json").read_text()
    assert (tmp_path / "access.json").stat().st_mode & 0o077 == 0
    found = AccessBook(tmp_path / "access.json").find(secret)
    assert found is not None and (found.name, found.role) == ("kim", AccessRole.LEAD)
    assert book.find(secret[:-1]) is None and book.find("") is None
    with pytest.raises(AccessError, match="kim has a token already"):
        book.issue("kim", AccessRole.VIEWER)
    with pytest.raises(AccessError, match="cannot be a name"):
        book.issue("<kim>", AccessRole.VIEWER)
    book.revoke("kim")
    assert book.find(secret) is None
    assert book.find(book.issue("kim", AccessRole.VIEWER)) is not None
    assert form_token(secret) != form_token(secret + "x")


def test_addresses_that_only_this_machine_reaches() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org")] == [False] * 4


def test_a_tail_reads_whole_lines_once_and_starts_over_after_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = JsonlTail(path)
    assert tail.poll() == (False, [])
    sink = JsonlSink(path)
    sink.write({"step": 1})
    with path.open("a") as stream:
        stream.write('{"step":')
    assert tail.poll() == (False, [{"step": 1}])
    assert tail.poll() == (False, [])
    with path.open("a") as stream:
        stream.write(" 2}\n")
    assert tail.poll() == (False, [{"step": 2}])
    sink.cut_after(1)
    sink.write({"step": 2, "again": True})
    assert tail.poll() == (True, [{"step": 1}, {"step": 2, "again": True}])


def test_thinned_columns_keep_the_newest_and_equal_the_rows() -> None:
    rows = [{"step": step, "loss": step / 2} for step in range(1, 4001)]
    found = columns(rows)
    assert found["step"][-1] == 4000 and len(found["step"]) <= 1500
    assert all(loss == step / 2 for step, loss in zip(found["step"], found["loss"], strict=True) if step is not None)
    assert columns([{"step": 1, "a": None}, {"step": 2, "b": 3}]) == {"step": [1, 2], "a": [None, None], "b": [None, 3]}


def test_a_metric_that_no_chart_knows_gets_its_own() -> None:
    charts = charts_for(["step", "loss", "brand/new"], bound=1, in_flight=4)
    assert [(chart.title, chart.keys) for chart in charts] == [("Loss", ("loss",)), ("brand/new", ("brand/new",))]


@pytest.fixture
def ledger(run: Path) -> Iterator[LedgerReader]:
    reader = LedgerReader(f"sqlite:///{run}/preferences.db")
    yield reader
    reader.close()


@pytest.mark.parametrize(
    ("wanted", "indices"),
    [
        (PairFilter(), [7, 6, 5, 4, 3, 2, 1, 0]),
        (PairFilter(state="trained"), [3, 2, 1, 0]),
        (PairFilter(branch="interpolated", state="labeled"), [7, 5]),
        (PairFilter(source="human"), []),
        (PairFilter(min_age=1), [3, 2]),
        (PairFilter(tie=True), [5]),
        (PairFilter(text="topic 6 &"), [6]),
        (PairFilter(text="100%"), []),
    ],
)  # fmt: skip
def test_filters(ledger: LedgerReader, wanted: PairFilter, indices: list[int]) -> None:
    page = ledger.page(wanted)
    assert [pair.index for pair in page.pairs] == indices and page.complete


def test_pages_follow_each_other_without_gap_or_repeat(tmp_path: Path) -> None:
    run = make_run(tmp_path / "long", pairs=130)
    reader = LedgerReader(f"sqlite:///{run}/preferences.db")
    seen: list[int] = []
    before: int | None = None
    while True:
        page = reader.page(PairFilter(), before=before)
        seen += [pair.index for pair in page.pairs]
        before = page.next_before
        if before is None:
            break
    reader.close()
    assert seen == list(range(129, -1, -1))


def test_a_search_that_takes_too_long_says_where_to_go_on(run: Path) -> None:
    seconds = iter(range(1000))
    reader = LedgerReader(f"sqlite:///{run}/preferences.db", clock=lambda: float(next(seconds)))
    page = reader.page(PairFilter(text="nothing has this"))
    reader.close()
    assert (page.pairs, page.complete) == ([], False)
    assert page.next_before is not None


def test_ages_are_counted_from_the_oldest_version(ledger: LedgerReader) -> None:
    assert ledger.ages(newest_step=2, steps=50) == {0: 2, 1: 2}
    assert ledger.ages(newest_step=2, steps=1) == {1: 2}


def test_the_handle_cannot_write(ledger: LedgerReader) -> None:
    with ledger.database.reading() as connection, pytest.raises(Exception, match="readonly"):
        connection.exec_driver_sql("delete from pairs")


def test_a_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a run folder"):
        create_app(tmp_path)


def test_a_pair_shows_where_it_comes_from(client: TestClient) -> None:
    page = client.get("/pairs/pair-3").text
    assert "interpolated" in page and "P(a ≻ b) = 1" in page and "3, 1003, 3" in page
    assert "<mark> same</mark>" in page and "<mark> other</mark>" in page
    assert client.get("/pairs/none").status_code == 404


def test_the_attack_is_what_the_model_said(run: Path) -> None:
    stored = json.loads((run / "evaluations" / "step-000000.json").read_text())["responses"][0]
    assert stored == ATTACK


def test_what_all_visitors_share_is_made_once_a_second(tmp_path: Path) -> None:
    now, made = [10.0], list[float]()
    run = make_run(tmp_path / "run")
    records = RunRecords(run)
    pages = Pages(records, labelling=False, clock=lambda: now[0])

    def values() -> dict[str, object]:
        made.append(now[0])
        return {"problem": f"<b>{now[0]:g}</b>", "visitor": None, "path": "/"}

    texts = []
    for now[0] in (10.0, 10.9, 11.0, 11.5):
        texts.append(pages.shared("problem.html.j2", values))
    assert made == [10.0, 11.0] and texts[0] == texts[1] and "&lt;b&gt;11" in texts[2]
    # News is told at once.
    JsonlSink(run / "metrics.jsonl").write(metrics_row(5))
    records.refresh(at_most_every=0.0)
    assert pages.kept("problem.html.j2") is None
    pages.shared("problem.html.j2", values)
    assert made == [10.0, 11.0, 11.5]


@pytest.mark.parametrize(
    ("kls", "ticks"), [([0.000487], ["-0.4", "-0.2", "0", "0.2", "0.4"]), ([0.0, 13.0], ["0", "5", "10"])]
)
def test_the_frontier_has_round_figures_on_its_axes(kls: list[float], ticks: list[str]) -> None:
    found = frontier_figure(
        [Evaluation(step=n, reward=1.0, reward_se=0.1, kl=kl, objective=1.0) for n, kl in enumerate(kls)], beta=0.1
    )
    assert found is not None and [text for _, text in found.x_ticks] == ticks


async def test_all_who_watch_are_woken_by_one_look_at_the_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    records = RunRecords(run)
    records.refresh()
    news, stamp = News(records, poll_seconds=0.01), records.stamp
    watchers = [asyncio.create_task(news.after(stamp, seconds=30)) for _ in range(20)]
    await news.after(stamp, seconds=0.05)
    assert not any(watcher.done() for watcher in watchers), "without news only patience ends"
    JsonlSink(run / "metrics.jsonl").write(metrics_row(5))
    await asyncio.wait_for(asyncio.gather(*watchers), 10)
    assert records.latest["step"] == 5


def test_an_invitation_leads_to_the_console_that_the_run_serves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.json").write_text(json.dumps({"console": {"host": "10.0.0.5", "port": 9000}}))

    def link(*words: str) -> str:
        told = CliRunner().invoke(app, ["console", str(run), "--invite", words[0], *words[1:]])
        assert told.exit_code == 0, told.output
        return told.output.split()[-1].partition("#")[0]

    assert link("ada") == "http://10.0.0.5:9000/enter"
    assert link("bob", "--port", "8000") == "http://10.0.0.5:8000/enter"
    (run / "config.json").write_text("{}")
    assert link("eve") == "http://127.0.0.1:8321/enter"


def test_a_port_that_is_taken_is_said_before_an_address_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        told = CliRunner().invoke(app, ["console", str(run), "--port", str(port)])
    assert isinstance(told.exception, ConfigError) and told.output == ""
    assert str(told.exception).startswith(f"--host, --port: 127.0.0.1:{port} cannot be bound (Address already in use)")
