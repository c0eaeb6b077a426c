"""A run folder for tests of the console: written by our own ledger and sinks, without a run."""

import json
import math
from dataclasses import replace
from pathlib import Path

from pairs import plan, reference, response

from pilaf_ray.observability.run_status import Pulse, ReplicaStatus, RoleStatus, RunStatus, write_status
from pilaf_ray.observability.sinks import EventLog, JsonlSink
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.types import PreferenceLabel, ResponsePair

ATTACK = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
CONFIG = {
    "run": {"name": "example", "max_steps": 100},
    "model": {"policy": "nowhere"},
    "algorithm": {"type": "dpo", "beta": 0.1},
    "learner": {"batch_pairs": 2},
    "pipeline": {"max_staleness_steps": 1},
    "oracle": {"type": "function"},
}
EVALUATIONS = {0: ([1.0, 2.0], [0.0, 0.0]), 4: ([2.0, 3.0], [4.0, 6.0])}
"""step → rewards and KLs, so J is 1.5 and then 2.5 − 0.1 · 5 = 2."""


def metrics_row(step: int) -> dict[str, float | None]:
    return {
        "step": step,
        "loss": 0.693 - 0.01 * step,
        "train/chosen_logprob": -20.0 - step,
        "train/rejected_logprob": -20.0 - 2 * step,
        "reward/policy": None if step == 2 else math.sin(step),
        "age/max": 1,
        "brand/new": step * 1.5,
        "cost/generated_tokens": 12.0 * step,
        "time/wait": 1.0,
        "time/train": 2.0,
        "time/push": 1.0,
    }


def ledger_pair(index: int, *, a: str, b: str) -> ResponsePair:
    made = replace(
        plan(index),
        prompt=replace(plan(index).prompt, text=f"Write about topic {index} & more"),
        branch="interpolated" if index % 2 else "on_policy",
    )
    return ResponsePair(plan=made, a=response(a), b=response(b))


def fill_ledger(path: Path, *, pairs: int, sampled: int = 0) -> list[ResponsePair]:
    """``pairs`` labelled pairs, the first four of them trained in steps 1 and 2; then ``sampled`` that wait."""
    made = [ledger_pair(i, a=f"the same word {i}", b="the other word") for i in range(pairs + sampled)]
    made[0] = ledger_pair(0, a=ATTACK, b="plain")
    ledger = PreferenceLedger(f"sqlite:///{path / 'preferences.db'}")
    ledger.add_plans([pair.plan for pair in made])
    ledger.add_responses(made)
    labelled = made[:pairs]
    ledger.add_labels(
        [
            PreferenceLabel(pair_id=pair.plan.pair_id, probability=0.5 if n == 5 else 1.0, source="function")
            for n, pair in enumerate(labelled)
        ],
        [reference(pair.plan.index) for pair in labelled],
    )
    for step in (1, 2):
        ledger.mark_trained(step, [pair.plan.pair_id for pair in made[2 * step - 2 : 2 * step]])
    ledger.close()
    return made


def make_run(path: Path, *, steps: int = 4, pairs: int = 8) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    sink = JsonlSink(path / "metrics.jsonl")
    for step in range(1, steps + 1):
        sink.write(metrics_row(step))
    events = EventLog(path / "events.jsonl")
    events.record("run started", attempt=1)
    events.record("weights", version=steps)
    events.record("replica lost", role="generator", replica=0, cause="<b>killed</b>")
    (path / "evaluations").mkdir(exist_ok=True)
    for step, (rewards, kls) in EVALUATIONS.items():
        result = {
            "step": step,
            "prompts": ["p & q", "r"],
            "responses": [ATTACK, "fine"],
            "rewards": rewards,
            "kls": kls,
        }
        (path / "evaluations" / f"step-{step:06d}.json").write_text(json.dumps(result))
    logs = path / "logs" / "attempt_1"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "generator-0.log").write_text("loaded\nWANDB_API_KEY=0123456789abcdef\n")
    (path / "logs" / "latest").symlink_to("attempt_1")
    replicas = (ReplicaStatus(number=0, serving=True, pulse=Pulse(time=999.0, memory_mib=1536.0)),)
    roles = (
        RoleStatus(role="generator", in_flight=3, busy=0.75, replicas=replicas),
        RoleStatus(role="oracle", in_flight=1, busy=0.5),
    )
    write_status(path, RunStatus(time=1000.0, phase="training", roles=roles))
    fill_ledger(path, pairs=pairs)
    return path
