"""The durable ledger of every pair, from plan to trained.

    PLANNED ──▶ SAMPLED ──▶ LABELED ──▶ TRAINED(step)
       │          │ ├─▶ ABSTAINED │
       │          │ └─▶ EXPIRED(reason): nobody answered in time
       └──────────┴───────────────┴─▶ REJECTED(reason): it cannot be worked on, or was thrown out

Each method is one transaction. A repeat of an arrow that was already taken changes
nothing, so callers may retry; an arrow from any other state raises LedgerError.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, insert, update

from pilaf_ray.errors import LedgerError
from pilaf_ray.store import codec, compaction, queries, reward_uses, rollback, rows
from pilaf_ray.store.database import LedgerDatabase
from pilaf_ray.store.labels import LabelLog
from pilaf_ray.store.leases import LeaseBook
from pilaf_ray.store.queries import CONTENTS
from pilaf_ray.store.records import LedgerCounts, UnfinishedWork
from pilaf_ray.store.tables import pairs, plans, responses
from pilaf_ray.types import LabeledPair, PairPlan, PairState, PreferenceLabel, ReferenceLogprobs, ResponsePair

# An arrow was taken before if the pair stands at or beyond its target.
_PASSED = {
    PairState.SAMPLED: {
        PairState.SAMPLED,
        PairState.LABELED,
        PairState.TRAINED,
        PairState.ABSTAINED,
        PairState.EXPIRED,
    },
    PairState.LABELED: {PairState.LABELED, PairState.TRAINED},
    PairState.TRAINED: {PairState.TRAINED},
    PairState.ABSTAINED: {PairState.ABSTAINED},
    PairState.REJECTED: {PairState.REJECTED},
    PairState.EXPIRED: {PairState.EXPIRED},
}
_OPEN = (PairState.PLANNED, PairState.SAMPLED, PairState.LABELED)

_move = update(pairs).where(pairs.c.plan_index == bindparam("at"))


class PreferenceLedger:
    """The single writer of one run's ledger.

    Args:
        url: SQLAlchemy URL; see :class:`pilaf_ray.store.database.LedgerDatabase`.
        namespace: of this run, where runs share a database.
        clock: seconds since 1970.
    """

    def __init__(self, url: str, *, namespace: str | None = None, clock: Callable[[], float] = time.time) -> None:
        self._database = LedgerDatabase(url, namespace=namespace, clock=clock)
        self.labels = LabelLog(self._database)
        """Every label event, also those that came too late."""
        self.leases = LeaseBook(self._database)
        """Pairs in the hands of people."""
        self._compacted_below = 0

    @property
    def database(self) -> LedgerDatabase:
        """The database, for the labelling desk in front of it."""
        return self._database

    def close(self) -> None:
        """Release the database."""
        self._database.close()

    def add_plans(self, new: Sequence[PairPlan]) -> None:
        """Record new pairs as PLANNED."""
        now = self._database.now()
        with self._database.writing() as connection:
            known = queries.standing(connection, [plan.pair_id for plan in new])
            fresh = {plan.pair_id: plan for plan in new if plan.pair_id not in known}
            if not fresh:
                return
            connection.execute(
                insert(pairs).values(state=PairState.PLANNED.value, sampling=0, planned_at=now),
                [
                    {"plan_index": plan.index, "pair_id": pair_id, "branch": plan.branch}
                    for pair_id, plan in fresh.items()
                ],
            )
            connection.execute(
                insert(plans),
                [
                    {"plan_index": plan.index, "prompt": plan.prompt.text, "plan": codec.encode(plan)}
                    for plan in fresh.values()
                ],
            )

    def add_responses(self, sampled: Sequence[ResponsePair]) -> None:
        """PLANNED → SAMPLED."""
        now = self._database.now()
        with self._database.writing() as connection:
            by_id = {pair.plan.pair_id: pair for pair in sampled}
            found = self._movable(connection, list(by_id), PairState.PLANNED, PairState.SAMPLED)
            if not found:
                return
            moving = [(row.plan_index, by_id[pair_id]) for pair_id, row in found.items()]
            connection.execute(insert(responses), [rows.contents(index, pair) for index, pair in moving])
            connection.execute(
                _move.values(state=PairState.SAMPLED.value, sampled_at=now),
                [
                    {
                        "at": index,
                        "branch": pair.branch,
                        "min_version": pair.min_policy_version,
                        "max_version": max(pair.a.max_policy_version, pair.b.max_policy_version),
                    }
                    for index, pair in moving
                ],
            )

    def add_labels(self, given: Sequence[PreferenceLabel], references: Sequence[ReferenceLogprobs]) -> None:
        """SAMPLED → LABELED, or → ABSTAINED where the oracle declined; each label is an event of the log."""
        now = self._database.now()
        scored = dict(zip((label.pair_id for label in given), zip(given, references, strict=True), strict=True))
        with self._database.writing() as connection:
            for target in (PairState.LABELED, PairState.ABSTAINED):
                wanted = target is PairState.ABSTAINED
                names = [name for name, (label, _) in scored.items() if label.is_abstention is wanted]
                moving = self._movable(connection, names, PairState.SAMPLED, target)
                if not moving:
                    continue
                events = self.labels.append(
                    connection,
                    [rows.verdict(scored[pair_id][0], row, now) for pair_id, row in moving.items()],
                )
                time_of = "ended_at" if wanted else "labeled_at"
                connection.execute(
                    _move.values({"state": target.value, time_of: now}),
                    [
                        {
                            "at": row.plan_index,
                            "label_sequence": sequence,
                            "reference_a": scored[pair_id][1].a,
                            "reference_b": scored[pair_id][1].b,
                            "reason": scored[pair_id][0].reason,
                        }
                        for (pair_id, row), sequence in zip(moving.items(), events, strict=True)
                    ],
                )
                self.leases.void(connection, [row.plan_index for row in moving.values()], now)

    def mark_trained(self, step: int, pair_ids: Sequence[str]) -> None:
        """LABELED → TRAINED(step)."""
        now = self._database.now()
        with self._database.writing() as connection:
            found = queries.standing(connection, pair_ids)
            for pair_id, row in found.items():
                if row.trained_step not in (step, None):
                    raise LedgerError(f"pair {pair_id} was already trained on at step {row.trained_step}, not {step}")
            moving = self._movable(connection, pair_ids, PairState.LABELED, PairState.TRAINED, found=found)
            # All get the same values, so that one statement moves many.
            for part in queries.chunks([row.plan_index for row in moving.values()]):
                trained = update(pairs).where(pairs.c.plan_index.in_(part))
                connection.execute(trained.values(state=PairState.TRAINED.value, trained_step=step, trained_at=now))

    def reject(self, pair_id: str, reason: str) -> None:
        """PLANNED, SAMPLED or LABELED → REJECTED: it cannot be worked on, or somebody threw it out."""
        self._end(pair_id, PairState.REJECTED, _OPEN, reason)

    def expire(self, pair_id: str, reason: str) -> None:
        """SAMPLED → EXPIRED: no label came in time."""
        self._end(pair_id, PairState.EXPIRED, (PairState.SAMPLED,), reason)

    def roll_back(self, step: int) -> int:
        """TRAINED after ``step`` → LABELED; returns how many pairs that were."""
        with self._database.writing() as connection:
            return rollback.untrain_after(connection, step)

    def reset_after(self, version: int) -> int:
        """Prepare a resumption from the checkpoint of step ``version``.

        Pairs trained after it become LABELED. Pairs whose responses were sampled under
        newer weights become PLANNED again, because those weights are gone and the same
        seeds will redo them; where people have answered, the pair and their labels are
        kept. Pairs that were rejected or have expired stay so. The label log keeps what was
        said of responses that are gone. Returns how many pairs went back to PLANNED.

        Raises:
            LedgerError: answers of pairs that would come back were dropped.
        """
        now = self._database.now()
        with self._database.writing() as connection:
            rollback.untrain_after(connection, version)
            gone = rollback.forget_responses_after(connection, version)
            for part in queries.chunks(gone):
                self.leases.void(connection, part, now)
            return len(gone)

    def counts(self) -> LedgerCounts:
        """How many pairs are where."""
        with self._database.reading() as connection:
            return queries.counts(connection)

    def unfinished(self) -> UnfinishedWork:
        """PLANNED, SAMPLED and LABELED pairs; finished ones are not read."""
        planned: list[PairPlan] = []
        sampled: list[ResponsePair] = []
        labeled: list[LabeledPair] = []
        query = CONTENTS.where(pairs.c.state.in_(_OPEN)).order_by(pairs.c.plan_index)
        with self._database.reading() as connection:
            for row in connection.execute(query):
                match row.state:
                    case PairState.PLANNED:
                        planned.append(codec.decode(PairPlan, row.plan))
                    case PairState.SAMPLED:
                        sampled.append(codec.decode_pair(row))
                    case _:
                        labeled.append(codec.decode_labeled(row))
        return UnfinishedWork(planned=planned, sampled=sampled, labeled=labeled)

    def record_reward_uses(self, step: int, pair_ids: Sequence[str]) -> None:
        """The reward model trained on these pairs at ``step``, once for each time that one is named."""
        with self._database.writing() as connection:
            reward_uses.record_uses(connection, step, pair_ids)

    def reward_window(self, window_pairs: int, held_out: float) -> list[tuple[LabeledPair, int]]:
        """The newest trained pairs outside the ``held_out`` share, in plan order, with the reward model's uses."""
        with self._database.reading() as connection:
            return reward_uses.newest_with_uses(connection, window_pairs=window_pairs, held_out=held_out)

    def compact(self, through_step: int, window_pairs: int, held_out: float) -> int:
        """Drop answers that nothing needs; returns of how many pairs.

        Args:
            through_step: no step before it is gone back to.
            window_pairs, held_out: as for :meth:`reward_window`; 0 pairs without a reward model.
        """
        with self._database.writing() as connection:
            dropped, looked_at = compaction.drop_answers(
                connection,
                through_step=through_step,
                since=self._compacted_below,
                window_pairs=window_pairs,
                held_out=held_out,
            )
        # Once it is committed: what a full disk has undone is tried again.
        self._compacted_below = looked_at
        return dropped

    def next_plan_index(self) -> int:
        """The index that the next new plan gets."""
        with self._database.reading() as connection:
            return queries.next_plan_index(connection)

    def _end(self, pair_id: str, target: PairState, sources: Sequence[PairState], reason: str) -> None:
        now = self._database.now()
        with self._database.writing() as connection:
            found = queries.standing(connection, [pair_id])
            row = found.get(pair_id)
            source = PairState(row.state) if row is not None and row.state in sources else sources[-1]
            if self._movable(connection, [pair_id], source, target, found=found):
                assert row is not None
                values = {"state": target.value, "reason": reason, "ended_at": now}
                connection.execute(_move.values(values), [{"at": row.plan_index}])
                self.leases.void(connection, [row.plan_index], now)

    @staticmethod
    def _movable(
        connection: Connection,
        pair_ids: Sequence[str],
        source: PairState,
        target: PairState,
        *,
        found: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The rows that take the arrow, by pair; those that took it before are left out, others raise."""
        if found is None:
            found = queries.standing(connection, pair_ids)
        moving: dict[str, Any] = {}
        for pair_id in pair_ids:
            row = found.get(pair_id)
            if row is None:
                raise LedgerError(f"pair {pair_id} is not in the ledger, so it cannot become {target}")
            if row.state == source:
                moving[pair_id] = row
            elif row.state not in _PASSED[target]:
                raise LedgerError(f"pair {pair_id} is {row.state}; only a {source} pair can become {target}")
        return moving
