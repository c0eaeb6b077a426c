"""How many drafts are kept: `python -m benchmarks.acceptance configs/quickstart.yaml POLICY… [key=value …]`.

Speculative interpolation keeps the policy's tokens where the mixture agrees, which depends on β and on how far the
policy is from the reference. For each policy (a folder with its weights) one drafting engine samples PILAF's mixed
pairs for each β. The distance is measured by the same engine: the mean of log π − log π_ref over responses that are
drawn from a mixture that is the policy but for a millionth.

Nothing is timed, so that other work on the machine changes no figure.
"""

import asyncio
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.generation import counted
from benchmarks.machine import machine
from benchmarks.options import several
from pilaf_ray.build import build_inputs, generator_arguments
from pilaf_ray.config.loader import load_config
from pilaf_ray.engines.generator import Generator
from pilaf_ray.engines.speculation_settings import Speculation
from pilaf_ray.errors import PilafError
from pilaf_ray.types import GenerationRequest, Prompt, SampledResponse

ALMOST_NONE = 1e-6
"""A coefficient with which a response is the policy's own, and records both networks' log-probabilities."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Acceptance:
    """Of one policy and one β."""

    policy: str
    kl: float
    """KL(π‖π_ref), nats a response."""
    kl_error: float
    """Its standard error over the responses."""
    beta: float
    kept: float
    """Share of judged drafts."""
    tokens_per_pass: float
    """Tokens from one reference forward."""
    judged: int


async def sample(
    generator: Generator, prompts: Sequence[Prompt], coefficients: Sequence[float]
) -> list[SampledResponse]:
    """One response for each prompt and coefficient."""
    requests = [
        GenerationRequest(
            request_id=f"{number}-{coefficient}",
            prompt_token_ids=prompt.token_ids,
            coefficient=coefficient,
            seed=2 * number + side,
        )
        for number, prompt in enumerate(prompts)
        for side, coefficient in enumerate(coefficients)
    ]
    return await asyncio.gather(*(generator.generate(request) for request in requests))


async def measure(
    generator: Generator, name: str, prompts: Sequence[Prompt], betas: Sequence[float]
) -> list[Acceptance]:
    """A started engine with every β."""
    own = await sample(generator, prompts, [ALMOST_NONE])
    distances = [math.fsum(r.policy_logprobs or ()) - math.fsum(r.reference_logprobs or ()) for r in own]
    found = []
    for beta in betas:
        before = await generator.draft_counts()
        await sample(generator, prompts, [beta, -beta])
        counts = counted(before, await generator.draft_counts())
        found.append(
            Acceptance(
                policy=name,
                kl=statistics.fmean(distances),
                kl_error=statistics.stdev(distances) / math.sqrt(len(distances)),
                beta=beta,
                kept=counts.acceptance,
                tokens_per_pass=counts.tokens_per_pass,
                judged=counts.judged,
            )
        )
    return found


async def of_policy(
    config_path: Path, words: Sequence[str], policy: str, *, pairs: int, betas: Sequence[float]
) -> list[Acceptance]:
    """One engine from its start to its end."""
    reference = load_config(config_path, list(words)).model.reference_path
    config = load_config(config_path, [*words, f"model.policy={policy}", f"model.reference={reference}"])
    inputs = build_inputs(config)
    section = config.generation.speculation
    speculation = Speculation(tokens=section.tokens, adaptive=section.adaptive) if section else Speculation()
    generator = Generator(**{**generator_arguments(config, inputs), "speculation": speculation})
    await generator.start()
    try:
        return await measure(generator, policy, inputs.train.prompts[:pairs], betas)
    finally:
        await generator.stop()


def main(
    config: Annotated[Path, typer.Argument(metavar="CONFIG")],
    words: Annotated[list[str], typer.Argument(metavar="POLICY… key=value…")],
    betas: Annotated[str, typer.Option(help="With commas between them")] = "0.1,0.5,1",
    pairs: Annotated[int, typer.Option(min=2, help="Mixed pairs for each β.")] = 16,
    file: Annotated[Path | None, typer.Option("--results", help="File that gets the JSON as well.")] = None,
) -> None:
    """Print a table and one line of JSON."""
    overrides, policies = [w for w in words if "=" in w], [w for w in words if "=" not in w]
    rows: list[Acceptance] = []
    for policy in policies:
        try:
            rows += asyncio.run(of_policy(config, overrides, policy, pairs=pairs, betas=several(betas, float)))
        except PilafError as error:
            raise SystemExit(str(error)) from error
    table = Table("policy", "KL, nats a response", "β", "drafts kept", "tokens a reference forward", "judged")
    for row in rows:
        name = row.policy if len(row.policy) < 40 else f"…{row.policy[-39:]}"
        numbers = (
            f"{row.kl:.2f} ± {row.kl_error:.2f}",
            f"{row.beta:g}",
            f"{row.kept:.1%}",
            f"{row.tokens_per_pass:.1f}",
        )
        table.add_row(name, *numbers, str(row.judged))
    Console(stderr=True, width=140).print(table)
    told = {"machine": machine(), "overrides": overrides, "pairs": pairs, "results": [asdict(row) for row in rows]}
    print(json.dumps(told))
    if file is not None:
        file.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
