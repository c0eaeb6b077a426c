"""The job that launch/ shows, and stand-ins for the programs that schedulers bring."""

import os
from pathlib import Path

import pytest

from pilaf_ray.config.loader import load_config
from pilaf_ray.submission.job import Job, make_job

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "configs" / "llama3-8b-hh.yaml"
FILES = {"slurm": "slurm.sbatch", "kuberay": "rayjob.yaml", "skypilot": "skypilot.yaml"}


ON_THE_VOLUME = (
    "model.policy=/shared/models/llama-3.1-8b-sft",
    "prompts.train.path=/shared/data/hh-rlhf-prompts-train.parquet",
    "prompts.evaluation.path=/shared/data/hh-rlhf-prompts-test.parquet",
)
"""On Slurm and Kubernetes files lie on shared storage; with SkyPilot they travel with the working folder."""


def example(*overrides: str, target: str = "slurm") -> Job:
    """The job of the example for ``target``, as launch/ has it but for ``overrides``."""
    placed = () if target == "skypilot" else ON_THE_VOLUME
    config = load_config(EXAMPLE, ["run.folder=/shared/runs", *placed, *overrides])
    return make_job(config, working_dir=Path("/shared/pilaf_ray"), target=target)


class FakeClient:
    """A program first on PATH that writes down how it was called, and answers by a list of rules.

    Each rule is (words that the call has, in this order; what is printed; exit code): the first that matches
    counts, and a call that none matches prints nothing and succeeds.
    """

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._calls, self._rules = folder / f"{name}.calls", folder / f"{name}.rules"
        self.answer()
        program = folder / name
        program.write_text(
            "#!/bin/sh\n"
            f"printf '%s\\n' \"$*\" >>{self._calls}\n"
            f"while IFS='|' read -r pattern code text; do\n"
            '  case "$*" in $pattern) printf "$text"; [ "$code" = 0 ] || printf "$text" >&2; exit "$code";; esac\n'
            f"done <{self._rules}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def answer(self, *rules: tuple[str, str, int]) -> None:
        """From now on answer by ``rules``, and forget the calls so far."""
        self._calls.write_text("")
        lines = [f"*{'*'.join(words.split())}*|{code}|{text}\n" for words, text, code in rules]
        self._rules.write_text("".join(lines))

    @property
    def calls(self) -> list[str]:
        """The arguments of every call, in order."""
        return self._calls.read_text().splitlines()
