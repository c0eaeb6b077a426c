"""What the reward model trained on: a table beside the pairs, rolled back with them."""

from collections import Counter
from collections.abc import Sequence

from sqlalchemy import Connection, delete, func, insert, select

from pilaf_ray.errors import LedgerError
from pilaf_ray.sampling.identity import is_held_out
from pilaf_ray.store import codec, queries
from pilaf_ray.store.tables import pairs, reward_uses
from pilaf_ray.types import LabeledPair, PairState

_PAGE = 256


def record_uses(connection: Connection, step: int, pair_ids: Sequence[str]) -> None:
    """Count each pair once for each time it is named; a repeat of the same step changes nothing."""
    connection.execute(delete(reward_uses).where(reward_uses.c.step == step))
    places = {name: row.plan_index for name, row in queries.standing(connection, list(set(pair_ids))).items()}
    rows = [{"plan_index": places[name], "step": step, "uses": uses} for name, uses in Counter(pair_ids).items()]
    if rows:
        connection.execute(insert(reward_uses), rows)


def forget_uses_after(connection: Connection, step: int) -> None:
    """The reward model is back at ``step``: later uses did not happen."""
    connection.execute(delete(reward_uses).where(reward_uses.c.step > step))


def newest_with_uses(connection: Connection, *, window_pairs: int, held_out: float) -> list[tuple[LabeledPair, int]]:
    """The newest trained pairs that the reward model may train on, in plan order, with their uses so far."""
    newest = (
        queries.CONTENTS.where(pairs.c.state == PairState.TRAINED)
        .order_by(pairs.c.plan_index.desc())
        .execution_options(yield_per=_PAGE)
    )
    found: list[LabeledPair] = []
    for row in connection.execute(newest):
        if len(found) == window_pairs:
            break
        if not is_held_out(row.pair_id, held_out):
            if row.response_a is None:
                raise LedgerError(
                    f"answers of pair {row.pair_id} were dropped (store.compact_after_steps) under a smaller "
                    "reward_model.replay.window_pairs, or another held_out: put those back"
                )
            found.append(codec.decode_labeled(row))
    found.reverse()
    oldest = found[0].pair.plan.index if found else 0
    counted = (
        select(reward_uses.c.plan_index, func.sum(reward_uses.c.uses))
        .where(reward_uses.c.plan_index >= oldest)
        .group_by(reward_uses.c.plan_index)
    )
    uses: dict[int, int] = {index: int(count) for index, count in connection.execute(counted)}
    return [(item, uses.get(item.pair.plan.index, 0)) for item in found]
