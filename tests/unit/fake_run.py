"""A whole training run whose roles compute nothing: real controller, ledger, checkpoints and records, no Ray."""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pairs import response
from rich.console import Console

from pilaf_ray.actors.launch import Roles
from pilaf_ray.build import RunInputs
from pilaf_ray.build_samplers import build_sampler
from pilaf_ray.config.loader import load_config
from pilaf_ray.data.prompts import PromptSet
from pilaf_ray.observability.busy import BusyMeter
from pilaf_ray.observability.run_status import ReplicaStatus
from pilaf_ray.run_folder import open_run_folder
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.training_run import TrainingRun
from pilaf_ray.types import (
    GenerationRequest,
    LabeledPair,
    PreferenceLabel,
    Prompt,
    ReferenceLogprobs,
    ResponsePair,
    RoleUsage,
    SampledResponse,
    StepResult,
    TokenPair,
)

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
T = TypeVar("T")

SETTINGS = (
    *("sampler={type: vanilla}", "reference.reuse_sampled=false", "pipeline.max_staleness_steps=0"),
    *("weights.probe_tolerance=null", "evaluation.prompts=2", "checkpoint.every_steps=2"),
    *("supervision.first_pause_seconds=0", "supervision.failures_in_a_row=3", "run.max_steps=4"),
)


class Role:
    """What every role can say of itself."""

    def __init__(self) -> None:
        self.meter = BusyMeter()
        self.replicas: Sequence[ReplicaStatus] = ()

    async def usage(self) -> list[RoleUsage]:
        return []

    async def close(self) -> None: ...


class Generators(Role):
    """Samples the same two tokens always, under the version that was served last."""

    def __init__(self) -> None:
        super().__init__()
        self.actors: dict[int, Any] = {}
        self.version = 0

    async def generate(self, request: GenerationRequest) -> SampledResponse:
        await asyncio.sleep(0)
        return response("text", version=self.version)

    def follow(self, pull: Callable[..., Awaitable[None]], update: Any) -> None:
        self.version = update.ticket

    def forget_weights(self) -> None: ...

    async def resize(self, number: int) -> int:
        return number


class Judges(Role):
    """Reference and oracle at once: every response is worth the same, and a is better than b."""

    async def score(self, pairs: Sequence[ResponsePair]) -> list[ReferenceLogprobs]:
        return [ReferenceLogprobs(pair_id=pair.plan.pair_id, a=-1.0, b=-1.0) for pair in pairs]

    async def score_tokens(self, items: Sequence[TokenPair], *, pairs: Sequence[str] = ()) -> list[list[float]]:
        return [[-0.5] * len(tokens) for _, tokens in items]

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        return [
            PreferenceLabel(pair_id=pair.plan.pair_id, probability=1.0, source="function", reward_a=1.0, reward_b=0.0)
            for pair in pairs
        ]

    async def score_texts(self, prompts: list[str], responses: list[str], *, pairs: Sequence[str] = ()) -> list[float]:
        return [1.0 for _ in responses]


class Learner(Role):
    """Its losses are told beforehand.

    Args:
        losses: of each step, one an attempt at it, and 1 from then on; an exception is raised.
    """

    def __init__(self, losses: dict[int, list[float | Exception]]) -> None:
        super().__init__()
        self.losses = losses
        self.loss = None
        self.batches: list[tuple[int, list[str]]] = []
        """(step, ids of its pairs) of every attempt."""
        self.loaded: list[int] = []
        self.rebuilt = 0
        self._step = 0

    async def train_step(self, step: int, batch: Sequence[LabeledPair]) -> StepResult:
        self.batches.append((step, [item.pair_id for item in batch]))
        planned = self.losses.get(step)
        loss = planned.pop(0) if planned else 1.0
        if isinstance(loss, Exception):
            raise loss
        self._step = step
        return StepResult(step=step, loss=loss)

    async def publish(self, version: int) -> int:
        return version

    async def unless_lost(self, work: Awaitable[T]) -> T:
        return await work

    async def save(self, folder: Path) -> None:
        (folder / "step").write_text(str(self._step))

    async def load(self, folder: Path) -> None:
        self._step = int((folder / "step").read_text())
        self.loaded.append(self._step)

    async def rebuild(self) -> None:
        self.rebuilt += 1
        self._step = 0


class Store(Role):
    """The real ledger, each of its methods as a call that is awaited."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._ledger = PreferenceLedger(f"sqlite:///{path}")

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any) -> Any:
            return getattr(self._ledger, name)(*arguments)

        return call

    async def close(self) -> None:
        self._ledger.close()


class RunWithFakes(TrainingRun):
    """A run that is given its roles."""

    given: Roles

    async def _start_roles(self) -> Roles:
        self._roles = self.given
        self._side = self._learner_side(self.given)
        return self.given


@dataclass
class Outcome:
    """What a run left behind."""

    folder: Path
    learner: Learner
    ended_by: str = ""
    terminal: list[str] = field(default_factory=list)
    """Its lines, without the seconds."""
    error: Exception | None = None

    @property
    def steps(self) -> list[int]:
        """Of ``metrics.jsonl``."""
        return [json.loads(line)["step"] for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step-*"))

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == name]


def train(folder: Path, losses: dict[int, list[float | Exception]], *overrides: str, resume: bool = False) -> Outcome:
    """Run or resume in ``folder``; an error of the run is part of its outcome."""
    config = load_config(TINY, [*SETTINGS, f"run.folder={folder.parent}", f"run.name={folder.name}", *overrides])
    prompts = tuple(Prompt(prompt_id=f"p-{n}", text=f"prompt {n}", token_ids=(1, 2)) for n in range(64))
    inputs = RunInputs(
        train=PromptSet(prompts=prompts[2:], dropped=0, truncated=0),
        evaluation=PromptSet(prompts=prompts[:2], dropped=0, truncated=0),
        sampler=build_sampler(config),
        dtype="float32",
        reference_dtype="float32",
        precision="float32",
    )
    screen = io.StringIO()
    outcome = Outcome(folder, Learner(losses))
    with open_run_folder(folder, config_json=config.model_dump_json(), resume=resume) as opened:
        run = RunWithFakes(config, inputs, opened, Console(file=screen, width=1000))
        judges: Any = Judges()
        roles: dict[str, Any] = {"generators": Generators(), "learner": outcome.learner}
        store: Any = Store(folder / "preferences.db")
        run.given = Roles(reference=judges, oracle=judges, store=store, **roles)
        try:
            asyncio.run(run.run(resume=resume))
        except Exception as error:  # whatever it is, the test says which it expects
            outcome.error = error
        finally:
            asyncio.run(store.close())
    outcome.ended_by = run.ended_by
    outcome.terminal = [line.partition("] ")[2] for line in screen.getvalue().splitlines() if line.startswith("[")]
    return outcome
