"""A run folder as it grows: metrics, events, evaluations and the run's own word on its state."""

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilaf_ray.config.limits import NO_STEP_LIMIT
from pilaf_ray.errors import RunFolderError
from pilaf_ray.evaluation.statistics import mean, standard_error
from pilaf_ray.observability.run_status import RunStatus, read_status

MAX_EVENTS = 2000
STALE_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One held-out evaluation; J = reward − β·KL."""

    step: int
    reward: float
    reward_se: float
    kl: float
    objective: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One answer to a fixed held-out prompt."""

    step: int
    response: str
    reward: float
    kl: float


class JsonlTail:
    """Reads a growing JSON-lines file from where it stopped.

    A file that became shorter, or was replaced, is read anew: a resumed run cuts its metrics back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode = 0

    def poll(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether everything before is void, the new records). A line without its end waits."""
        try:
            with self._path.open("rb") as stream:
                status = self._path.stat()
                void = self._offset > 0 and (status.st_ino != self._inode or status.st_size < self._offset)
                if void:
                    self._offset = 0
                self._inode = status.st_ino
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return False, []
        end = data.rfind(b"\n") + 1
        self._offset += end
        return void, [json.loads(line) for line in data[:end].splitlines() if line.strip()]


class RunRecords:
    """What the files of a run tell, shared by all viewers.

    Raises:
        RunFolderError: the folder holds no run.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        config = path / "config.json"
        if not config.is_file():
            raise RunFolderError(f"{path} is not a run folder: it has no config.json; give e.g. runs/quickstart")
        self.path = path
        self.config: dict[str, Any] = json.loads(config.read_text())
        self.metrics: list[dict[str, Any]] = []
        self.events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self.evaluations: list[Evaluation] = []
        self.generation = 0
        """Counts how often the metrics were cut back; who holds older ones must drop them."""
        self._samples: dict[str, list[Sample]] = {}
        self._known: dict[Path, int] = {}
        self._metrics_tail = JsonlTail(path / "metrics.jsonl")
        self._events_tail = JsonlTail(path / "events.jsonl")
        self._clock = clock
        self._refreshed = -1.0

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config["run"]["name"])

    @property
    def beta(self) -> float:
        """β of J."""
        return float(self.config["algorithm"].get("beta", 0.0))

    @property
    def bound(self) -> int:
        """Oldest age, in steps, that a trained pair may have."""
        return int(self.config["pipeline"]["max_staleness_steps"])

    @property
    def max_steps(self) -> int | None:
        """Steps that the run is to take; None where another limit ends it."""
        steps = int(self.config["run"]["max_steps"])
        return None if steps >= NO_STEP_LIMIT else steps

    @property
    def label_budget(self) -> int | None:
        """Labels that the run is to spend; None where nothing limits them."""
        labels, steps = self.config["run"].get("max_labels"), self.max_steps
        limits = [int(labels)] if labels else []
        limits += [steps * self.batch_pairs] if steps is not None else []
        return min(limits, default=None)

    @property
    def batch_pairs(self) -> int:
        """Labelled pairs of a step."""
        return int(self.config["learner"]["batch_pairs"])

    @property
    def stamp(self) -> tuple[float, ...]:
        """Another one after each step and each event."""
        return self.generation, len(self.metrics), float(self.events[-1]["time"]) if self.events else 0.0

    @property
    def latest(self) -> dict[str, Any]:
        """The newest line of metrics, empty before the first."""
        return self.metrics[-1] if self.metrics else {}

    def refresh(self, *, at_most_every: float = 0.5) -> None:
        """Read what is new; viewers share one reading."""
        now = self._clock()
        if 0 <= now - self._refreshed < at_most_every:
            return
        self._refreshed = now
        void, rows = self._metrics_tail.poll()
        if void:
            self.metrics = []
            self.generation += 1
        self.metrics.extend(rows)
        void, rows = self._events_tail.poll()
        if void:
            self.events.clear()
        self.events.extend(rows)
        self._read_evaluations()

    def status(self) -> RunStatus | None:
        """What the run said of itself last, None if it never did."""
        return read_status(self.path)

    def state(self, now: float) -> str:
        """running, finished or stopped; ``now`` is wall-clock time."""
        status = self.status()
        if status is not None and now - status.time < STALE_SECONDS and status.phase != "ended":
            return "running"
        return "finished" if (self.path / "report" / "summary.json").exists() else "stopped"

    def samples(self, count: int) -> dict[str, list[Sample]]:
        """The answers to the first ``count`` held-out prompts, evaluation by evaluation."""
        return dict(list(self._samples.items())[:count])

    def _read_evaluations(self) -> None:
        files = {file: file.stat().st_mtime_ns for file in sorted((self.path / "evaluations").glob("step-*.json"))}
        if files == self._known:
            return
        self._known = files
        self.evaluations, self._samples = [], {}
        for result in sorted((json.loads(file.read_text()) for file in files), key=lambda r: int(r["step"])):
            reward, kl = mean(result["rewards"]), mean(result["kls"])
            self.evaluations.append(
                Evaluation(
                    step=result["step"],
                    reward=reward,
                    reward_se=standard_error(result["rewards"]),
                    kl=kl,
                    objective=reward - self.beta * kl,
                )
            )
            columns = (result["prompts"], result["responses"], result["rewards"], result["kls"])
            for prompt, response, prompt_reward, prompt_kl in list(zip(*columns, strict=True))[:50]:
                sample = Sample(step=result["step"], response=response, reward=prompt_reward, kl=prompt_kl)
                self._samples.setdefault(prompt, []).append(sample)
