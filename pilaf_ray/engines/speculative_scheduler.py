"""vLLM's scheduler for an engine whose steps end with several tokens of a request computed."""

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler

from pilaf_ray.engines.speculation_settings import speculation_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput


class SpeculativeScheduler(Scheduler):
    """Reserves cache for the tokens that a step may draft, and counts those that it kept as computed.

    A request that got n tokens has the cache of all but the last of them, as after n ordinary steps. What was
    written for replaced drafts lies behind that and is written again.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # The first draft is drawn from what was scheduled, and the last one is not computed.
        self.num_lookahead_tokens = speculation_of(self.vllm_config).tokens - 1

    def update_from_output(
        self, scheduler_output: "SchedulerOutput", model_runner_output: "ModelRunnerOutput"
    ) -> dict[int, Any]:
        """As vLLM's, after the count."""
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(request_id)
            if request is not None and not request.is_finished():
                place = model_runner_output.req_id_to_index[request_id]
                request.num_computed_tokens += max(0, len(model_runner_output.sampled_token_ids[place]) - 1)
        outputs: dict[int, Any] = super().update_from_output(scheduler_output, model_runner_output)
        return outputs
