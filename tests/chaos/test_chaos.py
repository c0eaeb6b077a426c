"""A short run under fire: one fault of each kind, and the books add up. Long: `python -m benchmarks.chaos`."""

from pathlib import Path

from benchmarks.chaos import Job, read_books, run_chaos
from pilaf_ray.data.tiny_models import make_tiny_llama

PLAN = [("generator", "SIGKILL"), ("learner", "SIGKILL"), ("oracle", "exception"), ("preference store", "SIGKILL")]


def test_faults_of_four_roles_are_survived_and_the_books_add_up(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "model", seed=0)
    job = Job(tmp_path, "chaos", [f"model.policy={tmp_path / 'model'}"])
    try:
        outcomes = run_chaos(job, seed=0, plan=PLAN, seconds=300)
    finally:
        job.end()
    assert [(o.role, o.fault, o.survived) for o in outcomes] == [(*fault, True) for fault in reversed(PLAN)]
    books = read_books(job, batch_pairs=4)
    assert (books.labels_lost, books.counted_twice, books.wrong) == ([], [], [])
    assert books.trained == 4 * books.steps
