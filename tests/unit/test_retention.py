"""Which checkpoints stay: by example, and for any steps, scores and policy."""

from hypothesis import given
from hypothesis import strategies as st

from pilaf_ray.engines.retention import RetentionPolicy

STEPS = st.sets(st.integers(1, 60), min_size=1, max_size=20)
SCORES = st.dictionaries(st.integers(1, 80), st.sampled_from([-1.0, 0.0, 0.5, 0.5001, 2.0]), max_size=30)
POLICIES = st.builds(
    RetentionPolicy, last=st.integers(1, 5), best=st.integers(0, 4), every=st.none() | st.integers(1, 20)
)


def test_which_checkpoints_stay() -> None:
    steps, scores = [5, 10, 15, 20, 25, 30], {5: 0.9, 10: 0.9, 15: 0.1, 100: 5.0}
    assert RetentionPolicy(last=2).kept(steps, newest=30, scores=scores) == {25, 30}
    assert RetentionPolicy(last=1, best=1).kept(steps, newest=30, scores=scores) == {10, 30}, "the later of equals"
    every_judged = RetentionPolicy(last=1, best=9).kept(steps, newest=30, scores=scores)
    assert every_judged == {5, 10, 15, 30}, "never judged ones are not best"
    assert RetentionPolicy(last=1, every=10).kept(steps, newest=30, scores={}) == {10, 20, 30}
    assert RetentionPolicy(last=3, best=1, every=2).kept([7], newest=7, scores={}) == {7}
    assert RetentionPolicy(last=1).kept(steps, newest=30, scores={}, serving=15) == {15, 30}
    assert RetentionPolicy(last=2).kept(steps, newest=20, scores={}) == {15, 20}, "25 and 30 were rolled back"


@given(steps=STEPS, scores=SCORES, policy=POLICIES, data=st.data())
def test_whatever_is_known_the_newest_the_served_and_the_promised_ones_stay(
    steps: set[int], scores: dict[int, float], policy: RetentionPolicy, data: st.DataObject
) -> None:
    newest = data.draw(st.sampled_from(sorted(steps)))
    serving = data.draw(st.none() | st.sampled_from(sorted(steps)))
    kept = policy.kept(steps, newest=newest, scores=scores, serving=serving)
    good = {step for step in steps if step <= newest}
    assert newest in kept and kept <= good
    assert serving not in good or serving in kept
    assert {step for step in good if policy.every and step % policy.every == 0} <= kept
    # The last N are those that fewer than N are newer than; likewise the best.
    assert {step for step in good if sum(other > step for other in good) < policy.last} <= kept
    judged = {step for step in good if step in scores}
    better = {step: sum((scores[o], o) > (scores[step], step) for o in judged) for step in judged}
    assert {step for step in judged if better[step] < policy.best} <= kept
    assert len(kept) <= policy.last + policy.best + 1 + sum(bool(policy.every and s % policy.every == 0) for s in good)
    assert policy.kept(kept, newest=newest, scores=scores, serving=serving) == kept, "what stays, stays"
