"""Settings of the preference oracles."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pilaf_ray.config.base import Dtype, ModelName, Section


class BradleyTerryRuleConfig(Section):
    """A label drawn with probability σ((r_a − r_b) / temperature)."""

    type: Literal["bradley_terry"] = "bradley_terry"
    """Discriminator."""
    temperature: float = Field(default=1.0, gt=0)
    """Label noise: higher is noisier."""


class ArgmaxRuleConfig(Section):
    """The higher reward wins; equal rewards are a tie."""

    type: Literal["argmax"] = "argmax"
    """Discriminator."""


class SoftRuleConfig(Section):
    """The probability itself is the label."""

    type: Literal["soft"] = "soft"
    """Discriminator."""


LabelRuleConfig = Annotated[BradleyTerryRuleConfig | ArgmaxRuleConfig | SoftRuleConfig, Field(discriminator="type")]


class FunctionOracleConfig(Section):
    """A Python function that scores texts or compares pairs."""

    type: Literal["function"] = "function"
    """Discriminator."""
    target: str = Field(pattern=r"^[\w.]+:\w+$")
    """Importable function, package.module:callable."""
    kind: Literal["score", "compare"] = "score"
    """score(prompts, responses) -> rewards, or compare(prompts, a, b) -> P(a preferred) or None."""
    scale: float = Field(default=1.0, gt=0)
    """Multiplies rewards, so that they are log-odds."""
    replicas: int = Field(default=1, ge=1)
    """Number of replicas."""
    label_rule: LabelRuleConfig = BradleyTerryRuleConfig()
    """From rewards to a label."""

    @property
    def asks_people(self) -> bool:
        """Whether pairs go to people."""
        return False


class RewardModelOracleConfig(Section):
    """A sequence-classification model with one output."""

    type: Literal["reward_model"] = "reward_model"
    """Discriminator."""
    path: ModelName
    """Folder, hub id, or URL of a folder, which each node fetches once."""
    dtype: Dtype = "auto"
    """Number format."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs."""
    max_length: int = Field(default=1024, ge=8)
    """Longest text, in tokens."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Texts of one forward."""
    cpu_threads: int = Field(default=1, ge=1)
    """Threads on a CPU."""
    chat_template: bool = True
    """Render prompt and response with the model's own chat template."""
    replicas: int = Field(default=1, ge=1)
    """Number of replicas."""
    label_rule: LabelRuleConfig = BradleyTerryRuleConfig()
    """From rewards to a label."""

    @property
    def asks_people(self) -> bool:
        """Whether pairs go to people."""
        return False


Choice = Literal["a_much", "a", "a_slightly", "equal", "b_slightly", "b", "b_much", "both_bad"]
CHOICES: dict[Choice, float | None] = {
    "a_much": 0.98,
    "a": 0.88,
    "a_slightly": 0.68,
    "equal": 0.5,
    "b_slightly": 0.32,
    "b": 0.12,
    "b_much": 0.02,
    "both_bad": None,
}


class GoldConfig(Section):
    """Questions with known answers, mixed in without being marked."""

    path: str
    """A .jsonl file: prompt, response_a, response_b and preferred, which is a or b."""
    share: float = Field(default=0.1, gt=0, lt=1)
    """Share of an annotator's questions."""


class HumanOracleConfig(Section):
    """People, on the labelling page of the console."""

    type: Literal["human"] = "human"
    """Discriminator."""
    choices: dict[Choice, float | None] = CHOICES
    """P(A ≻ B) of each choice, A being what is shown on the left; null leaves the pair out of training."""
    votes_per_pair: int = Field(default=1, ge=1)
    """People who judge each pair."""
    aggregation: Literal["majority", "dawid_skene"] = "majority"
    """How several votes become one label."""
    guidelines: str = "Which answer is better?"
    """Markdown for the annotators, or the path of a .md file."""
    aspects: tuple[str, ...] = ()
    """What else is rated from 1 to 5 for each answer, e.g. [helpful, true]; optional for the annotator."""
    lease_seconds: float = Field(default=600.0, ge=10)
    """How long a pair stays in one person's hands; the page renews it while it is open."""
    undo_seconds: float = Field(default=10.0, ge=0)
    """A vote is used when it is so old."""
    skips_to_abstain: int = Field(default=2, ge=1)
    """A pair that so many people skipped is left out of training."""
    answer_seconds: float | None = Field(default=None, gt=0)
    """A pair that waited so long is left out of training; null waits for ever."""
    gold: GoldConfig | None = None
    """Questions with known answers."""

    @property
    def asks_people(self) -> bool:
        """Whether pairs go to people."""
        return True

    @model_validator(mode="after")
    def _symmetric(self) -> Self:
        for left, right in (("a_much", "b_much"), ("a", "b"), ("a_slightly", "b_slightly"), ("equal", "equal")):
            p, q = self.choices.get(left, -1), self.choices.get(right, -1)  # type: ignore[call-overload]
            if p is None or q is None or not 0 <= p <= 1 or abs(p + q - 1) > 1e-6:
                raise ValueError(
                    f"oracle.choices: {left} and {right} must both be there and add up to 1, "
                    "because which answer stands on the left is drawn by lot"
                )
        if "both_bad" not in self.choices:
            raise ValueError("oracle.choices: both_bad is missing; null leaves such pairs out of training")
        return self


JUDGE_TEMPLATE = """Two answers to a request follow. Which one is better?

Request:
{prompt}

Answer A:
{first}

Answer B:
{second}

Reply with one letter: A, B, or T for a tie."""


class JudgeOracleConfig(Section):
    """A language model behind an OpenAI-compatible endpoint, asked in both orders; disagreement is a tie."""

    type: Literal["judge"] = "judge"
    """Discriminator."""
    url: str = Field(pattern=r"^https?://")
    """Base of the endpoint, e.g. http://localhost:8000/v1."""
    model: str
    """Name of the model there."""
    template: str = JUDGE_TEMPLATE
    """The question; the answer's first word that is A, B or T counts."""
    api_key_variable: str | None = None
    """Environment variable that holds the key, where the oracle runs; null sends none."""
    max_tokens: int = Field(default=8, ge=1)
    """Longest answer."""
    attempts: int = Field(default=5, ge=1)
    """Attempts of one call, with growing pauses."""
    call_seconds: float = Field(default=60.0, gt=0)
    """Deadline of one attempt."""
    concurrency: int = Field(default=8, ge=1)
    """Calls at the same time."""
    price_input: float = Field(default=0.0, ge=0)
    """Price of a million input tokens; costs are kept in judge.jsonl of the run folder."""
    price_output: float = Field(default=0.0, ge=0)
    """Price of a million output tokens."""

    @property
    def asks_people(self) -> bool:
        """Whether pairs go to people."""
        return False

    @model_validator(mode="after")
    def _complete(self) -> Self:
        missing = [name for name in ("{prompt}", "{first}", "{second}") if name not in self.template]
        if missing:
            raise ValueError(f"oracle.template does not hold {', '.join(missing)}")
        return self


MachineOracleConfig = Annotated[
    FunctionOracleConfig | RewardModelOracleConfig | JudgeOracleConfig, Field(discriminator="type")
]
"""Oracles that answer without people."""


class MixtureOracleConfig(Section):
    """Some pairs to people, the rest to a machine, which also answers where people do not in time."""

    type: Literal["mixture"] = "mixture"
    """Discriminator."""
    people: HumanOracleConfig = HumanOracleConfig(answer_seconds=3600.0)
    """As for `type: human`; answer_seconds is the deadline after which the machine decides."""
    machine: MachineOracleConfig
    """What labels the rest."""
    share: float = Field(default=0.1, ge=0, le=1)
    """Share of all pairs that people audit, drawn by lot."""
    margin: float | None = Field(default=None, gt=0)
    """People also get pairs whose rewards differ by less, in log-odds, or on which a judge ties; null asks no rule."""
    disagreement: float | None = Field(default=None, gt=0, lt=1)
    """People also get this share of pairs, those on which r̂'s heads disagree most; needs reward_model.heads ≥ 2."""
    disagreement_window: int = Field(default=256, ge=8)
    """How many of the newest pairs a pair's disagreement is compared with."""
    people_budget: int | None = Field(default=None, ge=0)
    """Most labels from people."""
    machine_budget: int | None = Field(default=None, ge=0)
    """Most labels from the machine."""

    @property
    def asks_people(self) -> bool:
        """Whether pairs go to people."""
        return True


ScoringOracleConfig = Annotated[FunctionOracleConfig | RewardModelOracleConfig, Field(discriminator="type")]
"""Oracles that give rewards of single responses."""
OracleConfig = Annotated[
    FunctionOracleConfig | RewardModelOracleConfig | HumanOracleConfig | JudgeOracleConfig | MixtureOracleConfig,
    Field(discriminator="type"),
]
