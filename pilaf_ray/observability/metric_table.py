"""What every key of metrics.jsonl means: the one table, in the order of docs/metrics.md."""

from pilaf_ray.observability.metric_types import Last, Max, Mean, MetricDefinition, Sum

PAIR_METRICS: tuple[MetricDefinition, ...] = (
    MetricDefinition(
        "loss",
        Mean,
        "nats",
        "mean of the preference loss over the batch's pairs",
        "`dpo` starts at log 2 ≈ 0.693 when policy and reference are equal; falls slowly",
    ),
    MetricDefinition(
        "train/margin",
        Mean,
        "nats",
        "β·[(log π − log π_ref)(chosen) − (log π − log π_ref)(rejected)]",
        "starts near 0; rises",
    ),
    MetricDefinition(
        "train/accuracy",
        Mean,
        "share",
        "share of pairs with a positive margin; a tied label counts ½",
        "above 0.5 after the first steps; 1.0 for long is over-fitting",
    ),
    MetricDefinition(
        "train/chosen_logprob",
        Mean,
        "nats",
        "log π(chosen | prompt), summed over its tokens",
        "may fall; a steep fall together with the rejected one is likelihood displacement",
    ),
    MetricDefinition(
        "train/rejected_logprob",
        Mean,
        "nats",
        "log π(rejected | prompt), summed over its tokens",
        "falls faster than the chosen one",
    ),
    MetricDefinition("train/chosen_reward", Mean, "nats", "β·(log π − log π_ref)(chosen)", "near or above 0"),
    MetricDefinition("train/rejected_reward", Mean, "nats", "β·(log π − log π_ref)(rejected)", "below the chosen one"),
    MetricDefinition(
        "train/grad_norm",
        Last,
        "",
        "L2 norm of the whole gradient before clipping; 0 where the step was skipped",
        "steady; a jump by a factor of ten announces divergence",
    ),
    MetricDefinition(
        "train/loss_scale",
        Last,
        "",
        "what float16 multiplies the loss with; absent in other formats",
        "settles after the first steps; a fall to 1 announces the end of the run",
    ),
    MetricDefinition(
        "train/skipped",
        Sum,
        "steps",
        "optimiser steps without an update, because their gradient overflowed float16; absent in other formats",
        "0, but for some of the first steps and one now and then",
    ),
    MetricDefinition("train/learning_rate", Last, "", "learning rate of this step", "as scheduled"),
    MetricDefinition(
        "reward/policy",
        Mean,
        "log-odds",
        "mean oracle reward of the batch's responses that were sampled with c = 0",
        "rises; null where the oracle gives no scores or no response has c = 0",
    ),
    MetricDefinition(
        "kl/policy",
        Mean,
        "nats",
        "mean of Σ_t log π(y_t) − log π_ref(y_t) over the same responses, π being the version that sampled them",
        "grows slowly; one batch is noisy and may be below 0",
    ),
    MetricDefinition(
        "age/mean",
        Mean,
        "steps",
        "(step − 1) − oldest policy version that sampled a token of the pair",
        "at most `pipeline.max_staleness_steps`",
    ),
    MetricDefinition(
        "age/max", Max, "steps", "the same, largest of the batch", "never above `pipeline.max_staleness_steps`"
    ),
    MetricDefinition(
        "response/tokens",
        Mean,
        "tokens",
        "response length, end of sequence included",
        "no steady drift: a drift is length hacking",
    ),
    MetricDefinition(
        "pairs/interpolated",
        Sum,
        "pairs",
        "pairs of the batch that were drawn from the `interpolated` branch",
        "near its weight times `batch_pairs`",
    ),
    MetricDefinition(
        "pairs/weight_max",
        Max,
        "",
        "largest loss weight of the batch's pairs; `t_pilaf` alone has other weights than 1",
        "a few units; far above, few pairs are the whole gradient: see `sampler.max_weight`",
    ),
    MetricDefinition(
        "z/plus",
        Mean,
        "",
        "mean over responses with c = +β of ∏_t Z_t, Z_t = Σ_v π(v)^(1+c)·π_ref(v)^(−c) at position t; each is an "
        "unbiased sample of Z⁺ = E_π[exp(r_θ)]. `pilaf_reward`: mean of exp(r̂) over the pool",
        "1 where π = π_ref; grows with the KL; null where no pair of the batch is mixed",
    ),
    MetricDefinition("z/minus", Mean, "", "the same for c = −β and Z⁻ = E_π[exp(−r_θ)]", "as `z/plus`"),
    MetricDefinition(
        "z/product",
        Mean,
        "",
        "mean over mixed pairs of the product of their two samples, an unbiased sample of Z⁺Z⁻ ≈ exp(Var_π(r_θ))",
        "from 1 up; far above 1, the fair coin of `pilaf` is far from T-PILAF's weights",
    ),
    MetricDefinition(
        "cost/sequence_forwards",
        Sum,
        "forwards",
        "sequence forwards that sampled the batch's pairs: 1 a response from π or π_ref, 2 a mixed one; "
        "candidates included. Like every cost, 0 where the pairs are trained on for a second time",
        "`batch_pairs` times 2 for vanilla and hybrid, 3 for pilaf, n for best of n",
    ),
    MetricDefinition(
        "cost/scoring_forwards",
        Sum,
        "forwards",
        "forwards of π_ref or r̂ that only scored candidates",
        "`batch_pairs` · n for best of n by r_θ, 0 for samplers without candidates",
    ),
    MetricDefinition(
        "cost/generated_tokens",
        Sum,
        "tokens",
        "tokens of every response that was sampled for the batch's pairs, candidates included",
        "2 · `batch_pairs` · `response/tokens` without candidates",
    ),
    MetricDefinition(
        "cost/labelled_responses",
        Sum,
        "responses",
        "responses that the oracle read for the batch's pairs",
        "2 · `batch_pairs`; n · `batch_pairs` where the oracle ranks candidates",
    ),
    MetricDefinition(
        "total/labels",
        Last,
        "labels",
        "labels of all pairs that were trained on up to here: half the responses that the oracle read for them",
        "at most `run.max_labels`",
    ),
    MetricDefinition(
        "total/generated_tokens",
        Last,
        "tokens",
        "tokens sampled for all pairs that were trained on up to here, candidates included",
        "reaches `run.max_generated_tokens` at the end, if that is what ends the run",
    ),
    MetricDefinition(
        "total/seconds", Last, "s", "wall time of the training loop over all attempts", "as `total/generated_tokens`"
    ),
    MetricDefinition(
        "pairs/in_flight",
        Last,
        "pairs",
        "pairs admitted by the gate and not yet trained or ended, after the step",
        "at most (`max_staleness_steps` + 1) · `batch_pairs`",
    ),
)
"""Of the step on labelled pairs: what was learned, from which pairs, at what cost."""

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
    MetricDefinition("train/value_loss_scale", Last, "", "`train/loss_scale` of the value model", "as there"),
    MetricDefinition("train/value_skipped", Sum, "steps", "`train/skipped` of the value model", "as there"),
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
        "reward_model/brier_skill",
        Last,
        "",
        "1 − Σ(σ(r̂(a) − r̂(b)) − p)² / Σ(½ − p)² over the same pairs, p being the label: sharpness and calibration "
        "in one",
        "rises from 0 towards what the oracle's noise leaves; below 0, r̂ is worse than a coin: it is over-confident",
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
        "reward_model/held_out_brier_skill",
        Last,
        "",
        "Brier skill on the held-out pairs",
        "as `reward_model/brier_skill`",
    ),
    MetricDefinition(
        "reward_model/loss",
        Last,
        "nats",
        "Bradley–Terry loss of r̂'s steps beside this step, mean; replayed pairs included",
        "starts near log 2 ≈ 0.693; falls",
    ),
    MetricDefinition("reward_model/grad_norm", Last, "", "L2 norm of r̂'s newest gradient before clipping", "steady"),
    MetricDefinition("reward_model/loss_scale", Last, "", "`train/loss_scale` of r̂'s newest step", "as there"),
    MetricDefinition("reward_model/skipped", Sum, "steps", "`train/skipped` of r̂'s steps", "as there"),
    MetricDefinition("reward_model/version", Last, "steps", "r̂'s optimiser steps so far", "grows"),
    MetricDefinition(
        "reward_model/steps",
        Sum,
        "steps",
        "r̂'s optimiser steps beside this step",
        "`reward_model.steps_per_batch`, or less while pairs lack uses",
    ),
)
"""Of a reward model, and of optimising a policy against it."""

TIME_METRICS: tuple[MetricDefinition, ...] = (
    MetricDefinition("time/wait", Sum, "s", "learner waiting for its next batch", "near 0 when generation keeps up"),
    MetricDefinition("time/train", Sum, "s", "forward, backward and optimiser step", "steady"),
    MetricDefinition(
        "time/push",
        Sum,
        "s",
        "learner writing to the ledger and handing out its weights; it cannot train meanwhile",
        "small beside `time/train`",
    ),
    MetricDefinition(
        "time/evaluation",
        Sum,
        "s",
        "learner waiting, its step done, until a held-out evaluation is sampled and lets its version be served",
        "0 but after an evaluation; else evaluate less often or fewer prompts",
    ),
    MetricDefinition(
        "time/sync",
        Sum,
        "s",
        "until every generator served the version before this one; the learner trains meanwhile",
        "below `time/train`",
    ),
    *(
        MetricDefinition(
            f"busy/{role}",
            Mean,
            "share",
            f"share of the time since the step before in which the role `{role}` had a call under way, "
            "as the controller sees it",
            "the role that is always near 1 is the bottleneck",
        )
        for role in ("generator", "reference", "oracle", "learner", "reward")
    ),
)
"""Where the time of a step goes."""

METRICS = (*PAIR_METRICS, *REWARD_METRICS, *TIME_METRICS)
"""All of them."""
