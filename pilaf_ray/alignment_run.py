"""``pilaf-ray align``: where each sampler's DPO gradient points, on a real model, beside the gradient of J."""

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pilaf_ray import build
from pilaf_ray.actors.cluster import ray_cluster
from pilaf_ray.actors.launch import RoleLauncher, RoleResources
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.model_store import local_model
from pilaf_ray.errors import ConfigError
from pilaf_ray.evaluation.alignment import Alignment, PromptResponses, ResponseSet, align, sampler_branches
from pilaf_ray.evaluation.checkpoints import PolicyFolder, find_policy
from pilaf_ray.observability.logs import close_logging, setup_logging
from pilaf_ray.provenance import made_with
from pilaf_ray.sampling.identity import derive_seed, pair_identity
from pilaf_ray.sampling.normalizers import log_z_sample
from pilaf_ray.types import GenerationRequest, Prompt, SampledResponse

Pools = dict[float, list[SampledResponse]]


def measure_alignment(
    checkpoint: Path,
    *,
    samplers: Sequence[str],
    prompts: int,
    samples: int,
    parameters: str | None = None,
    projections: int = 2**14,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Everything that was found, as plain data; ``table`` shows it.

    Raises:
        PilafError: with one line that says what is wrong and how to mend it.
    """
    console = console or Console()
    policy = find_policy(checkpoint)
    settings = _settings(policy, config, [*overrides, f"evaluation.prompts={prompts}"])
    beta = settings.algorithm.beta
    coefficients = mixing_coefficients(samplers, beta=beta)
    if samples < 4:
        raise ConfigError(f"--samples {samples}: two halves of two responses are the least: give 4 or more")
    inputs = build.build_inputs(settings)
    held_out = inputs.evaluation.prompts
    if len(held_out) < prompts:
        raise ConfigError(f"--prompts {prompts}: {settings.prompts.evaluation.path} has {len(held_out)} that fit")
    console.print(f"sampling {samples} responses for each of {len(coefficients)} coefficients", highlight=False)
    pools, rewards = _sampled(settings, inputs, coefficients, samples)
    # The engine's memory is free again before the gradients need theirs.
    measured, part = _measure(settings, held_out, pools, rewards, parameters, projections, console)
    return {
        "checkpoint": str(policy.model),
        "beta": beta,
        "prompts": prompts,
        "samples": samples,
        "gradient": part,
        "z_product": _mean_z(measured, beta),
        "results": [asdict(result) for result in _by_size(measured, samplers, beta=beta, samples=samples)],
        "estimates": "value with the limits of its 95 % bootstrap interval over prompts; null where it is not defined",
        "made_with": made_with(),
    }


def _settings(policy: PolicyFolder, config: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The configuration that names prompts, oracle and reference, with ``policy`` as the policy."""
    file = config or policy.run_config
    if file is None:
        raise ConfigError(f"{policy.model} belongs to no run: name prompts, oracle and reference with --config")
    settings = load_config(file, overrides)
    names = {"policy": str(policy.model), "reference": settings.model.reference_path}
    return settings.model_copy(update={"model": settings.model.model_copy(update=names)})


def mixing_coefficients(samplers: Sequence[str], *, beta: float) -> list[float]:
    """The coefficients with which responses must be sampled, the policy's own 0 always among them.

    Raises:
        ConfigError: a sampler is none whose pairs come from a fixed mixture.
    """
    wanted = {0.0}
    for name in samplers:
        try:
            branches = sampler_branches(name, beta=beta)
        except KeyError as error:
            raise ConfigError(
                f"--samplers: '{name}' has no fixed mixture: vanilla, hybrid, pilaf or t_pilaf"
            ) from error
        wanted.update(c for branch in branches for c in (branch.coefficient_a, branch.coefficient_b))
    return sorted(wanted)


def _by_size(
    measured: Sequence[PromptResponses], samplers: Sequence[str], *, beta: float, samples: int
) -> list[Alignment]:
    """From half of the responses and from all of them, so that one sees what more of them would change."""
    return [
        result
        for size in sorted({samples // 2, samples} - {2, 3})
        for result in align(measured, samplers=list(samplers), beta=beta, samples=size)
    ]


def _sampled(
    settings: RunConfig, inputs: build.RunInputs, coefficients: Sequence[float], samples: int
) -> tuple[list[Pools], list[dict[float, list[float]]]]:
    """What :func:`_sample` gives, on a cluster that ends with the call."""
    with tempfile.TemporaryDirectory(prefix="pilaf-align-") as logs:
        setup_logging("align", Path(logs))
        try:
            with ray_cluster(address=settings.resources.address, num_cpus=settings.total_cpus):
                return asyncio.run(_sample(settings, inputs, coefficients, samples, logs))
        finally:
            close_logging()


async def _sample(
    config: RunConfig, inputs: build.RunInputs, coefficients: Sequence[float], samples: int, logs: str
) -> tuple[list[Pools], list[dict[float, list[float]]]]:
    """Responses and their rewards, prompt by prompt and coefficient by coefficient."""
    launcher, r = RoleLauncher(logs=logs, call_seconds=config.pipeline.call_seconds), config.resources
    generators, oracle = await asyncio.gather(
        launcher.generators(
            build.generator_arguments(config, inputs),
            replicas=config.generation.replicas,
            resources=RoleResources(
                num_cpus=r.generator.cpus, num_gpus=r.generator.gpus, threads=config.generation.cpu_threads
            ),
        ),
        launcher.oracle(
            config.scoring_oracle.type,
            build.oracle_arguments(config.scoring_oracle, gpus=r.oracle.gpus),
            replicas=config.scoring_oracle.replicas,
            resources=RoleResources(num_cpus=r.oracle.cpus, num_gpus=r.oracle.gpus, threads=1),
        ),
    )

    async def one(prompt: Prompt, coefficient: float, draw: int) -> SampledResponse:
        identity = pair_identity(config.run.seed, 0, prompt.prompt_id, draw)
        return await generators.generate(
            GenerationRequest(
                request_id=f"align-{identity}-{coefficient:g}",
                prompt_token_ids=prompt.token_ids,
                coefficient=coefficient,
                seed=derive_seed(identity, f"align-{coefficient:g}"),
            )
        )

    async def pool(prompt: Prompt) -> tuple[Pools, dict[float, list[float]]]:
        drawn: Pools = {}
        for coefficient in coefficients:
            drawn[coefficient] = list(await asyncio.gather(*(one(prompt, coefficient, n) for n in range(samples))))
        rewards = {
            c: await oracle.score_texts([prompt.text] * samples, [response.text for response in responses])
            for c, responses in drawn.items()
        }
        return drawn, rewards

    answers = await asyncio.gather(*(pool(prompt) for prompt in inputs.evaluation.prompts))
    await generators.stop()
    return [drawn for drawn, _ in answers], [rewards for _, rewards in answers]


def _measure(
    config: RunConfig,
    prompts: Sequence[Prompt],
    pools: Sequence[Pools],
    rewards: Sequence[dict[float, list[float]]],
    parameters: str | None,
    projections: int,
    console: Console,
) -> tuple[list[PromptResponses], dict[str, Any]]:
    """Gradients of all responses, and what they are gradients of."""
    from pilaf_ray.engines.gradient_probe import GradientProbe

    probe = GradientProbe(
        policy_path=local_model(config.model.policy),
        reference_path=local_model(config.model.reference_path),
        parameters=parameters,
        projections=projections,
        threads=config.learner.cpu_threads,
    )
    beta, measured = config.algorithm.beta, []
    for number, (prompt, pool, scores) in enumerate(zip(prompts, pools, rewards, strict=True), start=1):
        console.print(f"gradients of prompt {number} of {len(prompts)}", highlight=False)
        sets, gradients = {}, {}
        for coefficient, responses in pool.items():
            found = [probe.measure(prompt.token_ids, response.token_ids) for response in responses]
            sets[coefficient] = ResponseSet(
                true_rewards=np.array(scores[coefficient]),
                implicit_rewards=np.array([beta * (f.policy_logprob - f.reference_logprob) for f in found]),
                log_z=np.array([log_z_sample(response) or 0.0 for response in responses]),
            )
            gradients[coefficient] = np.array([f.projected for f in found])
        measured.append(PromptResponses(sets=sets, gradients=gradients))
    part = {"parameters": probe.pattern, "count": probe.count, "projections": projections, "projection": "count sketch"}
    return measured, part


def _mean_z(measured: Sequence[PromptResponses], beta: float) -> float | None:
    """Mean over prompts of the estimates of Z⁺Z⁻; None where no sampler mixes."""
    if not all({beta, -beta} <= set(prompt.sets) for prompt in measured):
        return None
    products = [np.exp(p.sets[beta].log_z).mean() * np.exp(p.sets[-beta].log_z).mean() for p in measured]
    return float(np.mean(products))


def table(found: dict[str, Any]) -> Table:
    """A row a sampler and sample size."""
    part = found["gradient"]
    grid = Table("sampler", "responses", "cosine(−∇L, ∇J)", "‖∇L + κ∇J‖/‖∇L‖", "plain cosine")
    product = found["z_product"]
    grid.title = f"{found['checkpoint']}: {found['prompts']} prompts, β = {found['beta']:g}" + (
        "" if product is None else f", Z⁺Z⁻ ≈ {product:.2f}"
    )
    grid.caption = (
        f"gradients of {part['count']} parameters matching {part['parameters']} in {part['projections']} random "
        "projections; 95 % bootstrap intervals over prompts"
    )
    for row in found["results"]:
        result = Alignment(**row) if not isinstance(row, Alignment) else row
        cells = (_interval(result.cosine), _interval(result.residual), _interval(result.plain_cosine))
        grid.add_row(result.sampler, str(result.samples), *cells)
    return grid


def _interval(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return str(value)
