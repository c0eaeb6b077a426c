"""What a PILAF pair costs to sample: `python -m benchmarks.generation configs/quickstart.yaml [key=value …]`.

The run's own generator settings, the same prompts and seeds for every sampler; each sampler is
timed several times in turn, so that a slow moment of the machine falls on all of them. The prefix cache is
cold at every repetition, as it is after a weight update.

Two engines take turns, one that drafts ahead and one that does not. `--betas` adds PILAF with other β, for which
the policy should not be the reference: `model.policy` names one that was trained.
"""

import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from pilaf_ray.build import build_inputs, generator_arguments
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.generator import Generator
from pilaf_ray.engines.speculation_settings import Speculation
from pilaf_ray.types import DraftCounts, GenerationRequest, Prompt


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    sampler: str
    beta: float
    drafting: bool

    @property
    def name(self) -> str:
        """What the row is called."""
        beta = f", β = {self.beta:g}" if self.sampler != "vanilla" else ""
        return self.sampler + beta + (", speculation" if self.drafting else "")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One repetition."""

    seconds: float
    tokens: int
    counts: DraftCounts
    """Of this repetition alone."""


def requests(prompts: list[Prompt], case: Case, *, round_number: int) -> list[GenerationRequest]:
    """Both sides of a pair a prompt; PILAF's coin is replaced by turns, so that exactly half are mixed."""
    found = []
    for number, prompt in enumerate(prompts):
        mixed = case.sampler == "hybrid" or (case.sampler == "pilaf" and number % 2 == 1)
        # Hybrid mixes one side only.
        sides = (("a", case.beta if mixed else 0.0), ("b", -case.beta if mixed and case.sampler == "pilaf" else 0.0))
        found += [
            GenerationRequest(
                request_id=f"{case.name}-{round_number}-{number}-{side}",
                prompt_token_ids=prompt.token_ids,
                coefficient=coefficient,
                seed=2 * number + (side == "b"),
            )
            for side, coefficient in sides
        ]
    return found


async def measure(
    config: RunConfig, cases: list[Case], speculation: Speculation, *, pairs: int, repetitions: int
) -> dict[Case, list[Timing]]:
    """Repetitions of each case; the first, untimed round warms the engines up."""
    inputs = build_inputs(config)
    arguments = generator_arguments(config, inputs)
    engines = {
        drafting: Generator(**{**arguments, "speculation": speculation if drafting else None})
        for drafting in (False, True)
    }
    results: dict[Case, list[Timing]] = {case: [] for case in cases}
    try:
        for engine in engines.values():
            await engine.start()
        for number in range(repetitions + 1):
            prompts = list(inputs.train.prompts[number * pairs : (number + 1) * pairs])
            for case, runs in results.items():
                timing = await _time(engines[case.drafting], requests(prompts, case, round_number=number))
                if number > 0:
                    runs.append(timing)
    finally:
        for engine in engines.values():
            await engine.stop()
    return results


async def _time(generator: Generator, wanted: list[GenerationRequest]) -> Timing:
    generator.forget_prefixes()
    before = await generator.draft_counts()
    started = time.perf_counter()
    responses = await asyncio.gather(*(generator.generate(request) for request in wanted))
    seconds = time.perf_counter() - started
    after = await generator.draft_counts()
    counts = DraftCounts(
        drafted=after.drafted - before.drafted,
        judged=after.judged - before.judged,
        kept=after.kept - before.kept,
        passes=after.passes - before.passes,
    )
    return Timing(seconds=seconds, tokens=sum(len(r.token_ids) for r in responses), counts=counts)


def summary(case: Case, runs: list[Timing], *, pairs: int, vanilla: float) -> dict[str, str | float]:
    """A row of the table; ``vanilla``: its pairs/s."""
    rates = [pairs / run.seconds for run in runs]
    rate = statistics.median(rates)
    return {
        "sampler": case.name,
        "tokens_per_second": statistics.median(run.tokens / run.seconds for run in runs),
        "pairs_per_second": rate,
        "over_vanilla": rate / vanilla,
        "spread": (max(rates) - min(rates)) / rate,
        "acceptance": statistics.median(run.counts.acceptance for run in runs),
        "tokens_per_reference_forward": statistics.median(run.counts.tokens_per_pass for run in runs),
    }


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value")] = None,
    pairs: int = 16,
    repetitions: int = 3,
    betas: Annotated[str, typer.Option(help="β of further rows with speculation, with commas between them")] = "",
) -> None:
    """Print a table and one line of JSON."""
    config = load_config(config_path, overrides or [])
    section = config.generation.speculation
    speculation = Speculation(tokens=section.tokens, adaptive=section.adaptive) if section else Speculation()
    beta = config.algorithm.beta
    cases = [
        Case(sampler="vanilla", beta=0.0, drafting=False),
        Case(sampler="hybrid", beta=beta, drafting=False),
        Case(sampler="pilaf", beta=beta, drafting=False),
        Case(sampler="vanilla", beta=0.0, drafting=True),
        Case(sampler="pilaf", beta=beta, drafting=True),
        *(Case(sampler="pilaf", beta=float(other), drafting=True) for other in betas.split(",") if other),
    ]
    results = asyncio.run(measure(config, cases, speculation, pairs=pairs, repetitions=repetitions))
    vanilla = statistics.median(pairs / run.seconds for run in results[cases[0]])
    rows = [summary(case, runs, pairs=pairs, vanilla=vanilla) for case, runs in results.items()]
    columns = ["tokens/s", "pairs/s", "pairs/s over vanilla", "spread", "drafts kept", "tokens a reference forward"]
    table = Table("sampler", *columns)
    for row in rows:
        table.add_row(str(row["sampler"]), *(f"{row[key]:.3g}" for key in list(row)[1:]))
    Console(stderr=True).print(table)
    print(json.dumps({"machine": machine(), "pairs": pairs, "repetitions": repetitions, "results": rows}))


if __name__ == "__main__":
    typer.run(main)
