"""The console in a real browser: labels by keyboard, lost connections, live figures, hostile text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from console_browser import CHROMIUM, CONTRAST, FAST, FLAGS, WHY_NOT, served, until
from console_run import ATTACK, CONFIG, ledger_pair, make_run, metrics_row

from pilaf_ray.console.access import AccessBook, AccessRole
from pilaf_ray.console.app import create_app
from pilaf_ray.console.desk_access import LocalDesk
from pilaf_ray.observability.sinks import JsonlSink
from pilaf_ray.store.desk import LabelDesk
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.store.records import LabelKind

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
WAITING = [f"pair-{i}" for i in range(8, 40)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


class Site:
    """A run folder that people label, served."""

    def __init__(self, folder: Path) -> None:
        make_run(folder)
        (folder / "config.json").write_text(json.dumps({**CONFIG, "oracle": {"type": "human"}}))
        self.folder = folder
        self.ledger = PreferenceLedger(f"sqlite:///{folder / 'preferences.db'}")
        made = [
            ledger_pair(i, a=f"first answer {i}", b=ATTACK if i < 10 else f"second answer {i}") for i in range(8, 40)
        ]
        self.ledger.add_plans([pair.plan for pair in made])
        self.ledger.add_responses(made)
        self.desk = LabelDesk(self.ledger)
        self.desk.want(WAITING, 1)
        self.book = AccessBook(folder / "access.json")
        self.app = create_app(folder, desk=LocalDesk(self.desk), limit=FAST)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "run")
    yield made
    made.ledger.close()


def enter(browser: Any, site: Site, address: str, name: str, role: AccessRole) -> Any:
    """A page of its own browser context, signed in through an invitation."""
    page = browser.new_context().new_page()
    page.set_default_timeout(10_000)
    page.goto(f"{address}/enter#{site.book.issue(name, role)}")
    page.wait_for_url("**/label" if role is AccessRole.ANNOTATOR else f"{address}/")
    assert "#" not in page.url
    return page


def number_of(page: Any) -> str:
    return str(page.get_attribute("#answer", "data-number"))


def moved_on(page: Any, number: str) -> None:
    """Wait until another task is shown."""
    until(page, f"document.querySelector('#answer')?.dataset.number !== '{number}'")
    until(page, "!document.querySelector('[aria-busy]')")


def press(page: Any, key: str) -> str:
    """Press a key and wait for the next task; returns the notice above it."""
    before = number_of(page)
    page.keyboard.press(key)
    moved_on(page, before)
    return str(page.inner_text("#notice"))


def test_an_annotator_labels_by_keyboard_and_the_ledger_holds_what_was_acknowledged(browser: Any, site: Site) -> None:
    with served(site.app) as address:
        page = enter(browser, site, address, "ada", AccessRole.ANNOTATOR)
        given: list[tuple[str, str]] = []

        def pair() -> str:
            return str(page.input_value('#answer input[name="pair"]'))

        def label(key: str) -> None:
            name = pair()
            assert press(page, key) == "Saved."
            given.append((name, key))

        for number in range(10):
            label("1234567"[number % 7])
        # Undo: the pair comes back, and the second answer is the one that stands.
        undone = given.pop()
        assert "taken back" in press(page, "u") and pair() == undone[0]
        label("0")
        # Skip, with its reason.
        skipped = pair()
        page.keyboard.press("s")
        page.keyboard.type("cannot judge")
        before = number_of(page)
        page.keyboard.press("Enter")
        moved_on(page, before)
        # The connection is lost before the request leaves …
        name, before = pair(), number_of(page)
        page.context.set_offline(True)
        page.keyboard.press("2")
        until(page, "document.querySelector('#notice').textContent.startsWith('Not saved yet')")
        assert site.desk.opinions(name).votes == ()
        page.keyboard.press("6")  # a second key while the first answer is on its way changes nothing
        page.context.set_offline(False)
        moved_on(page, before)
        given.append((name, "2"))
        # … and, another time, after the server has kept the answer and before the browser knows.
        lost = []

        def lose_once(route: Any) -> None:
            if lost:
                route.continue_()
            else:
                route.fetch()
                lost.append(True)
                route.abort()

        page.route("**/label/answer", lose_once)
        label("6")
        page.unroute("**/label/answer")
        while len(given) < 20:
            label("5")
        page.context.close()
    events = site.desk.history(annotator="ada")
    withdrawn = {event.withdraws for event in events}
    votes = [e for e in events if e.kind is LabelKind.VOTE and e.sequence not in withdrawn]
    choices = {"1": "a_much", "2": "a", "3": "a_slightly", "4": "equal", "5": "b_slightly", "6": "b", "7": "b_much"}
    assert [(e.pair_id, json.loads(e.details or "")["choice"]) for e in votes] == [
        (name, choices.get(key, "both_bad")) for name, key in given
    ]
    assert [(e.pair_id, e.reason) for e in events if e.kind is LabelKind.SKIP] == [(skipped, "cannot judge")]
    assert len(votes) == 20 and not any(event.late for event in events)


def test_two_annotators_at_once_never_hold_the_same_pair(browser: Any, site: Site) -> None:
    with served(site.app) as address:
        pages = [enter(browser, site, address, name, AccessRole.ANNOTATOR) for name in ("ada", "ben")]
        tab = pages[0].context.new_page()
        tab.goto(f"{address}/label")
        assert number_of(tab) == number_of(pages[0])
        for _ in range(6):
            held = [page.input_value('#answer input[name="pair"]') for page in pages]
            assert len(set(held)) == 2
            for page in pages:
                assert press(page, "2") == "Saved."
        # The second tab still shows the first pair; its answer comes too late to be another one.
        tab.keyboard.press("7")
        until(tab, "document.querySelector('#notice').textContent === 'Saved.'")
        for page in (*pages, tab):
            page.context.close()
    votes = [event for event in site.desk.history() if event.kind is LabelKind.VOTE]
    assert len(votes) == len({event.pair_id for event in votes}) == 12


def test_the_overview_follows_metrics_jsonl_live(browser: Any, site: Site) -> None:
    with served(site.app) as address:
        page = browser.new_context().new_page()
        page.set_default_timeout(15_000)
        page.goto(address)
        until(page, "pilafCharts.data.step.length === 4")
        sink = JsonlSink(site.folder / "metrics.jsonl")
        sink.write(metrics_row(5))
        until(page, "pilafCharts.data.step.length === 5")
        until(page, "document.querySelector('[data-metric=step]').dataset.value === '5'")
        drawn = page.evaluate("pilafCharts.data")
        lines = [json.loads(line) for line in (site.folder / "metrics.jsonl").read_text().splitlines()]
        assert drawn == {key: [line[key] for line in lines] for key in lines[0]}
        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        shown = page.evaluate(
            "Object.fromEntries([...document.querySelectorAll('[data-metric]')]"
            ".map((e) => [e.dataset.metric, e.dataset.value]))"
        )
        assert shown == {key: "" if value is None else str(value) for key, value in lines[-1].items()}
        # A resumption cuts the file back; the page forgets what is void.
        sink.cut_after(2)
        until(page, "pilafCharts.data.step.length === 2")
        page.context.close()


def test_every_page_is_readable_safe_and_fits_a_phone(browser: Any, site: Site) -> None:
    with served(site.app) as address:
        for scheme in ("light", "dark"):
            context = browser.new_context(color_scheme=scheme, viewport={"width": 390, "height": 844})
            page = context.new_page()
            complaints: list[str] = []
            page.on("console", lambda message, heard=complaints: heard.append(message.text))
            page.on("pageerror", lambda error, heard=complaints: heard.append(str(error)))
            secret = site.book.issue(f"lead-{scheme}", AccessRole.LEAD)
            context.add_cookies([{"name": "pilaf_token", "value": secret, "url": address}])
            for path in ("/", "/roles", "/pairs", "/pairs/pair-0", "/samples", "/label", "/lead", "/enter"):
                page.goto(address + path)
                page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
                found = page.evaluate(CONTRAST)
                assert found["seen"] > 5 and found["poor"] == [], (scheme, path)
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (scheme, path)
                assert "taken" not in page.title()
                assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
                if path in ("/pairs/pair-0", "/samples", "/label"):
                    assert ATTACK in page.inner_text("main")
                # The first press of Tab leads to the link past the navigation.
                if path == "/":
                    page.keyboard.press("Tab")
                    assert page.evaluate("document.activeElement.className") == "skip"
            assert complaints == []
            context.close()
