"""The configuration of a run. Strict: an unknown or contradictory key is an error.

Hand-written configurations are YAML; the resolved one is saved as JSON beside the run.
"""

from math import lcm
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pilaf_ray.config.algorithms import AlgorithmConfig, DpoConfig, PpoConfig, RolloutAlgorithm
from pilaf_ray.config.base import Section
from pilaf_ray.config.checkpoint import CheckpointSection
from pilaf_ray.config.console import ConsoleSection
from pilaf_ray.config.generation import GenerationSection
from pilaf_ray.config.guards import GuardsSection, check_guards, idle_guards
from pilaf_ray.config.learner import LearnerSection
from pilaf_ray.config.limits import (
    NO_STEP_LIMIT,
    IterativeScheduleConfig,
    OnlineScheduleConfig,
    RunSection,
    ScheduleConfig,
    round_steps,
    step_limit,
)
from pilaf_ray.config.model import ModelSection
from pilaf_ray.config.oracle import (
    FunctionOracleConfig,
    MixtureOracleConfig,
    OracleConfig,
    RewardModelOracleConfig,
    ScoringOracleConfig,
)
from pilaf_ray.config.prompts import PromptsSection
from pilaf_ray.config.resources import ResourcesSection, check_transport, check_turns
from pilaf_ray.config.reward_model import RewardModelSection
from pilaf_ray.config.samplers import SamplerConfig, check_sampler, labels_per_pair
from pilaf_ray.config.store import StoreSection
from pilaf_ray.config.submission import SubmissionSection
from pilaf_ray.config.supervision import SupervisionSection

_SCORING = (FunctionOracleConfig, RewardModelOracleConfig)


class ReferenceSection(Section):
    """The reference model's scorer."""

    replicas: int = Field(default=1, ge=1)
    """Number of replicas."""
    micro_batch_tokens: int = Field(default=2048, ge=1)
    """Padded tokens of one forward."""
    cpu_threads: int = Field(default=1, ge=1)
    """Threads on a CPU."""
    reuse_sampled: bool = True
    """Take log π_ref of mixed responses from the generator, which computed it to sample them."""


class PipelineSection(Section):
    """How the roles overlap."""

    max_staleness_steps: int = Field(default=1, ge=0)
    """No trained pair is older, in policy versions; 0 is synchronous. Online only: rounds bound ages themselves."""
    label_batch_pairs: int = Field(default=4, ge=1)
    """Pairs that go to the oracle and the reference at once."""
    fail_fast: bool = False
    """A pair that the generator refuses, or answers without a token, ends the run; else it is rejected and replaced."""
    call_seconds: float = Field(default=600.0, gt=0)
    """Deadline of a call to any role, from its start or from when the role last got on with its work."""


class WeightsSection(Section):
    """How new weights reach the generators."""

    transport: Literal["shared_memory", "gloo", "nccl", "filesystem"] = "filesystem"
    """shared_memory needs generators on the node of the learner's first rank, gloo a network path between them and it,
    nccl GPUs of their own, filesystem a shared folder.

    The shared folder is also the second way, where a transfer over one of the others fails.
    """
    deadline_seconds: float = Field(default=120.0, gt=0)
    """For each phase of an update."""
    probe_tolerance: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """Largest difference of a token's log-probability, engine against learner; null to skip.

    auto is 0.05 in float32 and 0.5 in 16 bits: bfloat16's rounding alone moves single tokens by 0.2.
    """
    relay: bool = False
    """Generators pass weights on to each other (gloo, nccl), so that the learner sends them once.

    A generator that dies meanwhile fails the transfer for all, and they read the shared folder.
    """
    recompute_caches: bool = False
    """Whether responses under way are given fresh KV caches of new weights, or keep what the old ones left."""


class EvaluationSection(Section):
    """Held-out evaluation."""

    prompts: int = Field(default=64, ge=2)
    """Number of held-out prompts."""
    every_steps: int = Field(default=0, ge=0)
    """0: at the start and at the end only."""
    sample_prompts: int = Field(default=3, ge=0)
    """Prompts shown with their answers in the report."""
    oracle: ScoringOracleConfig | None = None
    """Gives the held-out rewards where the run's own oracle cannot score single responses, as people and judges."""


class LoggingSection(Section):
    """Where curves go."""

    wandb: Literal["auto", "offline", "disabled"] = "disabled"
    """auto: online where logged in, offline otherwise."""
    wandb_project: str = "pilaf-ray"
    """Project name."""
    wandb_checkpoints: bool = False
    """Keep the policy of each checkpoint as a version of a wandb artifact."""
    tensorboard: bool = False
    """Write event files into the run folder's tensorboard/; tensorboard --logdir shows all runs of a folder."""
    prometheus: bool = False
    """Set Ray gauges at every step, and say in run.folder/.prometheus/ where Prometheus finds them."""
    trace: bool = False
    """Write every call to a role into the run folder's trace.json, for Perfetto (ui.perfetto.dev) or chrome://tracing."""


class RunConfig(Section):
    """A whole run."""

    run: RunSection
    model: ModelSection
    prompts: PromptsSection
    sampler: SamplerConfig
    schedule: ScheduleConfig = OnlineScheduleConfig()
    generation: GenerationSection
    reference: ReferenceSection = ReferenceSection()
    oracle: OracleConfig
    algorithm: AlgorithmConfig = DpoConfig()
    learner: LearnerSection
    reward_model: RewardModelSection | None = None
    """A reward model that trains beside the policy; none when left out."""
    pipeline: PipelineSection = PipelineSection()
    weights: WeightsSection = WeightsSection()
    store: StoreSection = StoreSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    logging: LoggingSection = LoggingSection()
    resources: ResourcesSection = ResourcesSection()
    guards: GuardsSection = GuardsSection()
    supervision: SupervisionSection = SupervisionSection()
    submission: SubmissionSection = SubmissionSection()
    console: ConsoleSection = ConsoleSection()

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        needed = self.prompts.max_prompt_tokens + self.generation.max_new_tokens
        if needed > self.model.max_length:
            raise ValueError(
                f"prompts.max_prompt_tokens + generation.max_new_tokens = {needed} exceeds "
                f"model.max_length = {self.model.max_length}: raise the last or lower one of the first two"
            )
        return self

    @model_validator(mode="after")
    def _transport_reaches_generators(self) -> Self:
        check_transport(self.resources, self.weights.transport)
        return self

    @model_validator(mode="after")
    def _turns_can_be_taken(self) -> Self:
        check_turns(
            self.resources,
            rollouts=self._rollouts,
            transport=self.weights.transport,
            to_disk="nvme" in (self.learner.offload.optimizer, self.learner.offload.parameters),
        )
        return self

    @model_validator(mode="after")
    def _guards_can_help(self) -> Self:
        check_guards(self.guards, rollouts=self._rollouts)
        return self

    @model_validator(mode="after")
    def _sampler_fits(self) -> Self:
        exact = self.generation.temperature == 1 and self.generation.top_p == 1
        check_sampler(self.sampler, loss_beta=self.algorithm.beta, oracle=self.oracle, exact_sampling=exact)
        return self

    @model_validator(mode="after")
    def _heads_can_disagree(self) -> Self:
        heads = 0 if self.reward_model is None else self.reward_model.heads
        if isinstance(self.oracle, MixtureOracleConfig) and self.oracle.disagreement is not None and heads < 2:
            raise ValueError(
                "oracle.disagreement compares the heads of a reward model that is trained in the run: "
                "set reward_model.heads to 2 or more, e.g. 8, or leave oracle.disagreement out"
            )
        return self

    @model_validator(mode="after")
    def _reward_model_is_there(self) -> Self:
        if self.reward_model is not None:
            return self
        mend = "add a section reward_model: {}"
        if isinstance(self.algorithm, RolloutAlgorithm):
            raise ValueError(
                f"algorithm.type: {self.algorithm.type} optimises the policy against a reward model: {mend}, "
                "or set algorithm.type: dpo"
            )
        if getattr(self.sampler, "scorer", None) == "reward_model":
            raise ValueError(
                f"sampler.scorer: reward_model needs a reward model that is trained in the run: {mend}, "
                "or set sampler.scorer: implicit_reward"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_are_the_policys_own(self) -> Self:
        exact = self.generation.temperature == 1 and self.generation.top_p == 1
        if isinstance(self.algorithm, RolloutAlgorithm) and not exact:
            raise ValueError(
                f"algorithm.type: {self.algorithm.type} needs π's own log-probabilities from sampling: "
                "set generation.temperature and generation.top_p to 1"
            )
        if isinstance(self.algorithm, RolloutAlgorithm) and isinstance(self.schedule, IterativeScheduleConfig):
            raise ValueError(
                f"schedule.type: iterative freezes the policy for a round, and algorithm.type: {self.algorithm.type} "
                "needs rollouts of the newest: set schedule.type: online, or algorithm.type: dpo"
            )
        return self

    @model_validator(mode="after")
    def _adapters_keep_their_reference(self) -> Self:
        if self.model.lora and isinstance(self.schedule, IterativeScheduleConfig) and self.schedule.reset_reference:
            raise ValueError(
                "schedule.reset_reference gives each round another reference, and model.lora adapts one: set "
                "schedule.reset_reference: false, or leave model.lora out"
            )
        return self

    @model_validator(mode="after")
    def _all_of_the_learner_is_parted(self) -> Self:
        if self.learner.sequence_parallel > 1 and isinstance(self.algorithm, PpoConfig):
            raise ValueError(
                "learner.sequence_parallel parts the policy, and the value model of algorithm.type: ppo has no part in "
                "it: set learner.sequence_parallel: 1, or algorithm.type: rloo"
            )
        return self

    @model_validator(mode="after")
    def _quantised_weights_stay_whole(self) -> Self:
        quantised = self.model.lora is not None and self.model.lora.quantise is not None
        if quantised and self.learner.zero_stage == 3:
            raise ValueError(
                "model.lora.quantise packs weights into bytes, which ZeRO-3 cannot part: set learner.zero_stage: 2, or "
                "leave model.lora.quantise out"
            )
        return self

    @model_validator(mode="after")
    def _ends(self) -> Self:
        steps, _ = self.step_limit
        other = self.run.max_generated_tokens is not None or self.run.max_seconds is not None
        if steps == NO_STEP_LIMIT and not other:
            raise ValueError(
                "nothing ends the run: set run.max_steps, run.max_labels, run.max_generated_tokens or run.max_seconds"
            )
        if steps == NO_STEP_LIMIT and self.learner.lr_schedule != "constant":
            raise ValueError(
                f"learner.lr_schedule: {self.learner.lr_schedule} must know the last step: set run.max_steps or "
                "run.max_labels"
            )
        return self

    @property
    def _rollouts(self) -> str | None:
        """The algorithm's name where the policy learns from rollouts; None where from pairs."""
        return self.algorithm.type if isinstance(self.algorithm, RolloutAlgorithm) else None

    @property
    def step_limit(self) -> tuple[int, str]:
        """The last optimiser step, and the setting that it comes from; tokens and time may end the run before."""
        return step_limit(
            self.run,
            self.schedule,
            batch_pairs=self.learner.batch_pairs,
            pair_labels=labels_per_pair(self.sampler),
        )

    @property
    def max_age_steps(self) -> int:
        """No trained pair is older, in optimiser steps between the policy that sampled it and the one it trains."""
        if isinstance(self.schedule, IterativeScheduleConfig):
            return round_steps(self.schedule, self.learner.batch_pairs) - 1
        return self.pipeline.max_staleness_steps

    @property
    def departures_from_theory(self) -> list[str]:
        """Settings that are allowed but leave what the theory assumes; one line each."""
        lines = []
        if self.generation.temperature != 1 or self.generation.top_p != 1:
            lines.append("generation.temperature and generation.top_p: the theory of the samplers needs 1 and 1")
        if getattr(self.sampler, "beta", None) not in (None, self.algorithm.beta):
            lines.append(f"sampler.beta differs from algorithm.beta = {self.algorithm.beta:g}: the theory needs one β")
        return lines

    @property
    def idle_settings(self) -> list[str]:
        """Settings that cannot do anything beside the others; one line each."""
        best, saved, judged = self.checkpoint.keep_best, self.checkpoint.every_steps, self.evaluation.every_steps
        meets = judged > 0 and (
            isinstance(self.schedule, IterativeScheduleConfig) or lcm(saved, judged) < self.step_limit[0]
        )
        lines = idle_guards(self.guards, rollouts=self._rollouts)
        if best > 0 and not meets:
            lines.append(
                f"checkpoint.keep_best = {best} has nothing to choose by: no checkpoint before the last is evaluated; "
                f"set evaluation.every_steps to {saved}, say"
            )
        return lines

    @model_validator(mode="after")
    def _devices_suffice(self) -> Self:
        gpus, workers = self.resources.generator.gpus, self.generation.tensor_parallel_size
        if gpus and self.generation.speculation is not None:
            raise ValueError(
                "generation.speculation works on CPUs only: leave it out, or set resources.generator.gpus: 0"
            )
        if gpus and gpus < workers:
            raise ValueError(
                f"resources.generator.gpus = {gpus:g} is less than generation.tensor_parallel_size = {workers}: "
                "a generator needs a GPU for each worker"
            )
        return self

    @model_validator(mode="after")
    def _elastic_generators_take_room(self) -> Self:
        elastic, generator = self.generation.elastic, self.resources.generator
        if elastic is None:
            return self
        if not elastic.least <= self.generation.replicas <= elastic.most:
            raise ValueError(
                f"generation.replicas: {self.generation.replicas} is not within generation.elastic: "
                f"{elastic.least} to {elastic.most}"
            )
        if self.resources.turns:
            raise ValueError("generation.elastic: generators that share devices in turns stay where they are: drop one")
        if not (generator.cpus or generator.gpus or generator.memory_gib):
            raise ValueError(
                "generation.elastic: generators that reserve nothing fit everywhere for ever: "
                "set resources.generator.cpus or gpus"
            )
        return self

    @model_validator(mode="after")
    def _something_scores(self) -> Self:
        if self.evaluation.oracle is None and not isinstance(self.oracle, _SCORING):
            raise ValueError(
                f"oracle.type: {self.oracle.type} gives no rewards of single responses: say with evaluation.oracle "
                "what scores the held-out answers, e.g. a function or a reward model"
            )
        return self

    @property
    def scoring_oracle(self) -> ScoringOracleConfig:
        """What gives rewards of single responses."""
        if self.evaluation.oracle is not None:
            return self.evaluation.oracle
        assert isinstance(self.oracle, _SCORING)
        return self.oracle

    @property
    def serves_console(self) -> bool:
        """Whether the run serves the console."""
        return self.oracle.asks_people if self.console.serve is None else self.console.serve

    @property
    def total_cpus(self) -> float:
        """Logical CPUs that all roles together ask for."""
        r = self.resources
        return (
            r.generator.cpus * self.generation.replicas
            + r.learner.cpus * self.learner.ranks
            + r.reference.cpus * self.reference.replicas
            + r.oracle.cpus * self.scoring_oracle.replicas
            + (r.reward.cpus * self.reward_model.ranks if self.reward_model else 0.0)
        )
