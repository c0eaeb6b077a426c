"""The samplers on a finite set of responses, where every expectation is a sum.

One prompt, K responses, a softmax policy with its K logits as parameters. The sampling
distribution counts as fixed, as in the paper's theory: gradients do not pass through it.
Numpy only; this is what the tests measure the theory with. Formulas: docs/algorithms.md.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    """Probabilities over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def sigmoid(x: Array) -> Array:
    """1/(1 + exp(−x)), without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


@dataclass(frozen=True, kw_only=True)
class TabularPrompt:
    """A prompt with K possible responses."""

    policy_logits: Array
    reference_logits: Array
    true_rewards: Array
    """r*, the oracle's."""
    beta: float

    @property
    def policy(self) -> Array:
        """π, shape (K,)."""
        return softmax(self.policy_logits)

    @property
    def reference(self) -> Array:
        """π_ref, shape (K,)."""
        return softmax(self.reference_logits)

    @property
    def implicit_rewards(self) -> Array:
        """r_θ = β·log(π/π_ref), shape (K,)."""
        return np.asarray(self.beta * (np.log(self.policy) - np.log(self.reference)))

    @property
    def reward_gradients(self) -> Array:
        """Row y is ∇r_θ(y) = β·(e_y − π), shape (K, K)."""
        return np.asarray(self.beta * (np.eye(self.policy.size) - self.policy))

    def mixed(self, coefficient: float) -> Array:
        """softmax((1 + c)·h_θ − c·h_ref): π at 0, π⁺ at β, π⁻ at −β, π_ref at −1."""
        return softmax((1.0 + coefficient) * self.policy_logits - coefficient * self.reference_logits)

    def z(self, sign: int) -> float:
        """Z^± = E_π[exp(±r_θ)]."""
        return float(self.policy @ np.exp(sign * self.implicit_rewards))

    @property
    def z_product(self) -> float:
        """Z⁺·Z⁻, at least 1."""
        return self.z(1) * self.z(-1)

    def objective(self) -> float:
        """J = E_π[r*] − β·KL(π ‖ π_ref)."""
        return float(self.policy @ (self.true_rewards - self.implicit_rewards))

    def objective_gradient(self) -> Array:
        """∇J = Cov_π(r* − r_θ, ∇r_θ)/β, by the logits."""
        gap = self.true_rewards - self.implicit_rewards
        return np.asarray((self.policy * (gap - self.policy @ gap)) @ self.reward_gradients / self.beta)

    def loss(self, pairs: Array) -> float:
        """L = −E_{(a,b)∼μ}[p*·log σ(D) + (1 − p*)·log σ(−D)], p* = σ(D*); ``pairs`` is μ, shape (K, K)."""
        wanted, held = sigmoid(_differences(self.true_rewards)), _differences(self.implicit_rewards)
        return float((pairs * (wanted * np.logaddexp(0.0, -held) + (1 - wanted) * np.logaddexp(0.0, held))).sum())

    def loss_gradient(self, pairs: Array) -> Array:
        """∇L = −E_{(a,b)∼μ}[(σ(D*) − σ(D))·(∇r_θ(a) − ∇r_θ(b))], by the logits."""
        pull = pairs * (sigmoid(_differences(self.true_rewards)) - sigmoid(_differences(self.implicit_rewards)))
        return np.asarray(-(pull.sum(axis=1) - pull.sum(axis=0)) @ self.reward_gradients)

    def fisher_information(self, pairs: Array) -> Array:
        """E_{(a,b)∼μ}[σ'(D)·(∇r_a − ∇r_b)(∇r_a − ∇r_b)ᵀ] of one labelled pair, at r* = r_θ."""
        chance = sigmoid(_differences(self.implicit_rewards))
        weights = pairs * chance * (1.0 - chance)
        weights = weights + weights.T
        laplacian = np.diag(weights.sum(axis=1)) - weights
        return np.asarray(self.reward_gradients.T @ laplacian @ self.reward_gradients)

    def reward_covariance(self) -> Array:
        """Cov_π(∇r_θ); −∇²J is this over β where r* = r_θ."""
        mean = self.policy @ self.reward_gradients
        return np.asarray(self.reward_gradients.T @ (self.policy[:, None] * self.reward_gradients)) - np.outer(
            mean, mean
        )

    def asymptotic_gap(self, pairs: Array) -> float:
        """lim n·E[J* − J(θ̂_n)] of the maximum-likelihood fit to n pairs, at r* = r_θ.

        ½·tr(H·F⁺) with H = −∇²J; (1 + Z⁺Z⁻)·(K − 1)/(2β) for `t_pilaf_pairs`.
        """
        hessian = self.reward_covariance() / self.beta
        return float(0.5 * np.trace(hessian @ np.linalg.pinv(self.fisher_information(pairs), rcond=1e-12)))


def _differences(values: Array) -> Array:
    return np.asarray(values[:, None] - values[None, :])


def mixture_pairs(prompt: TabularPrompt, branches: list[tuple[float, float, float]]) -> Array:
    """μ(a, b) of a list of (weight, c_a, c_b), shape (K, K)."""
    total = sum(weight for weight, _, _ in branches)
    return np.asarray(sum(w / total * np.outer(prompt.mixed(a), prompt.mixed(b)) for w, a, b in branches))


def vanilla_pairs(prompt: TabularPrompt) -> Array:
    """Both from π."""
    return mixture_pairs(prompt, [(1.0, 0.0, 0.0)])


def pilaf_pairs(prompt: TabularPrompt) -> Array:
    """A fair coin between (π, π) and (π⁺, π⁻)."""
    return mixture_pairs(prompt, [(1.0, 0.0, 0.0), (1.0, prompt.beta, -prompt.beta)])


def plus_minus_pairs(prompt: TabularPrompt) -> Array:
    """(π⁺, π⁻) only."""
    return mixture_pairs(prompt, [(1.0, prompt.beta, -prompt.beta)])


def t_pilaf_pairs(prompt: TabularPrompt) -> Array:
    """(π, π) with weight 1, (π⁺, π⁻) with weight Z⁺Z⁻."""
    return mixture_pairs(prompt, [(1.0, 0.0, 0.0), (prompt.z_product, prompt.beta, -prompt.beta)])


def hybrid_pairs(prompt: TabularPrompt) -> Array:
    """One from π, one from π_ref."""
    return mixture_pairs(prompt, [(1.0, 0.0, -1.0)])


def best_of_n_pairs(prompt: TabularPrompt, *, n: int, scores: Array | None = None) -> Array:
    """Best against worst of ``n`` draws from π; ``scores`` differ by response, r_θ when left out.

    P(best = i, worst = j) = by inclusion and exclusion from P(all draws score in [j, i]).
    """
    order = np.argsort(prompt.implicit_rewards if scores is None else scores)
    cumulative = np.concatenate([[0.0], np.cumsum(prompt.policy[order])])
    size = order.size

    def all_within(low: int, high: int) -> float:
        return float((cumulative[high + 1] - cumulative[low]) ** n) if low <= high else 0.0

    pairs = np.zeros((size, size))
    for i in range(size):
        for j in range(i + 1):
            pairs[order[i], order[j]] = (
                all_within(j, i) - all_within(j + 1, i) - all_within(j, i - 1) + all_within(j + 1, i - 1)
            )
    return pairs
