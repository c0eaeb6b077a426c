"""What Z⁺ and Z⁻ decide in T-PILAF, and the estimates that a pair's own draws give.

Z^±(x) = E_{y∼π}[exp(±r_θ(x, y))]. A response drawn token by token with ±β gives the
unbiased sample ∏_t Z_t^±, and costs no model call beyond the draw. Formulas and the proof
that T-PILAF may use the samples of the pair at hand: docs/algorithms.md.
"""

import math

from pilaf_ray.types import SampledResponse

_LARGEST_LOG = 700.0
"""Beyond exp(700) a float has no room."""


def log_z_sample(response: SampledResponse) -> float | None:
    """Σ_t log Z_t = Σ_t (1 + c)·log π − c·log π_ref − log q of a mixed response.

    An unbiased sample, by its log, of E_π[(π/π_ref)^c]; None where the response is not mixed, or where
    its networks' own log-probabilities are not known. It holds at temperature 1 and top-p 1 only.
    """
    c, policy, reference = response.coefficient, response.policy_logprobs, response.reference_logprobs
    if c == 0.0 or policy is None or reference is None:
        return None
    rows = zip(policy, reference, response.logprobs, strict=True)
    return math.fsum((1.0 + c) * p - c * r - q for p, r, q in rows)


def t_pilaf_branch_probability(log_product: float) -> float:
    """Probability of the (π⁺, π⁻) branch, w/(1 + w) with w = Z⁺Z⁻ or a sample of it."""
    if log_product >= 0:
        return 1.0 / (1.0 + math.exp(-log_product))
    return math.exp(log_product) / (1.0 + math.exp(log_product))


def t_pilaf_loss_weight(log_product: float, *, cap: float = math.inf) -> float:
    """min((1 + w)/2, cap): 1 where r_θ is constant.

    Only the ratio between pairs matters for the direction of the gradient; halving keeps the
    step size of the fair coin. A ``cap`` bounds the variance that a large w brings, and ends
    the exactness there.
    """
    return min(0.5 * (1.0 + z_value(log_product)), cap)


def z_value(log_z: float) -> float:
    """exp(log_z), or the largest that a float holds."""
    return math.exp(min(log_z, _LARGEST_LOG))
