"""From the configuration to the reward model, and to the policy's optimisation against it."""

from collections.abc import Callable
from typing import Any

from pilaf_ray.config.algorithms import AdaptiveKlConfig, GrpoConfig, PpoConfig, RolloutAlgorithm
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.data.prompt_turns import PromptSource
from pilaf_ray.evaluation.reward_quality import RewardQuality
from pilaf_ray.pipeline.ports import GeneratorPort, RewardPort, RewardScorer, TokenScorer
from pilaf_ray.pipeline.reward_trainer import RewardStorePort, RewardTrainer
from pilaf_ray.pipeline.rollout_stream import RolloutStream
from pilaf_ray.pipeline.supervision import Report, no_report
from pilaf_ray.resource_plan import lora_settings, offload_settings
from pilaf_ray.role_formats import role_formats
from pilaf_ray.run_folder import RunFolder
from pilaf_ray.sampling.identity import derive_seed, pair_identity
from pilaf_ray.types import RolloutPlan


def reward_arguments(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """Arguments of :class:`pilaf_ray.engines.reward_learner.RewardLearner`, rank and rendezvous aside."""
    reward = config.reward_model
    assert reward is not None, "only a run with a reward model asks for its arguments"
    return {
        "model_path": reward.path or config.model.policy,
        "policy_path": config.model.policy,
        "world_size": reward.ranks,
        "zero_stage": reward.zero_stage,
        "precision": role_formats(config).reward,
        "learning_rate": reward.learning_rate,
        "head_learning_rate": reward.head_learning_rate,
        "warmup_steps": reward.warmup_steps,
        "weight_decay": reward.weight_decay,
        "betas": tuple(reward.adam_betas),
        "max_grad_norm": reward.max_grad_norm,
        "micro_batch_tokens": reward.micro_batch_tokens,
        "heads": reward.heads,
        "centering": reward.centering,
        "pooling": reward.pooling,
        "layers": reward.layers,
        "trainable_layers": reward.trainable_layers,
        "gradient_checkpointing": reward.gradient_checkpointing,
        "share_prompts": config.learner.share_prompts,
        "system_prompt": config.prompts.system_prompt,
        "max_length": config.model.max_length,
        "cpu_threads": reward.cpu_threads,
        "seed": config.run.seed,
        "dump_folder": folder.path / "failed_batches",
    }


def reward_trainer(
    config: RunConfig, reward: RewardPort, store: RewardStorePort, *, warn: Callable[[int, str], None]
) -> RewardTrainer:
    """What feeds and watches the reward model."""
    settings = config.reward_model
    assert settings is not None, "only a run with a reward model trains one"
    health, replay = settings.health, settings.replay
    return RewardTrainer(
        reward=reward,
        store=store,
        quality=RewardQuality(
            window_pairs=health.window_pairs, min_spread=health.min_spread, max_spread=health.max_spread
        ),
        window_pairs=replay.window_pairs,
        uses=replay.uses,
        held_out=replay.held_out,
        batch_pairs=settings.batch_pairs,
        steps_per_batch=settings.steps_per_batch,
        stop_when_unhealthy=health.action == "stop",
        warn=warn,
    )


def rollout_learner_arguments(
    config: RunConfig, algorithm: RolloutAlgorithm, *, precision: str, folder: RunFolder
) -> dict[str, Any]:
    """Arguments of :class:`pilaf_ray.engines.rollout_learner.RolloutLearner`, rank and rendezvous aside."""
    from pilaf_ray.losses.rollout_targets import AdvantageSettings

    learner, controller = config.learner, algorithm.kl_controller
    ppo = algorithm if isinstance(algorithm, PpoConfig) else None
    adaptive = controller if isinstance(controller, AdaptiveKlConfig) else None
    return {
        "model_path": config.model.policy,
        "lora": lora_settings(config),
        "sequence_parallel": learner.sequence_parallel,
        "world_size": learner.ranks,
        "zero_stage": learner.zero_stage,
        "precision": precision,
        "advantages": AdvantageSettings(
            kind=algorithm.type,  # type: ignore[attr-defined]  # each kind has its own
            group_size=algorithm.group_size,
            kl_in_reward=algorithm.kl_in == "reward",
            score_clip=algorithm.reward_clip,
            scale=algorithm.scale if isinstance(algorithm, GrpoConfig) else True,
            discount=ppo.gamma if ppo else 1.0,
            trace_decay=ppo.gae_lambda if ppo else 1.0,
            whiten_rewards=ppo.whiten_rewards if ppo else False,
            whiten_advantages=algorithm.whiten_advantages,
        ),
        "kl_coefficient": algorithm.beta,
        "kl_target": adaptive.target if adaptive else None,
        "kl_horizon": adaptive.horizon if adaptive else 1.0,
        "kl_estimator": algorithm.kl_estimator,
        "clip_low": algorithm.clip,
        "clip_high": algorithm.clip_high or algorithm.clip,
        "importance_cap": algorithm.importance_cap,
        "aggregation": algorithm.aggregation,
        "epochs": algorithm.epochs,
        "mini_batches": algorithm.mini_batches,
        "value": {**ppo.value.model_dump(exclude={"path"}), "model_path": ppo.value.path or config.model.policy}
        if ppo
        else None,
        "optimizer": {
            "learning_rate": learner.learning_rate,
            "lr_schedule": learner.lr_schedule,
            "warmup_steps": learner.warmup_steps,
            "total_steps": config.step_limit[0] * algorithm.epochs * algorithm.mini_batches,
            "weight_decay": learner.weight_decay,
            "betas": tuple(learner.adam_betas),
            "max_grad_norm": learner.max_grad_norm,
            "offload": offload_settings(config),
            "hybrid_ranks": learner.hybrid_ranks,
        },
        "micro_batch_tokens": learner.micro_batch_tokens,
        "logprob_chunk_tokens": learner.logprob_chunk_tokens,
        "gradient_checkpointing": learner.gradient_checkpointing,
        "share_prompts": learner.share_prompts,
        "cpu_threads": learner.cpu_threads,
        "seed": config.run.seed,
        "dump_folder": folder.path / "failed_batches",
    }


class RolloutPlanSource:
    """Rollout group number i of a run, for any i, in an order of prompts that is not that of the pairs."""

    def __init__(self, *, prompts: PromptSource, group_size: int, seed: int) -> None:
        self._seed = derive_seed(str(seed), "rollouts")
        self._cursor = prompts.cursor(seed=self._seed)
        self._group_size = group_size

    def plan(self, index: int) -> RolloutPlan:
        """The plan at ``index``, whatever was asked before."""
        turn = self._cursor.at(index)
        group_id = pair_identity(self._seed, turn.epoch, turn.prompt.prompt_id, turn.draw)
        seeds = tuple(derive_seed(group_id, f"response {number}") for number in range(self._group_size))
        return RolloutPlan(group_id=group_id, index=index, prompt=turn.prompt, seeds=seeds)


def rollout_stream(
    config: RunConfig,
    prompts: PromptSource,
    *,
    generator: GeneratorPort,
    reference: TokenScorer,
    reward: RewardScorer,
    start_step: int,
    report: Report = no_report,
) -> RolloutStream:
    """What samples and scores the policy's rollouts from step ``start_step + 1`` on."""
    algorithm = config.algorithm
    assert isinstance(algorithm, RolloutAlgorithm), "only optimising against a reward model needs rollouts"
    plans = RolloutPlanSource(prompts=prompts, group_size=algorithm.group_size, seed=config.run.seed)
    return RolloutStream(
        generator=generator,
        reference=reference,
        reward=reward,
        plan=plans.plan,
        batch_prompts=algorithm.batch_prompts,
        max_staleness_steps=config.pipeline.max_staleness_steps,
        start_step=start_step,
        max_steps=config.step_limit[0],
        report=report,
    )
