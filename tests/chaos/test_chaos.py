"""A short run under fire: one fault of each kind, and the books add up. Long: `python -m benchmarks.chaos`."""

from pathlib import Path

from benchmarks.chaos import run_chaos
from benchmarks.chaos_books import read_books
from benchmarks.chaos_job import Fault, Job
from pilaf_ray.data.tiny_models import make_tiny_llama

PLAN = [
    Fault(role="preference store", kind="SIGKILL", moment="training.commit"),
    Fault(role="oracle", kind="exception", moment="labelling"),
    Fault(role="learner", kind="SIGKILL", moment="checkpoint.write"),
    Fault(role="generator", kind="SIGKILL", moment="weight sync.pull"),
]


def test_faults_of_four_roles_are_survived_and_the_books_add_up(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "model", seed=0)
    job = Job(tmp_path, "chaos", [f"model.policy={tmp_path / 'model'}"])
    try:
        outcomes = run_chaos(job, seed=0, plan=PLAN, seconds=300)
    finally:
        job.end()
    assert [(o.role, o.fault, o.moment, o.survived) for o in outcomes] == [
        (fault.role, fault.kind, fault.moment, True) for fault in PLAN
    ]
    assert {(o.labels_lost, o.counted_twice) for o in outcomes} == {(0, 0)}
    books = read_books(job)
    assert (books.labels_lost, books.counted_twice, books.wrong) == ([], [], [])
    assert books.trained == 4 * books.steps
