"""``pilaf-ray evaluate``: checkpoints on held-out prompts, with the roles that training uses."""

import asyncio
import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from pilaf_ray import build
from pilaf_ray.actors.cluster import ray_cluster
from pilaf_ray.actors.generators import GeneratorPool
from pilaf_ray.actors.handles import OraclePool, ReferencePool
from pilaf_ray.actors.launch import RoleLauncher, RoleResources
from pilaf_ray.actors.saved_policies import SavedPolicies
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.oracle import (
    ArgmaxRuleConfig,
    HumanOracleConfig,
    JudgeOracleConfig,
    MachineOracleConfig,
    MixtureOracleConfig,
    OracleConfig,
    ScoringOracleConfig,
)
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.generator_checks import check_models, check_tokenizers
from pilaf_ray.engines.model_store import local_model
from pilaf_ray.errors import ConfigError, PromptError
from pilaf_ray.evaluation.checkpoints import PolicyFolder, find_policy
from pilaf_ray.evaluation.evaluator import Evaluator
from pilaf_ray.evaluation.measures import PolicyMeasures, both_orders, measure, win_rate
from pilaf_ray.evaluation.report import EvaluationResult
from pilaf_ray.evaluation.statistics import Interval
from pilaf_ray.evaluation.verdicts import verdict_pairs
from pilaf_ray.observability.logs import close_logging, setup_logging
from pilaf_ray.provenance import made_with

REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Everything that an evaluation found."""

    policies: dict[str, PolicyMeasures]
    win_rates: dict[str, dict[str, Interval | None]]
    """``win_rates[a][b]``: how often the judge prefers a's response to b's."""
    results: dict[str, EvaluationResult]
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain data, with every response beside the estimates."""
        told = "value with the limits of its 95 % bootstrap interval over prompts; null where it is not defined"
        return {"estimates": told, "made_with": made_with(), **asdict(self)}


def evaluate(
    checkpoints: Sequence[Path],
    *,
    config: Path | None,
    overrides: Sequence[str] = (),
    prompts: int | None = None,
    samples: int = 2,
    judge: str | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Evaluate ``checkpoints`` and the reference beside them.

    Raises:
        PilafError: with one line that says what is wrong and how to mend it.
    """
    console = console or Console()
    policies = [find_policy(path) for path in checkpoints]
    names = [policy.name for policy in policies]
    if len(set(names)) < len(names) or REFERENCE in names:
        policies = [_renamed(policy) for policy in policies]
    settings = _settings(policies, config, overrides, prompts)
    judge_config = judge_section(judge) if judge is not None else settings.scoring_oracle
    inputs = build.build_inputs(settings)
    reference = local_model(settings.model.reference_path, weights=False)
    for policy in policies:
        check_models(str(policy.model), reference, max_model_len=settings.model.max_length)
        check_tokenizers(str(policy.model), reference)
    found = len(inputs.evaluation.prompts)
    if prompts is not None and found < prompts:
        raise PromptError(
            f"asked for {prompts} held-out prompts, {settings.prompts.evaluation.path} has {found} that fit: "
            f"pass --prompts {found} or fewer"
        )
    with tempfile.TemporaryDirectory(prefix="pilaf-evaluate-") as logs:
        setup_logging("evaluate", Path(logs))
        try:
            with ray_cluster(address=settings.resources.address, num_cpus=settings.total_cpus + 1):
                job = _EvaluationJob(settings, inputs, judge_config, samples, Path(logs), console)
                return asyncio.run(job.run(policies))
        finally:
            close_logging()


def _renamed(policy: PolicyFolder) -> PolicyFolder:
    return PolicyFolder(name=str(policy.model), model=policy.model, step=policy.step, run=policy.run)


def _settings(
    policies: Sequence[PolicyFolder], config: Path | None, overrides: Sequence[str], prompts: int | None
) -> RunConfig:
    """The configuration that says which prompts, oracle and reference are used for all policies."""
    paths = [config] if config is not None else [policy.run_config for policy in policies]
    first = paths[0]
    if first is None:
        raise ConfigError(f"{policies[0].model} belongs to no run: name prompts, oracle and reference with --config")
    wanted = [*overrides, *([f"evaluation.prompts={prompts}"] if prompts is not None else [])]
    settings = load_config(first, wanted)
    for path in paths[1:]:
        other = load_config(path, wanted) if path is not None else settings
        if other.model.reference_path != settings.model.reference_path or other.oracle != settings.oracle:
            raise ConfigError(f"{path} has another reference or oracle than {first}: choose one with --config")
    return settings


def judge_section(text: str) -> MachineOracleConfig:
    """The oracle of ``--judge``.

    Raises:
        ConfigError: it is no oracle's section, or names people: they are asked in a run, with a ledger and a console.
    """
    try:
        judge: OracleConfig = TypeAdapter(OracleConfig).validate_python(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--judge: give an oracle section, e.g. '{{type: function, target: …}}' ({reason})"
        ) from error
    if isinstance(judge, HumanOracleConfig | MixtureOracleConfig):
        raise ConfigError(
            f"--judge: type: {judge.type} asks people, who can be asked in a run only; give one of function, "
            "reward_model and judge"
        )
    return judge


def _judge_cost(answers: Path) -> dict[str, float] | None:
    """Calls, tokens and money that a judge has cost, as its newest answer says; None of other oracles."""
    if not answers.is_file():
        return None
    cost: dict[str, float] = json.loads(answers.read_text().splitlines()[-1])["cost"]
    return cost


class _EvaluationJob:
    """Starts reference and oracles once, and generators once for all checkpoints."""

    def __init__(
        self,
        config: RunConfig,
        inputs: build.RunInputs,
        judge: MachineOracleConfig,
        samples: int,
        logs: Path,
        console: Console,
    ) -> None:
        self._config, self._inputs = config, inputs
        # Who wins is asked without the noise that labels for training are drawn with.
        has_rule = "label_rule" in type(judge).model_fields
        self._judge = judge.model_copy(update={"label_rule": ArgmaxRuleConfig()}) if has_rule else judge
        self._samples, self._console = samples, console
        # In a file, so that a judge that is started anew pays for no answer twice.
        self._answers = logs / "judge.jsonl"
        self._launcher = RoleLauncher(logs=str(logs), call_seconds=config.pipeline.call_seconds)

    async def run(self, policies: Sequence[PolicyFolder]) -> Evaluation:
        """Everything about ``policies``, and about the reference."""
        self._console.print("loading reference and oracle", highlight=False)
        reference, oracle, judge = await asyncio.gather(
            self._reference(), self._scorer(self._config.scoring_oracle), self._start_judge()
        )
        results: dict[str, EvaluationResult] = {}
        saved = SavedPolicies(self._generators, deadline_seconds=self._config.weights.deadline_seconds)
        for policy in policies:
            self._console.print(f"evaluating {policy.name}", markup=False, highlight=False)
            generators = await saved.serve(policy.model)
            evaluator = Evaluator(
                prompts=self._inputs.evaluation.prompts,
                generator=generators,
                reference=reference,
                oracle=oracle,
                seed=self._config.run.seed,
                samples=self._samples,
                batches_at_once=self._config.reference.replicas,
            )
            results[policy.name] = await evaluator.evaluate(policy.step)
            if REFERENCE not in results:
                results[REFERENCE] = await evaluator.evaluate(0, coefficient=-1.0)
        await saved.stop()
        beta = self._config.algorithm.beta
        win_rates = await self._win_rates(judge, results)
        return Evaluation(
            policies={name: measure(result, beta=beta) for name, result in results.items()},
            win_rates=win_rates,
            results=results,
            settings={
                "beta": beta,
                "prompts": self._config.prompts.evaluation.path,
                "samples_a_prompt": self._samples,
                "seed": self._config.run.seed,
                "reference": self._config.model.reference_path,
                "oracle": self._config.oracle.model_dump(),
                "judge": self._judge.model_dump(),
                "judge_cost": _judge_cost(self._answers),
            },
        )

    async def _generators(self, policy: Path) -> GeneratorPool:
        model = self._config.model.model_copy(
            update={"policy": str(policy), "reference": self._config.model.reference_path}
        )
        config, asked = self._config.model_copy(update={"model": model}), self._config.resources.generator
        return await self._launcher.generators(
            # Whole policies are served, where an engine of one base would take adapters only.
            build.generator_arguments(config, self._inputs) | {"shares_base": False},
            replicas=config.generation.replicas,
            resources=RoleResources(num_cpus=asked.cpus, num_gpus=asked.gpus, threads=config.generation.cpu_threads),
        )

    async def _reference(self) -> ReferencePool:
        config, asked = self._config.reference, self._config.resources.reference
        return await self._launcher.reference(
            build.reference_arguments(self._config, self._inputs),
            replicas=config.replicas,
            resources=RoleResources(num_cpus=asked.cpus, num_gpus=asked.gpus, threads=config.cpu_threads),
        )

    async def _start_judge(self) -> OraclePool:
        if not isinstance(self._judge, JudgeOracleConfig):
            return await self._scorer(self._judge)
        # It waits for its endpoint and computes nothing. One replica: both orders of a pair share its answers.
        return await self._launcher.oracle(
            self._judge.type,
            build.oracle_arguments(self._judge, gpus=0, memory=self._answers),
            replicas=1,
            resources=RoleResources(num_cpus=0, num_gpus=0, threads=1),
            name="judge",
        )

    async def _scorer(self, oracle: ScoringOracleConfig) -> OraclePool:
        asked = self._config.resources.oracle
        return await self._launcher.oracle(
            oracle.type,
            build.oracle_arguments(oracle, gpus=asked.gpus),
            replicas=oracle.replicas,
            resources=RoleResources(num_cpus=asked.cpus, num_gpus=asked.gpus, threads=1),
        )

    async def _win_rates(
        self, judge: OraclePool, results: dict[str, EvaluationResult]
    ) -> dict[str, dict[str, Interval | None]]:
        rates: dict[str, dict[str, Interval | None]] = {name: {} for name in results}
        for ours, theirs in itertools.combinations(results, 2):
            shown_first, shown_second = verdict_pairs(results[ours], results[theirs])
            first, second = await asyncio.gather(judge.label(shown_first), judge.label(shown_second))
            preferences = [both_orders(a.probability, b.probability) for a, b in zip(first, second, strict=True)]
            rates[ours][theirs] = win_rate(preferences, self._samples)
            mirrored = [None if p is None else 1 - p for p in preferences]
            rates[theirs][ours] = win_rate(mirrored, self._samples)
        return rates


def table(evaluation: Evaluation) -> Table:
    """A column a policy, a row a measure."""
    grid = Table("", *evaluation.policies, title=f"held-out prompts: {evaluation.settings['prompts']}")
    columns = list(evaluation.policies.values())
    beta = evaluation.settings["beta"]
    rows = [
        ("gold reward R", "reward"),
        ("KL, nats", "kl"),
        ("KL, low variance", "kl_low_variance"),
        (f"J = R − {beta:g}·KL", "objective"),
        ("tokens a response", "length"),
        ("distinct-1", "distinct_1"),
        ("distinct-2", "distinct_2"),
    ]
    for title, field in rows:
        grid.add_row(title, *(str(getattr(column, field)) for column in columns))
    grid.add_row("distinct-2, all texts", *(f"{column.corpus_distinct_2:.3f}" for column in columns))
    for title, field in (("r̂ accuracy", "accuracy"), ("r̂ calibration error", "calibration_error")):
        found = [column.implicit_reward for column in columns]
        grid.add_row(title, *("–" if reward is None else str(getattr(reward, field)) for reward in found))
    for rival in evaluation.policies:
        rates = [evaluation.win_rates[name].get(rival) for name in evaluation.policies]
        grid.add_row(f"wins against {rival}", *("–" if rate is None else str(rate) for rate in rates))
    return grid
