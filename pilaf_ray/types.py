"""The messages that cross a process border, and the words for them.

Every message is a frozen, keyword-only dataclass of plain Python data, so it
pickles, compares and prints. Tensors exist only after collation.

Token convention, stated once: ``token_ids`` of a response hold the generated
tokens only (no prompt, end-of-sequence included when the model produced it) and
are *not* shifted; ``logprobs[t]`` is the log-probability of ``token_ids[t]``
given the prompt and ``token_ids[:t]``. Log-probabilities are natural logarithms.

A pair has two sides, ``a`` and ``b``, fixed when it is planned. Which side is
*chosen* is known only once it is labelled.
"""

from dataclasses import dataclass, field
from enum import StrEnum

TokenPair = tuple[tuple[int, ...], tuple[int, ...]]
"""(prompt tokens, response tokens) of one sequence."""


class PairState(StrEnum):
    """Where a pair is in its life; see ``store/ledger.py`` for the arrows."""

    PLANNED = "planned"
    SAMPLED = "sampled"
    LABELED = "labeled"
    TRAINED = "trained"
    ABSTAINED = "abstained"
    REJECTED = "rejected"
    EXPIRED = "expired"


class FinishReason(StrEnum):
    """Why a response ended: the model stopped, or the length limit was reached."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt, rendered with the chat template and tokenised.

    Example: ``Prompt(prompt_id="p-17", text="Name a film.", token_ids=(1, 42, 7))``
    """

    prompt_id: str
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairPlan:
    """Everything that is random about one pair, drawn before any model runs.

    The fields are a function of (run seed, epoch, prompt id, draw) only, so the
    pair can be redone anywhere and comes out the same under the same weights.

    Example: ``plan_pair(sampler, prompt, seed=0, epoch=0, draw=0, index=0)``
    """

    pair_id: str
    index: int
    """Position in the run's order of plans, from 0."""
    prompt: Prompt
    branch: str
    """Name of the drawn branch, e.g. ``on_policy`` or ``interpolated``."""
    coefficient_a: float
    """Mixing coefficient c of side a: logits (1 + c)·policy − c·reference."""
    coefficient_b: float
    seed_a: int
    seed_b: int
    present_b_first: bool
    """Whether the oracle is shown b before a, so that position cannot leak the branch."""
    label_seed: int
    candidate_seeds: tuple[int, ...] = ()
    """Seeds of responses from π that the sampler may draw beside a and b, or instead of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One response to sample.

    Example: ``GenerationRequest(request_id="x-a", prompt_token_ids=(1, 2), coefficient=0.1, seed=3)``
    """

    request_id: str
    """The identity of the pair, or of whatever else the response belongs to, a dash, and which response it is."""
    prompt_token_ids: tuple[int, ...]
    coefficient: float
    seed: int

    @property
    def pair_id(self) -> str:
        """What the response belongs to."""
        return self.request_id.rpartition("-")[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionSpan:
    """Tokens ``start`` to ``end`` (exclusive) were sampled under policy ``version``."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledResponse:
    """A finished response and where it came from.

    Example: ``SampledResponse(token_ids=(5, 2), text="hi", coefficient=0.0,
    logprobs=(-0.3, -0.1), versions=(VersionSpan(version=0, start=0, end=2),),
    finish_reason=FinishReason.STOP)``
    """

    token_ids: tuple[int, ...]
    text: str
    coefficient: float
    logprobs: tuple[float, ...]
    """Behaviour log-probability of each token under the *mixed* distribution."""
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    policy_logprobs: tuple[float, ...] | None = None
    """log π of each token at temperature 1; None where the sampler did not see both networks apart."""
    reference_logprobs: tuple[float, ...] | None = None
    """log π_ref of each token at temperature 1; None likewise."""

    @property
    def min_policy_version(self) -> int:
        """The oldest policy version that sampled a token of this response."""
        return min(span.version for span in self.versions)

    @property
    def max_policy_version(self) -> int:
        """The newest policy version that sampled a token of this response."""
        return max(span.version for span in self.versions)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCost:
    """Cost of a pair, or the sum over many; expected costs are fractions."""

    sequence_forwards: float
    """Network passes over a sequence while sampling: one for π or π_ref, two for a mixture."""
    generated_tokens: float = 0.0
    """Tokens of every response that was sampled, also of those that are not in the pair."""
    scoring_forwards: float = 0.0
    """Passes that only score candidates, by π_ref or r̂; the paper does not count them."""
    labelled_responses: float
    """Responses that the oracle reads."""

    def __add__(self, other: "PairCost") -> "PairCost":
        """Sum of two costs."""
        return PairCost(
            sequence_forwards=self.sequence_forwards + other.sequence_forwards,
            generated_tokens=self.generated_tokens + other.generated_tokens,
            scoring_forwards=self.scoring_forwards + other.scoring_forwards,
            labelled_responses=self.labelled_responses + other.labelled_responses,
        )

    def scaled(self, factor: float) -> "PairCost":
        """The cost times a number."""
        return PairCost(
            sequence_forwards=self.sequence_forwards * factor,
            generated_tokens=self.generated_tokens * factor,
            scoring_forwards=self.scoring_forwards * factor,
            labelled_responses=self.labelled_responses * factor,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PairDraw:
    """What became of a plan: what was known only after its responses were sampled.

    Example: ``PairDraw(branch="on_policy", cost=PairCost(sequence_forwards=2, labelled_responses=2))``
    """

    branch: str
    cost: PairCost
    loss_weight: float = 1.0
    """Factor of the pair's loss."""
    log_z_a: float | None = None
    """log of an unbiased estimate of E_π[exp(+r)] that side a's draw gave; None where it gave none."""
    log_z_b: float | None = None
    """The same of E_π[exp(−r)] and side b."""
    candidate_a: int | None = None
    """Which of the plan's candidates became side a; None where side a was drawn as planned."""
    candidate_b: int | None = None
    scorer_version: int | None = None
    """Version of the reward model that scored the candidates, where one did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponsePair:
    """A planned pair with both responses sampled."""

    plan: PairPlan
    a: SampledResponse
    b: SampledResponse
    draw: PairDraw | None = None
    """How the responses came to be; None where nothing but the plan's two sides was drawn."""

    @property
    def branch(self) -> str:
        """The branch that was taken in the end."""
        return self.draw.branch if self.draw is not None else self.plan.branch

    @property
    def loss_weight(self) -> float:
        """Factor of the pair's loss."""
        return self.draw.loss_weight if self.draw is not None else 1.0

    @property
    def min_policy_version(self) -> int:
        """The oldest policy version in the pair; a pair's age is counted from it."""
        return min(self.a.min_policy_version, self.b.min_policy_version)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceLabel:
    """What an oracle said of a pair.

    Example: ``PreferenceLabel(pair_id="x", probability=1.0, source="function")``
    """

    pair_id: str
    probability: float | None
    """P(a ≻ b) in [0, 1]; ½ is a tie; None is an abstention."""
    source: str
    reward_a: float | None = None
    """Oracle's score of a, where it has one (log-odds scale); for monitoring only."""
    reward_b: float | None = None
    reason: str | None = None
    """Why the oracle abstained, in one line."""

    @property
    def is_abstention(self) -> bool:
        """Whether the oracle declined to answer."""
        return self.probability is None

    @property
    def is_tie(self) -> bool:
        """Whether both sides were judged equal."""
        return self.probability == 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceLogprobs:
    """log π_ref(y | x) of both sides, summed over response tokens."""

    pair_id: str
    a: float
    b: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LabeledPair:
    """A pair ready for the policy learner."""

    pair: ResponsePair
    label: PreferenceLabel
    reference: ReferenceLogprobs

    @property
    def pair_id(self) -> str:
        """Identity of the underlying plan."""
        return self.pair.plan.pair_id

    @property
    def probability(self) -> float:
        """P(a ≻ b), which every pair has that is trained on."""
        assert self.label.probability is not None, "an abstained pair is never trained on"
        return self.label.probability


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutPlan:
    """A prompt that the policy is to answer ``len(seeds)`` times, for its own optimisation.

    A function of (run seed, epoch, prompt id) and the run's order of rollouts, which is
    another one than that of the pairs.

    Example: ``RolloutPlan(group_id="x", index=0, prompt=prompt, seeds=(3, 4))``
    """

    group_id: str
    index: int
    """Position in the run's order of rollout groups, from 0."""
    prompt: Prompt
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringItem:
    """A response to score with the reward model, as tokens and as text.

    Tokens are those of the policy's tokenizer; a reward model with a tokenizer of its
    own reads the texts.

    Example: ``ScoringItem(prompt=prompt, token_ids=(5, 2), text="hi")``
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardScores:
    """r̂ of responses, in order, and the version of r̂ that gave them: its optimiser steps so far.

    Values lie on the Bradley–Terry log-odds scale; only differences between responses
    to one prompt have a meaning.
    """

    version: int
    values: tuple[float, ...]
    heads: tuple[tuple[float, ...], ...] = ()
    """What each head gave each response, where there are several; ``values`` are their means."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredGroup:
    """Responses to one prompt, sampled from π, with everything that the policy's step needs."""

    plan: RolloutPlan
    responses: tuple[SampledResponse, ...]
    scores: RewardScores
    """r̂ of each response, and the version of r̂ that said so."""
    reference_logprobs: tuple[tuple[float, ...], ...]
    """log π_ref of each token of each response, at temperature 1."""

    @property
    def min_policy_version(self) -> int:
        """The oldest policy version in the group; its age is counted from it."""
        return min(response.min_policy_version for response in self.responses)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardStepResult:
    """What one optimiser step of the reward model reports; the last two as of ``OptimizerStep``."""

    version: int
    """Version of the weights after the step."""
    loss: float
    """Mean Bradley–Terry loss of the batch, under the weights before the step."""
    margins: tuple[float, ...]
    """r̂(a) − r̂(b) of each pair of the batch, under the weights before the step."""
    grad_norm: float
    loss_scale: float | None = None
    skipped: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one optimiser step reports; ``metrics`` are plain means over the batch.

    A name without a slash belongs to the policy's training and is reported as ``train/<name>``.
    """

    step: int
    loss: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftCounts:
    """What became of tokens that the policy drafted for mixed responses, since a generator's start.

    Example: ``DraftCounts(drafted=16, judged=12, kept=10, passes=2)``
    """

    drafted: int
    """Tokens that the policy proposed."""
    judged: int
    """Drafts that were kept or replaced, each by one token of a response; the others stood behind a replaced one."""
    kept: int
    passes: int
    """Reference forwards that judged drafts, counted once for each request in them."""

    @property
    def acceptance(self) -> float:
        """Part of judged drafts that were kept: 1 minus the mean total variation between policy and mixture."""
        return self.kept / self.judged if self.judged else 1.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens of a response from one reference forward, on average."""
        return self.judged / self.passes if self.passes else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleUsage:
    """Busy seconds and peak resident memory (MiB) of one replica of a role."""

    role: str
    busy_seconds: float
    peak_memory_mib: float
