"""What is measured of a reward model, and of optimising a policy against it."""

from pilaf_ray.observability.metric_types import Last, Max, Mean, MetricDefinition, Sum

REWARD_METRICS: tuple[MetricDefinition, ...] = (
    MetricDefinition(
        "train/ratio", Mean, "", "π/π_old of the rollouts' tokens in the step's last optimiser step", "near 1"
    ),
    MetricDefinition(
        "train/clipped",
        Mean,
        "share",
        "tokens whose surrogate is held by the clipping, in the step's last optimiser step",
        "0 with one optimiser step; below 0.3",
    ),
    MetricDefinition(
        "train/importance_weight",
        Mean,
        "",
        "min(π_old/μ, `algorithm.importance_cap`), μ being the policy that sampled",
        "near 1; far from it, rollouts are stale or engine and learner disagree",
    ),
    MetricDefinition("train/truncated", Mean, "share", "tokens at the cap", "near 0"),
    MetricDefinition(
        "train/logprob_gap",
        Mean,
        "nats",
        "mean |log π − log μ| of the rollouts' tokens, π in the learner and μ in the generator",
        "rounding where age is 0; grows with age and with optimiser steps of one batch",
    ),
    MetricDefinition(
        "train/advantage_spread", Last, "", "standard deviation of the tokens' advantages", "above 0; 1 if whitened"
    ),
    MetricDefinition(
        "train/kl_coefficient",
        Last,
        "",
        "KL coefficient of the step",
        "`algorithm.beta`, or as the controller moves it",
    ),
    MetricDefinition("train/value_loss", Last, "", "value model's clipped squared error, halved", "falls"),
    MetricDefinition(
        "train/value_explained",
        Last,
        "share",
        "1 − E(V − R)²/Var(R) over the tokens, before the value model's last optimiser step",
        "rises towards 1; below 0, V is worse than a constant",
    ),
    MetricDefinition("train/value_grad_norm", Last, "", "L2 norm of the value model's gradient", "steady"),
    MetricDefinition(
        "rollouts/responses", Sum, "responses", "responses of π that the policy's step was taken on", "as configured"
    ),
    MetricDefinition(
        "rollouts/share",
        Last,
        "share",
        "rollouts among the step's responses, the sides of its pairs being the others",
        "the stated division of the generators between the two streams",
    ),
    MetricDefinition(
        "rollouts/reward",
        Mean,
        "log-odds",
        "mean r̂ of the rollouts; each prompt leaves a constant open",
        "rises; where it rises and `reward/policy` does not, r̂ is being hacked",
    ),
    MetricDefinition(
        "rollouts/reward_spread", Last, "log-odds", "standard deviation of r̂ over the rollouts", "above 0"
    ),
    MetricDefinition(
        "rollouts/equal_groups",
        Mean,
        "share",
        "groups whose responses all got the same r̂, and so no advantage; 1 where a group is one response",
        "near 0 for `rloo` and `grpo`",
    ),
    MetricDefinition(
        "rollouts/reward_version", Last, "steps", "oldest version of r̂ that scored a rollout of the step", "grows"
    ),
    MetricDefinition(
        "rollouts/kl",
        Mean,
        "nats",
        "mean of Σ_t log μ(y_t) − log π_ref(y_t) over the rollouts, μ being the policy that sampled them",
        "grows slowly; `algorithm.kl_controller` can hold it",
    ),
    MetricDefinition("rollouts/tokens", Mean, "tokens", "length of the rollouts", "no steady drift"),
    MetricDefinition("rollouts/stopped", Mean, "share", "rollouts that the policy ended itself", "steady"),
    MetricDefinition(
        "rollouts/age_max",
        Max,
        "steps",
        "(step − 1) − oldest policy version that sampled a token of a rollout, largest of the step",
        "never above `pipeline.max_staleness_steps`",
    ),
    MetricDefinition(
        "reward_model/accuracy",
        Last,
        "share",
        "share of the newest `reward_model.health.window_pairs` pairs, each judged before r̂ had trained on it, on "
        "which r̂ agrees with the label; a tie counts ½",
        "rises from 0.5; its bound is the oracle's own noise",
    ),
    MetricDefinition(
        "reward_model/calibration_error",
        Last,
        "",
        "expected calibration error of σ(r̂(a) − r̂(b)) on the same pairs",
        "falls; few pairs bias it upwards",
    ),
    MetricDefinition(
        "reward_model/spread",
        Last,
        "log-odds",
        "root mean square of r̂(a) − r̂(b) on the same pairs",
        "grows towards that of the oracle; 0 is a collapse",
    ),
    MetricDefinition(
        "reward_model/ties",
        Last,
        "share",
        "share of ties among the labels of the same pairs",
        "below 1: ties teach nothing",
    ),
    MetricDefinition(
        "reward_model/held_out_accuracy",
        Last,
        "share",
        "accuracy on the newest held-out pairs, which r̂ never trains on",
        "near `reward_model/accuracy`; far below it, replay over-fits",
    ),
    MetricDefinition(
        "reward_model/held_out_calibration_error", Last, "", "calibration error on the held-out pairs", "falls"
    ),
    MetricDefinition(
        "reward_model/loss",
        Last,
        "nats",
        "Bradley–Terry loss of r̂'s steps beside this step, mean; replayed pairs included",
        "starts near log 2 ≈ 0.693; falls",
    ),
    MetricDefinition("reward_model/grad_norm", Last, "", "L2 norm of r̂'s newest gradient before clipping", "steady"),
    MetricDefinition("reward_model/version", Last, "steps", "r̂'s optimiser steps so far", "grows"),
    MetricDefinition(
        "reward_model/steps",
        Sum,
        "steps",
        "r̂'s optimiser steps beside this step",
        "`reward_model.steps_per_batch`, or less while pairs lack uses",
    ),
)
