"""The labelling and lead pages, over HTTP and without a browser."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from console_run import ATTACK, CONFIG, ledger_pair, make_run
from fastapi.testclient import TestClient

from pilaf_ray.console.access import AccessBook, AccessRole, form_token
from pilaf_ray.console.app import create_app
from pilaf_ray.console.desk_access import LocalDesk
from pilaf_ray.console.labelling import shows_b_first
from pilaf_ray.store.desk import LabelDesk
from pilaf_ray.store.ledger import PreferenceLedger

GOLD = {"prompt": "gold prompt", "response_a": "the good one", "response_b": "the bad one", "preferred": "a"}


class Site:
    """A console with a desk, and signed-in people."""

    def __init__(self, folder: Path, **oracle: object) -> None:
        self.folder = make_run(folder)
        config = {**CONFIG, "oracle": {"type": "human", "guidelines": "# Be *fair*\n<script>x</script>", **oracle}}
        (folder / "config.json").write_text(json.dumps(config))
        self.ledger = PreferenceLedger(f"sqlite:///{folder / 'preferences.db'}")
        made = [ledger_pair(i, a=f"first {i}", b=f"second {i}") for i in range(8, 14)]
        made[0] = ledger_pair(8, a=ATTACK, b="plain")
        self.ledger.add_plans([pair.plan for pair in made])
        self.ledger.add_responses(made)
        self.desk = LabelDesk(self.ledger, lease_seconds=600)
        self.desk.want([pair.plan.pair_id for pair in made], 1)
        self.client = TestClient(create_app(folder, desk=LocalDesk(self.desk)), base_url="http://localhost")
        self.book = AccessBook(folder / "access.json")
        self.secrets = {name: self.book.issue(name, AccessRole.ANNOTATOR) for name in ("ada", "ben")}
        self.secrets["lee"] = self.book.issue("lee", AccessRole.LEAD)

    def get(self, name: str, path: str) -> str:
        return str(self.client.get(path, headers={"cookie": f"pilaf_token={self.secrets[name]}"}).text)

    def post(self, who: str, path: str, /, **fields: object) -> tuple[int, str]:
        secret = self.secrets[who]
        headers = {"cookie": f"pilaf_token={secret}", "x-form-token": form_token(secret)}
        answer = self.client.post(path, data=fields, headers=headers)
        return answer.status_code, answer.text

    def task(self, page: str) -> dict[str, str]:
        return dict(re.findall(r'<input type="hidden" name="(number|pair)" value="([^"]*)"', page))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "run", aspects=["helpful"])
    with made.client:
        yield made
    made.ledger.close()


def test_an_answer_becomes_a_vote_for_the_right_side(site: Site) -> None:
    page = site.get("ada", "/label")
    task = site.task(page)
    assert task["pair"] == "pair-8"
    code, page = site.post(
        "ada", "/label/answer", **task, choice="a_slightly", reason=" shorter ", seconds=3.5, **{"aspect-0-left": "5"}
    )
    assert code == 200 and "Saved." in page and site.task(page)["pair"] == "pair-9"
    (vote,) = site.desk.opinions("pair-8").votes
    b_first = shows_b_first("pair-8", "ada")
    assert vote.probability == pytest.approx(0.32 if b_first else 0.68)
    assert (vote.annotator, vote.reason, vote.late) == ("ada", "shorter", False)
    assert json.loads(vote.details or "") == {
        "choice": "a_slightly",
        "shown_first": "b" if b_first else "a",
        "seconds": 3.5,
        "aspects": [{"aspect": "helpful", "side": "b" if b_first else "a", "rating": 5}],
    }


def test_the_page_is_blind_and_escapes(site: Site) -> None:
    page = site.get("ada", "/label")
    for word in ("interpolated", "on_policy", "coefficient", "version", "branch"):
        assert word not in page
    assert "<script>document" not in page and "&lt;script&gt;document.title" in page
    assert "<em>fair</em>" in page and "<script>x" not in page


def test_order_is_drawn_for_each_pair_and_annotator() -> None:
    drawn = [shows_b_first(f"pair-{n}", name) for n in range(400) for name in ("ada", "ben")]
    assert 330 < sum(drawn) < 470
    assert any(shows_b_first(f"pair-{n}", "ada") != shows_b_first(f"pair-{n}", "ben") for n in range(10))


def test_a_repeat_is_the_same_answer(site: Site) -> None:
    task = site.task(site.get("ada", "/label"))
    for choice in ("a", "a", "b"):
        assert site.post("ada", "/label/answer", **task, choice=choice)[0] == 200
    assert len(site.ledger.labels.of("pair-8")) == 1


def test_skip_undo_and_foreign_leases(site: Site) -> None:
    task = site.task(site.get("ada", "/label"))
    assert site.post("ben", "/label/answer", **task, choice="a")[0] == 409
    code, page = site.post("ada", "/label/answer", **task, choice="skip", reason="in a language I cannot read")
    assert code == 200 and site.task(page)["pair"] != "pair-8"
    assert site.desk.opinions("pair-8").skips[0].reason == "in a language I cannot read"
    code, page = site.post("ada", "/label/undo")
    assert code == 200 and "taken back" in page and site.task(page)["pair"] == "pair-8"
    assert site.post("ada", "/label/answer", **task, choice="nonsense")[0] == 409


def test_forms_need_their_token_and_pages_their_role(site: Site) -> None:
    cookie = {"cookie": f"pilaf_token={site.secrets['ada']}"}
    task = site.task(site.get("ada", "/label"))
    refused = site.client.post("/label/answer", data={**task, "choice": "a"}, headers=cookie)
    assert refused.status_code == 403 and site.desk.opinions("pair-8").votes == ()
    assert site.client.get("/lead", headers=cookie).status_code == 403
    assert site.client.get("/", headers=cookie).status_code == 403
    assert site.client.get("/label").status_code == 403
    assert site.post("lee", "/lead/act", name="ada", action="explode")[0] == 422


def test_the_lead_pauses_requeues_invites_and_revokes(site: Site) -> None:
    task = site.task(site.get("ada", "/label"))
    site.post("ada", "/label/answer", **task, choice="a", seconds=4)
    page = site.get("lee", "/lead")
    row = page[page.index('data-annotator="ada"') :]
    assert re.findall(r'<td class="num">([^<]*)', row)[:5] == ["1", "0", "0", "0", "4"]
    assert "is paused" in site.post("lee", "/lead/act", name="ada", action="pause")[1]
    assert "You are paused" in site.get("ada", "/label")
    site.post("lee", "/lead/act", name="ada", action="resume")
    assert "1 answers of ada" in site.post("lee", "/lead/act", name="ada", action="requeue")[1]
    assert site.desk.opinions("pair-8").votes == ()
    page = site.post("lee", "/lead/invite", name="new.one", role="annotator")[1]
    (secret,) = re.findall(r"/enter#([\w-]{43})", page)
    grant = site.book.find(secret)
    assert grant is not None and grant.name == "new.one"
    site.post("lee", "/lead/act", name="ben", action="revoke")
    assert site.book.find(site.secrets["ben"]) is None


def test_gold_questions_are_mixed_in_and_kept_apart(tmp_path: Path) -> None:
    gold = tmp_path / "gold.jsonl"
    gold.write_text("\n".join(json.dumps({**GOLD, "prompt": f"gold prompt {n}"}) for n in range(3)))
    site = Site(tmp_path / "run", gold={"path": str(gold), "share": 0.999999})
    with site.client:
        for _ in range(3):
            page = site.get("ada", "/label")
            task = site.task(page)
            assert "gold prompt" in page
            left_is_good = page.index("the good one") < page.index("the bad one")
            assert site.post("ada", "/label/answer", **task, choice="a" if left_is_good else "b")[0] == 200
        assert site.task(site.get("ada", "/label"))["pair"] == "pair-8"
        assert ">3 of 3<" in site.get("lee", "/lead")
    site.ledger.close()
    assert len((site.folder / "gold_answers.jsonl").read_text().splitlines()) == 3


def test_the_run_says_what_it_waits_for(site: Site) -> None:
    assert re.search(r"the run waits for <b>6</b> pairs", site.get("ada", "/label"))
