"""What a PILAF pair costs to sample: `python -m benchmarks.generation configs/quickstart.yaml [key=value …]`.

The run's own generator settings, the same prompts and seeds for every row; each is timed several times in turn, so
that a slow moment of the machine falls on all of them. The prefix cache is cold at every repetition, as it
is after a weight update.

Beside the run's engine there are one that drafts ahead, with `model.lora` one whose policy and reference share their
base, vLLM with the policy alone, and a loop over two models of transformers (`--peers`). `--betas` adds PILAF with
other β, for which the policy should not be the reference: `model.policy` names one that was trained.
"""

import asyncio
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.arithmetic import spread
from benchmarks.generation_engines import Engine, HuggingFaceLoop, Ours, PlainVllm
from benchmarks.machine import machine
from benchmarks.options import several
from pilaf_ray.actors.launch import CPU_ALLOCATOR
from pilaf_ray.build import build_inputs, generator_arguments
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.speculation_settings import Speculation
from pilaf_ray.resource_plan import lora_settings
from pilaf_ray.sampling.plans import SAMPLER_CLASSES, PairSampler, PilafSampler
from pilaf_ray.types import DraftCounts, GenerationRequest, Prompt

OWN, DRAFTING, SHARED, SHARED_DRAFTING = "", "speculation", "one base", "one base, speculation"
SAMPLERS = ("vanilla", "hybrid", "pilaf")
VLLM, HUGGING_FACE = "plain vLLM", "Hugging Face, two models"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    sampler: str
    beta: float
    engine: str

    @property
    def name(self) -> str:
        """What the row is called."""
        beta = f"β = {self.beta:g}" if self.sampler == "pilaf" else ""
        return ", ".join(part for part in (self.sampler, beta, self.engine) if part)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One repetition."""

    seconds: float
    tokens: int
    counts: DraftCounts
    """Of this repetition alone."""


def pair_sampler(case: Case) -> PairSampler:
    """The one that a run would plan its pairs with."""
    return PilafSampler(beta=case.beta) if case.sampler == "pilaf" else SAMPLER_CLASSES[case.sampler]()


def requests(prompts: list[Prompt], case: Case, *, round_number: int) -> list[GenerationRequest]:
    """Both sides of a pair a prompt; a coin is replaced by turns, so that exactly half of PILAF's pairs are mixed."""
    branches = pair_sampler(case).branches
    assert len({branch.weight for branch in branches}) == 1, "turns are fair"
    found = []
    for number, prompt in enumerate(prompts):
        branch = branches[number % len(branches)]
        found += [
            GenerationRequest(
                request_id=f"{case.name}-{round_number}-{number}-{side}",
                prompt_token_ids=prompt.token_ids,
                coefficient=coefficient,
                seed=2 * number + (side == "b"),
            )
            for side, coefficient in (("a", branch.coefficient_a), ("b", branch.coefficient_b))
        ]
    return found


def make_engines(config: RunConfig, arguments: dict[str, Any], speculation: Speculation) -> dict[str, Engine]:
    """Every engine that a row may want; none is started."""
    lora = lora_settings(config)
    made: dict[str, Engine] = {VLLM: PlainVllm(arguments), HUGGING_FACE: HuggingFaceLoop(arguments)}
    for name, drafting, shared in (
        (OWN, None, False),
        (DRAFTING, speculation, False),
        (SHARED, None, True),
        (SHARED_DRAFTING, speculation, True),
    ):
        if not shared or lora is not None:
            made[name] = Ours({**arguments, "speculation": drafting, "shares_base": shared}, lora)
    return made


async def measure(
    engines: dict[str, Engine], prompts: Sequence[Prompt], cases: list[Case], *, sizes: Sequence[int], repetitions: int
) -> dict[int, dict[Case, list[Timing]]]:
    """Repetitions of each case, by pairs sampled together; the first, untimed round warms the engines up."""
    wanted = {case.engine: engines[case.engine] for case in cases}
    results: dict[int, dict[Case, list[Timing]]] = {pairs: {case: [] for case in cases} for pairs in sizes}
    async with AsyncExitStack() as stack:
        for engine in wanted.values():
            await engine.start()
            stack.push_async_callback(engine.stop)
        for number, pairs in product(range(repetitions + 1), sizes):
            some = list(prompts[number * pairs : (number + 1) * pairs])
            for case, runs in results[pairs].items():
                timing = await _time(wanted[case.engine], requests(some, case, round_number=number))
                if number > 0:
                    runs.append(timing)
    return results


async def _time(engine: Engine, wanted: list[GenerationRequest]) -> Timing:
    before = await engine.counts()
    started = time.perf_counter()
    tokens = await engine.sample(wanted)
    seconds = time.perf_counter() - started
    return Timing(seconds=seconds, tokens=tokens, counts=counted(before, await engine.counts()))


def counted(before: DraftCounts, after: DraftCounts) -> DraftCounts:
    """What was counted in between."""
    return DraftCounts(
        drafted=after.drafted - before.drafted,
        judged=after.judged - before.judged,
        kept=after.kept - before.kept,
        passes=after.passes - before.passes,
    )


def summary(case: Case, results: Mapping[Case, list[Timing]], *, pairs: int) -> dict[str, str | float | None]:
    """A row of the table; what stands over another row is the median over the rounds, each within itself."""
    runs = results[case]
    rates = [pairs / run.seconds for run in runs]
    vanilla = next(timings for other, timings in results.items() if other.sampler == "vanilla" and not other.engine)
    loop = next((timings for other, timings in results.items() if other.engine == HUGGING_FACE), None)
    return {
        "sampler": case.name,
        "pairs": pairs,
        "tokens_per_second": statistics.median(run.tokens / run.seconds for run in runs),
        "pairs_per_second": statistics.median(rates),
        "over_vanilla": _median_ratio([run.seconds for run in vanilla], [run.seconds for run in runs]),
        "over_transformers": None
        if loop is None
        else _median_ratio([run.tokens / run.seconds for run in runs], [run.tokens / run.seconds for run in loop]),
        "spread": spread(rates),
        "acceptance": statistics.median(run.counts.acceptance for run in runs),
        "tokens_per_reference_forward": statistics.median(run.counts.tokens_per_pass for run in runs),
        "judged": sum(run.counts.judged for run in runs),
    }


def _median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def choose_cases(config: RunConfig, *, betas: str, peers: bool) -> list[Case]:
    """The rows of the table; the first is what the others are compared with."""
    beta = config.algorithm.beta
    cases = [Case(sampler=sampler, beta=beta, engine=OWN) for sampler in SAMPLERS]
    cases += [Case(sampler=sampler, beta=beta, engine=DRAFTING) for sampler in SAMPLERS]
    if config.model.lora is not None:
        cases += [Case(sampler="pilaf", beta=beta, engine=engine) for engine in (SHARED, SHARED_DRAFTING)]
        cases += [Case(sampler="vanilla", beta=beta, engine=SHARED)]
    if peers:
        cases += [
            Case(sampler="vanilla", beta=beta, engine=VLLM),
            Case(sampler="pilaf", beta=beta, engine=HUGGING_FACE),
        ]
    return cases + [Case(sampler="pilaf", beta=other, engine=DRAFTING) for other in several(betas, float)]


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value")] = None,
    pairs: Annotated[str, typer.Option(help="Pairs sampled together, with commas between several numbers")] = "16",
    repetitions: int = 3,
    betas: Annotated[str, typer.Option(help="β of further rows with speculation, with commas between them")] = "",
    peers: Annotated[bool, typer.Option(help="Also vLLM alone and a loop of transformers.")] = True,
    file: Annotated[Path | None, typer.Option("--results", help="File that gets the JSON as well.")] = None,
) -> None:
    """Print a table and one line of JSON."""
    sizes = several(pairs, int)
    config = load_config(config_path, overrides or [])
    section = config.generation.speculation
    speculation = Speculation(tokens=section.tokens, adaptive=section.adaptive) if section else Speculation()
    inputs = build_inputs(config)
    engines = make_engines(config, generator_arguments(config, inputs), speculation)
    cases = choose_cases(config, betas=betas, peers=peers)
    # As in a run, and the same for everybody: engines and the loop are processes of their own.
    os.environ.update(CPU_ALLOCATOR)
    load = os.getloadavg()
    found = asyncio.run(measure(engines, inputs.train.prompts, cases, sizes=sizes, repetitions=repetitions))
    rows = [summary(case, results, pairs=size) for size, results in found.items() for case in results]
    columns = ["pairs", "tokens/s", "pairs/s", "pairs/s over vanilla", "tokens/s over transformers"]
    table = Table("sampler", *columns, "spread", "drafts kept", "tokens a reference forward", "tokens judged")
    for row in rows:
        table.add_row(
            str(row["sampler"]), *("" if value is None else f"{value:.3g}" for value in list(row.values())[1:])
        )
    Console(stderr=True, width=160).print(table)
    told = {
        "machine": machine(),
        "overrides": overrides or [],
        "repetitions": repetitions,
        "load_average": {"before": load, "after": os.getloadavg()},
        "results": rows,
    }
    print(json.dumps(told))
    if file is not None:
        file.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
