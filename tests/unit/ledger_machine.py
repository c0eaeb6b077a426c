"""The ledger against a simple model in memory: any order of arrows, repeats, roll-backs and crashes.

Each operation is tried on a copy of the model first, which says what must come of it. Then it may be
cut off between any two statements, as a killed process would leave it: the ledger is opened again and must
stand exactly where it stood before, or, where the commit was through, where the model says. Then the
operation is sent again, as a caller would that got no answer.
"""

import copy
import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pairs import label, pair, plan, reference
from sqlalchemy import event, select

from pilaf_ray.errors import LedgerError
from pilaf_ray.sampling.identity import is_held_out
from pilaf_ray.store.labels import effective_votes
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.store.records import HUMAN, Vote
from pilaf_ray.store.tables import responses, reward_uses
from pilaf_ray.types import PairState

PLANNED, SAMPLED, LABELED, TRAINED = PairState.PLANNED, PairState.SAMPLED, PairState.LABELED, PairState.TRAINED
ABSTAINED, REJECTED, EXPIRED = PairState.ABSTAINED, PairState.REJECTED, PairState.EXPIRED
PEOPLE = ("ada", "bob", "eve")
HELD_OUT = 0.7
"""The share that the reward model does not train on; it falls on pair-2, pair-3 and pair-7 of the first eight."""


class KilledError(Exception):
    """The process ends here."""


class Refused(Exception):
    """The model says: LedgerError, and nothing changes."""


class Backend(Protocol):
    """Where the ledger lives, and what is left of it when its writer is killed."""

    def open(self, clock: Callable[[], float]) -> PreferenceLedger: ...
    def at_kill(self) -> None:
        """Called in the middle of a transaction, on the point of death."""

    def after_kill(self, ledger: PreferenceLedger, clock: Callable[[], float]) -> PreferenceLedger: ...
    def remove(self) -> None: ...


class SqliteBackend:
    """A killed process leaves its files as they are; so they are copied at that moment, and the copy goes on."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        self._root = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self._lives = 0
        self._folder.mkdir()

    @property
    def _folder(self) -> Path:
        return self._root / str(self._lives)

    def open(self, clock: Callable[[], float]) -> PreferenceLedger:
        return PreferenceLedger(f"sqlite:///{self._folder / 'ledger.db'}", clock=clock)

    def at_kill(self) -> None:
        shutil.copytree(self._folder, self._root / str(self._lives + 1))

    def after_kill(self, ledger: PreferenceLedger, clock: Callable[[], float]) -> PreferenceLedger:
        ledger.close()
        self._lives += 1
        return self.open(clock)

    def remove(self) -> None:
        shutil.rmtree(self._root)


@dataclass
class ModelPair:
    state: PairState = PLANNED
    sampling: int = 0
    version: int | None = None
    step: int | None = None
    verdict: tuple[float | None, str] | None = None
    answers: bool = False


@dataclass
class ModelEvent:
    key: str
    name: str
    sampling: int
    kind: str
    source: str
    annotator: str | None
    probability: float | None
    withdraws: str | None
    late: bool


@dataclass
class ModelLease:
    name: str
    sampling: int
    holder: str
    deadline: float
    renewals: int = 0
    outcome: str | None = None


@dataclass
class Model:
    """What the ledger must hold."""

    now: float = 1000.0
    pairs: dict[str, ModelPair] = field(default_factory=dict)
    events: list[ModelEvent] = field(default_factory=list)
    leases: dict[int, ModelLease] = field(default_factory=dict)
    uses: dict[int, Counter[str]] = field(default_factory=dict)
    """What the reward model was trained on, by step."""
    compacted: int = 0
    """So many pairs the writer that lives has looked at and will not look at again."""

    def move(self, names: list[str], source: PairState, target: PairState, passed: set[PairState]) -> list[ModelPair]:
        """The pairs that take an arrow; all or none."""
        if any(n not in self.pairs or self.pairs[n].state not in passed | {source, target} for n in names):
            raise Refused
        moving = [self.pairs[n] for n in names if self.pairs[n].state is source]
        for item in moving:
            item.state = target
        return moving

    def void(self, names: list[str]) -> None:
        for lease in self.leases.values():
            if lease.name in names and lease.outcome is None:
                lease.outcome = "void"

    def is_open(self, lease: ModelLease) -> bool:
        return lease.outcome is None and lease.deadline > self.now

    def votes(self, name: str) -> dict[str, ModelEvent]:
        events = [e for e in self.events if e.name == name and e.sampling == self.pairs[name].sampling and not e.late]
        withdrawn = {e.withdraws for e in events}
        return {str(e.annotator): e for e in events if e.kind == "vote" and e.key not in withdrawn}

    def plan(self, names: list[str]) -> None:
        for name in names:
            self.pairs.setdefault(name, ModelPair())

    def sample(self, names: list[str], version: int) -> None:
        for item in self.move(names, PLANNED, SAMPLED, {LABELED, TRAINED, ABSTAINED, EXPIRED}):
            item.version, item.answers = version, True

    def label(self, names: list[str], probability: float | None, source: str) -> None:
        target = ABSTAINED if probability is None else LABELED
        moving = self.move(names, SAMPLED, target, set() if probability is None else {TRAINED})
        for name in names:
            item = self.pairs[name]
            if any(item is moved for moved in moving):
                item.verdict = (probability, source)
                key = f"{name}/{item.sampling}"
                self.events.append(
                    ModelEvent(key, name, item.sampling, "verdict", source, None, probability, None, False)
                )
                self.void([name])

    def train(self, names: list[str], step: int) -> None:
        if any(self.pairs[n].step not in (None, step) for n in names):
            raise Refused
        for item in self.move(names, LABELED, TRAINED, set()):
            item.step = step

    def end(self, name: str, target: PairState) -> None:
        sources = {SAMPLED} if target is EXPIRED else {PLANNED, SAMPLED, LABELED}
        state = self.pairs[name].state
        if state not in sources | {target}:
            raise Refused
        if state is not target:
            self.pairs[name].state = target
            self.void([name])

    def roll_back(self, step: int) -> None:
        if any(p.step is not None and p.step > step and not p.answers for p in self.pairs.values()):
            raise Refused
        self.uses = {at: used for at, used in self.uses.items() if at <= step}
        for item in self.pairs.values():
            if item.step is not None and item.step > step:
                item.state, item.step = LABELED, None

    def reset(self, version: int) -> None:
        self.roll_back(version)
        for name, item in self.pairs.items():
            by_people = any(
                e.name == name and e.sampling == item.sampling and (e.source == "human" or e.annotator)
                for e in self.events
            )
            newer = item.version is not None and item.version > version
            if newer and item.state in (SAMPLED, LABELED, ABSTAINED) and not by_people:
                self.pairs[name] = ModelPair(sampling=item.sampling + 1)
                self.void([name])

    def use(self, step: int, names: list[str]) -> None:
        self.uses[step] = Counter(names)

    def window(self, size: int, through: int | None = None) -> list[str]:
        """The newest trained pairs that are not held out, and no later than the step ``through``."""
        trained = [n for n, p in self.pairs.items() if p.step is not None and (through is None or p.step <= through)]
        return [name for name in trained if not is_held_out(name, HELD_OUT)][-size:] if size else []

    def compact(self, through: int, size: int) -> int:
        """From the left, as far as everything is finished and out of the window that ``through`` goes on with."""
        window = self.window(size, through)
        trained = [name for name, item in self.pairs.items() if item.step is not None and item.step <= through]
        # A window that is not full begins with the oldest pair that was trained on.
        begins = (window if len(window) == size else trained)[:1] if size else []
        dropped = 0
        for place, (name, item) in enumerate(self.pairs.items()):
            ended = item.state in (ABSTAINED, REJECTED, EXPIRED) and (item.version or 0) <= through
            if name in begins:
                break
            if place < self.compacted:
                continue
            if not (ended or name in trained):
                break
            self.compacted = place + 1
            by_people = any(e.name == name and (e.source == HUMAN or e.annotator) for e in self.events)
            if item.answers and not by_people:
                item.answers, dropped = False, dropped + 1
        return dropped

    def known(self, key: str, name: str, annotator: str) -> bool:
        for e in self.events:
            if e.key == key:
                if (e.name, e.annotator) != (name, annotator):
                    raise Refused
                return True
        return False

    def vote(self, key: str, name: str, annotator: str, probability: float | None, lease_id: int | None) -> None:
        if self.known(key, name, annotator):
            return
        item = self.pairs[name]
        sampling, late = item.sampling, item.state is not SAMPLED
        if lease_id is not None:
            lease = self.leases[lease_id]
            if (lease.name, lease.holder) != (name, annotator):
                raise Refused
            late = late or not self.is_open(lease) or lease.sampling != item.sampling
            sampling = lease.sampling
            if lease.outcome is None:
                lease.outcome = "answered" if self.is_open(lease) else "expired"
        self.events.append(ModelEvent(key, name, sampling, "vote", "human", annotator, probability, None, late))

    def withdraw(self, key: str, vote: ModelEvent, annotator: str) -> None:
        if vote.kind != "vote" or vote.annotator != annotator:
            raise Refused
        if self.known(key, vote.name, annotator):
            return
        item = self.pairs[vote.name]
        late = item.state is not SAMPLED or item.sampling != vote.sampling
        self.events.append(
            ModelEvent(key, vote.name, vote.sampling, "withdrawal", "human", annotator, None, vote.key, late)
        )

    def leasable(self, holder: str, limit: int, votes_per_pair: int) -> list[str]:
        found = []
        for name, item in self.pairs.items():
            holders = [x.holder for x in self.leases.values() if x.name == name and self.is_open(x)]
            voters = self.votes(name)
            if (
                item.state is SAMPLED
                and holder not in (*holders, *voters)
                and len(holders) + len(voters) < votes_per_pair
            ):
                found.append(name)
        return found[:limit]


cut = st.one_of(st.none(), st.integers(1, 12))
"""The statement at which the process is killed, if any; the commit is one of them."""


class LedgerMachine(RuleBasedStateMachine):
    """Rules that hypothesis combines; a subclass says where the ledger lives."""

    make_backend: Callable[[], Backend] = SqliteBackend

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.backend = type(self).make_backend()
        self.ledger = self.backend.open(self.clock)
        self.keys = 0

    def clock(self) -> float:
        return self.model.now

    def teardown(self) -> None:
        self.ledger.close()
        self.backend.remove()

    @initialize()
    def begin(self) -> None:
        """Pairs in every state that leads somewhere, so that each rule finds work from the start."""
        self.plan_new(6)
        self.sample_pairs([f"pair-{i}" for i in range(5)], 1)
        self.label_pairs(["pair-0", "pair-1"], 1.0, "function")
        self.label_pairs(["pair-2"], 0.5, "human")
        self.train_pairs(["pair-0", "pair-1"], 1)  # so that a compaction has more than one to drop

    # How an operation is carried out.

    def do(self, on_ledger: Callable[[], Any], on_model: Callable[[Model], Any], kill_at: int | None) -> Any:
        """Both sides, with a crash first; returns what the ledger answered."""
        after = copy.deepcopy(self.model)
        try:
            on_model(after)
        except Refused:
            after = copy.deepcopy(self.model)
            for _ in range(2):
                with pytest.raises(LedgerError):
                    on_ledger()
            return None
        if kill_at is not None:
            with self._killing(kill_at) as killed:
                on_ledger()
            if killed:
                self.reopen()
                self.agrees()
                after = copy.deepcopy(self.model)
                on_model(after)
        answer = on_ledger()
        self.model = after
        return answer

    def reopen(self) -> None:
        """Another writer, after a kill."""
        self.ledger = self.backend.after_kill(self.ledger, self.clock)
        self.model.compacted = 0

    @contextmanager
    def _killing(self, kill_at: int) -> Iterator[list[bool]]:
        """Die before statement number ``kill_at``, or before the commit; yields a list that is empty if it did not."""
        engine, statements = self.ledger._database._engine, itertools.count(1)

        def die(*_: object) -> None:
            if next(statements) == kill_at:
                self.backend.at_kill()
                raise KilledError

        events = ("before_cursor_execute", "commit")
        for name in events:
            event.listen(engine, name, die)
        outcome: list[bool] = []
        try:
            yield outcome
        except KilledError:
            outcome.append(True)
        finally:
            for name in events:
                event.remove(engine, name, die)

    def new_key(self) -> str:
        self.keys += 1
        return f"key-{self.keys}"

    # Arrows.

    def plan_new(self, count: int, kill: int | None = None) -> None:
        known = len(self.model.pairs)
        indices = range(max(0, known - 1), known + count)  # the first is a repeat
        self.do(
            lambda: self.ledger.add_plans([plan(i) for i in indices]),
            lambda m: m.plan([f"pair-{i}" for i in indices]),
            kill,
        )

    def sample_pairs(self, names: list[str], version: int, kill: int | None = None) -> None:
        made = [pair(int(n[5:]), version=version) for n in names]
        self.do(lambda: self.ledger.add_responses(made), lambda m: m.sample(names, version), kill)

    def label_pairs(self, names: list[str], probability: float | None, source: str, kill: int | None = None) -> None:
        given = [label(int(n[5:]), probability, source) for n in names]
        self.do(
            lambda: self.ledger.add_labels(given, [reference(int(n[5:])) for n in names]),
            lambda m: m.label(names, probability, source),
            kill,
        )

    def train_pairs(self, names: list[str], step: int, kill: int | None = None) -> None:
        self.do(lambda: self.ledger.mark_trained(step, names), lambda m: m.train(names, step), kill)

    def candidates(self, data: st.DataObject, state: PairState) -> list[str]:
        """Some pairs: mostly such as can take the arrow, now and then any."""
        fit = [n for n, p in self.model.pairs.items() if p.state is state]
        anything = data.draw(st.integers(0, 5)) == 5 or not fit
        pool = list(self.model.pairs) if anything else fit
        return data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3, unique=True))

    @precondition(lambda self: len(self.model.pairs) < 8)
    @rule(kill=cut)
    def plan(self, kill: int | None) -> None:
        self.plan_new(1, kill)

    @rule(data=st.data(), version=st.integers(0, 3), kill=cut)
    def sample(self, data: st.DataObject, version: int, kill: int | None) -> None:
        self.sample_pairs(self.candidates(data, PLANNED), version, kill)

    @rule(
        data=st.data(),
        probability=st.sampled_from([1.0, 0.0, 0.5, 0.75, None]),
        source=st.sampled_from(["function", "human"]),
        kill=cut,
    )
    def label(self, data: st.DataObject, probability: float | None, source: str, kill: int | None) -> None:
        self.label_pairs(self.candidates(data, SAMPLED), probability, source, kill)

    @rule(data=st.data(), step=st.integers(1, 3), kill=cut)
    def train(self, data: st.DataObject, step: int, kill: int | None) -> None:
        self.train_pairs(self.candidates(data, LABELED), step, kill)

    @rule(data=st.data(), state=st.sampled_from([REJECTED, EXPIRED]), kill=cut)
    def end(self, data: st.DataObject, state: PairState, kill: int | None) -> None:
        name = self.candidates(data, SAMPLED)[0]
        self.do(
            lambda: (self.ledger.reject if state is REJECTED else self.ledger.expire)(name, "why"),
            lambda m: m.end(name, state),
            kill,
        )

    @rule(step=st.integers(0, 3), kill=cut)
    def roll_back(self, step: int, kill: int | None) -> None:
        self.do(lambda: self.ledger.roll_back(step), lambda m: m.roll_back(step), kill)

    @rule(version=st.integers(0, 3), kill=cut)
    def resume(self, version: int, kill: int | None) -> None:
        self.do(lambda: self.ledger.reset_after(version), lambda m: m.reset(version), kill)

    # Reward model and compaction.

    @rule(data=st.data(), step=st.integers(1, 3), kill=cut)
    def use_for_rewards(self, data: st.DataObject, step: int, kill: int | None) -> None:
        """Some pairs, several times in one step."""
        names = data.draw(st.lists(st.sampled_from(list(self.model.pairs)), max_size=5))
        self.do(lambda: self.ledger.record_reward_uses(step, names), lambda m: m.use(step, names), kill)

    @rule(through=st.integers(0, 3), window=st.sampled_from([0, 0, 1, 2]), kill=cut)
    def compact(self, through: int, window: int, kill: int | None) -> None:
        before = sum(p.answers for p in self.model.pairs.values())
        dropped = self.do(
            lambda: self.ledger.compact(through, window, HELD_OUT), lambda m: m.compact(through, window), kill
        )
        left = sum(p.answers for p in self.model.pairs.values())
        # A call that was too short to be killed in was sent twice.
        assert dropped == before - left or (kill is not None and dropped == 0)

    # People.

    @rule(data=st.data(), who=st.sampled_from(PEOPLE), probability=st.sampled_from([0.1, 0.9, None]), kill=cut)
    def vote(self, data: st.DataObject, who: str, probability: float | None, kill: int | None) -> None:
        name, key = self.candidates(data, SAMPLED)[0], self.new_key()
        made = Vote(key=key, pair_id=name, annotator=who, probability=probability)
        self.do(lambda: self.ledger.labels.vote(made), lambda m: m.vote(key, name, who, probability, None), kill)

    @precondition(lambda self: self.model.leases)
    @rule(data=st.data(), who=st.sampled_from((None, *PEOPLE)), kill=cut)
    def answer_lease(self, data: st.DataObject, who: str | None, kill: int | None) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.model.leases)))
        lease, key = self.model.leases[lease_id], self.new_key()
        who = who or lease.holder
        made = Vote(key=key, pair_id=lease.name, annotator=who, probability=0.9, lease_id=lease_id)
        self.do(lambda: self.ledger.labels.vote(made), lambda m: m.vote(key, lease.name, who, 0.9, lease_id), kill)

    @precondition(lambda self: any(e.kind == "vote" for e in self.model.events))
    @rule(data=st.data(), who=st.sampled_from(PEOPLE), kill=cut)
    def send_again(self, data: st.DataObject, who: str, kill: int | None) -> None:
        sent = data.draw(st.sampled_from([e for e in self.model.events if e.kind == "vote"]))
        made = Vote(key=sent.key, pair_id=sent.name, annotator=who, probability=sent.probability)
        self.do(
            lambda: self.ledger.labels.vote(made),
            lambda m: m.vote(sent.key, sent.name, who, sent.probability, None),
            kill,
        )

    @precondition(lambda self: self.model.events)
    @rule(data=st.data(), who=st.sampled_from((None, None, *PEOPLE)), kill=cut)
    def withdraw(self, data: st.DataObject, who: str | None, kill: int | None) -> None:
        votes = [e for e in self.model.events if e.kind == "vote"]
        sent, key = data.draw(st.sampled_from(votes or self.model.events)), self.new_key()
        [sequence] = [e.sequence for e in self.ledger.labels.of(sent.name) if e.key == sent.key]
        who = who or sent.annotator or "ada"  # mostly whose it is
        self.do(
            lambda: self.ledger.labels.withdraw(sequence, key=key, annotator=who),
            lambda m: m.withdraw(key, sent, who),
            kill,
        )

    @rule(who=st.sampled_from(PEOPLE), limit=st.integers(1, 3), needed=st.integers(1, 2))
    def lease(self, who: str, limit: int, needed: int) -> None:
        expected = self.model.leasable(who, limit, needed)
        granted = self.ledger.leases.lease(who, seconds=60, limit=limit, votes_per_pair=needed)
        assert [lease.pair_id for lease in granted] == expected
        for given in granted:
            item = self.model.pairs[given.pair_id]
            self.model.leases[given.lease_id] = ModelLease(given.pair_id, item.sampling, who, self.model.now + 60)

    @rule(who=st.sampled_from(PEOPLE), kill_at=st.integers(1, 6))
    def lease_and_die(self, who: str, kill_at: int) -> None:
        """A lease that was never handed out does not exist."""
        with self._killing(kill_at) as killed:
            granted = self.ledger.leases.lease(who, seconds=60)
        if killed:
            self.reopen()
        else:
            for given in granted:
                item = self.model.pairs[given.pair_id]
                self.model.leases[given.lease_id] = ModelLease(given.pair_id, item.sampling, who, self.model.now + 60)

    @precondition(lambda self: self.model.leases)
    @rule(data=st.data(), renew=st.booleans(), kill=cut)
    def renew_or_release(self, data: st.DataObject, renew: bool, kill: int | None) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.model.leases)))
        holder = self.model.leases[lease_id].holder

        def renewed(model: Model) -> None:
            if not model.is_open(model.leases[lease_id]):
                raise Refused
            model.leases[lease_id].deadline = model.now + 60
            model.leases[lease_id].renewals += 1

        def released(model: Model) -> None:
            lease = model.leases[lease_id]
            if lease.outcome is None:
                lease.outcome = "released" if model.is_open(lease) else "expired"

        if renew:
            self.do(lambda: self.ledger.leases.renew(lease_id, holder, seconds=60), renewed, None)
        else:
            self.do(lambda: self.ledger.leases.release(lease_id, holder), released, kill)

    @rule(seconds=st.sampled_from([1, 30, 60, 100]), kill=cut)
    def time_passes(self, seconds: int, kill: int | None) -> None:
        self.model.now += seconds

        def expired(model: Model) -> None:
            for lease in model.leases.values():
                if lease.outcome is None and lease.deadline <= model.now:
                    lease.outcome = "expired"

        if seconds in (30, 100):  # a deadline holds before it is written down, too
            self.do(lambda: self.ledger.leases.expire(), expired, kill)

    # What always holds.

    @invariant()
    def agrees(self) -> None:
        """The ledger holds what the model holds, and adds up."""
        model, ledger = self.model, self.ledger
        counts = ledger.counts().check()
        expected = Counter(p.state for p in model.pairs.values())
        assert {s: n for s, n in counts.by_state.items() if n} == expected
        assert counts.planned == len(model.pairs)
        left = ledger.unfinished()
        by_state = {s: [n for n, p in model.pairs.items() if p.state is s] for s in PairState}
        assert [p.pair_id for p in left.planned] == by_state[PLANNED]
        assert [(p.plan.pair_id, p.min_policy_version) for p in left.sampled] == [
            (n, model.pairs[n].version) for n in by_state[SAMPLED]
        ]
        assert [(x.pair_id, (x.label.probability, x.label.source)) for x in left.labeled] == [
            (n, model.pairs[n].verdict) for n in by_state[LABELED]
        ]
        for name in model.pairs:
            self.same_labels(name)
        self.same_rewards()
        is_open = [x for x in model.leases.values() if model.is_open(x)]
        assert Counter((x.pair_id, x.holder, x.deadline, x.renewals) for x in ledger.leases.open()) == Counter(
            (x.name, x.holder, round(x.deadline * 1000), x.renewals) for x in is_open
        )

    def same_rewards(self) -> None:
        """Answers are there until they are dropped, uses are counted once, and the replay window has both."""
        model, names = self.model, list(self.model.pairs)
        with self.ledger._database.reading() as connection:
            held = set(connection.scalars(select(responses.c.plan_index)))
            uses = connection.execute(select(reward_uses)).all()
        assert {names[index] for index in held} == {n for n, p in model.pairs.items() if p.answers}
        assert Counter({(u.step, names[u.plan_index]): u.uses for u in uses}) == Counter(
            {(step, n): count for step, used in model.uses.items() for n, count in used.items()}
        )
        window = model.window(2)
        if not all(model.pairs[name].answers for name in window):
            with pytest.raises(LedgerError, match="were dropped"):
                self.ledger.reward_window(2, HELD_OUT)
            return
        total = sum(model.uses.values(), Counter[str]())
        found = self.ledger.reward_window(2, HELD_OUT)
        assert [(item.pair_id, count) for item, count in found] == [(name, total[name]) for name in window]

    def same_labels(self, name: str) -> None:
        """No label is lost, doubled, moved or unmarked."""
        found = self.ledger.labels.of(name)
        keys = {e.sequence: e.key for e in found}
        assert [
            (e.key, e.sampling, e.kind, e.source, e.annotator, e.probability, keys.get(e.withdraws or 0), e.late)
            for e in found
        ] == [
            (e.key, e.sampling, e.kind, e.source, e.annotator, e.probability, e.withdraws, e.late)
            for e in self.model.events
            if e.name == name
        ]
        current = [e for e in found if e.sampling == self.model.pairs[name].sampling]
        assert {e.key for e in effective_votes(current)} == {e.key for e in self.model.votes(name).values()}
