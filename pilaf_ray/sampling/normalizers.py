"""What Z⁺ and Z⁻ decide in T-PILAF, and how a run estimates them from its own samples.

Z^±(x) = E_{y∼π}[exp(±r_θ(x, y))]. A response drawn token by token with ±β gives the
unbiased sample ∏_t Z_t^±, a response drawn from π gives exp(±r_θ(y)) for both; either
costs no model call beyond what the pair needed. Formulas: docs/algorithms.md.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

Sign = Literal[1, -1]


def t_pilaf_branch_probability(log_z_plus: float, log_z_minus: float) -> float:
    """Probability of the (π⁺, π⁻) branch, Z⁺Z⁻/(1 + Z⁺Z⁻); at least ½.

    Z⁺Z⁻ ≥ 1 by Cauchy and Schwarz, so an estimate below 1 counts as 1.
    """
    return 1.0 / (1.0 + math.exp(-_log_product(log_z_plus, log_z_minus)))


def t_pilaf_loss_weight(log_z_plus: float, log_z_minus: float, *, cap: float = math.inf) -> float:
    """Weight of the prompt's loss, min((1 + Z⁺Z⁻)/2, cap): 1 where r_θ is constant.

    Only the ratio between prompts matters for the direction of the gradient; halving
    keeps the step size of the fair coin. A ``cap`` bounds the variance that a prompt with
    a large Z brings, and ends the alignment there.
    """
    # Beyond exp(700) a float has no room.
    return min(0.5 * (1.0 + math.exp(min(_log_product(log_z_plus, log_z_minus), 700.0))), cap)


def _log_product(log_z_plus: float, log_z_minus: float) -> float:
    return max(log_z_plus + log_z_minus, 0.0)


@dataclass(kw_only=True)
class _LogMean:
    """log of a weighted mean of exp(samples); older samples fade."""

    log_total: float = -math.inf
    weight: float = 0.0

    def add(self, log_sample: float, decay: float) -> None:
        self.log_total = _log_add(self.log_total + math.log(decay), log_sample)
        self.weight = self.weight * decay + 1.0


def _log_add(a: float, b: float) -> float:
    high = max(a, b)
    return high if high == -math.inf else high + math.log1p(math.exp(min(a, b) - high))


class RunningLogZ:
    """log Z⁺ and log Z⁻ by prompt, leaning on the run's mean while a prompt is new.

    The estimate of a prompt is log[(s·Z̄_run + Σ samples)/(s + number of samples)], s the
    ``prior_strength``; without any sample of the run it is 0, the fair coin.

    What is biased, and which way: each sample of Z is unbiased for the policy that drew
    it, and so is their mean. Not so the rest. (1) log of a mean is too low, by about
    Var[sample]/(2n·Z²). (2) Branch probability and loss weight read a product of two
    estimates: unbiased only where both rest on independent samples (y_a and y_b of a mixed
    pair do, exp(r) and exp(−r) of one response do not) and one sample each; the probability
    is also concave above Z⁺Z⁻ = 1, and products under 1 count as 1. (3) The policy moves:
    samples speak of past versions, faded by ``decay``. (4) The lean on the run's mean
    pulls prompts towards each other. For long responses exp(Σ_t log Z_t) has a heavy tail
    and few samples miss most of Z: watch `samples` and the spread before trusting it.

    Args:
        prior_strength: samples that the run's mean is worth for a prompt.
        decay: weight of the past at each new sample, 1 for none lost.
        max_prompts: prompts kept; the one longest without a sample is dropped first.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, *, prior_strength: float = 4.0, decay: float = 0.98, max_prompts: int = 100_000) -> None:
        if prior_strength <= 0 or not 0 < decay <= 1 or max_prompts < 1:
            raise ValueError("log Z: prior_strength is above 0, decay in (0, 1], max_prompts at least 1")
        self._strength, self._decay, self._max_prompts = prior_strength, decay, max_prompts
        self._run: dict[Sign, _LogMean] = {1: _LogMean(), -1: _LogMean()}
        self._prompts: OrderedDict[str, dict[Sign, _LogMean]] = OrderedDict()

    def observe(self, prompt_id: str, sign: Sign, log_sample: float) -> None:
        """Add one sample of Z^sign by its log: Σ_t log Z_t, or sign·r_θ(y) of y ∼ π.

        Raises:
            ValueError: the sample is not finite.
        """
        if not math.isfinite(log_sample):
            raise ValueError(f"log Z sample of prompt {prompt_id} is {log_sample}")
        self._run[sign].add(log_sample, self._decay)
        own = self._prompts.setdefault(prompt_id, {1: _LogMean(), -1: _LogMean()})
        own[sign].add(log_sample, self._decay)
        self._prompts.move_to_end(prompt_id)
        if len(self._prompts) > self._max_prompts:
            self._prompts.popitem(last=False)

    def estimate(self, prompt_id: str) -> tuple[float, float]:
        """(log Z⁺, log Z⁻) of a prompt; of the run for a prompt not seen yet."""
        own = self._prompts.get(prompt_id, {})
        return self._blend(own.get(1), 1), self._blend(own.get(-1), -1)

    def samples(self, prompt_id: str) -> tuple[float, float]:
        """Faded number of samples behind Z⁺ and Z⁻ of a prompt."""
        own = self._prompts.get(prompt_id)
        return (own[1].weight, own[-1].weight) if own else (0.0, 0.0)

    def _blend(self, own: _LogMean | None, sign: Sign) -> float:
        run = self._run[sign]
        if run.weight == 0.0:
            return 0.0
        prior = run.log_total - math.log(run.weight)
        if own is None or own.weight == 0.0:
            return prior
        total = _log_add(prior + math.log(self._strength), own.log_total)
        return total - math.log(self._strength + own.weight)
