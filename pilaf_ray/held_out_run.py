"""A run's evaluations on held-out prompts: when they are due, and where their results go."""

from functools import partial

from pilaf_ray.config.schema import RunConfig
from pilaf_ray.evaluation.evaluator import Evaluator
from pilaf_ray.pipeline.held_out import Sample, Score
from pilaf_ray.run_journal import RunJournal


class HeldOutEvaluations:
    """Evaluates served versions, and keeps the results in the run's journal.

    Args:
        prompts: number of held-out prompts, for the terminal.
    """

    def __init__(self, config: RunConfig, evaluator: Evaluator, journal: RunJournal, *, prompts: int) -> None:
        self._config, self._evaluator, self._journal = config, evaluator, journal
        self._prompts = prompts

    async def evaluate(self, step: int) -> None:
        """Sample from the version of ``step``, which is served, and measure the responses."""
        score = await self._sample(step)
        await score()

    def due(self, step: int) -> Sample | None:
        """How to evaluate ``step`` on the way, if it is due then; the last step is evaluated in any case."""
        every = self._config.evaluation.every_steps
        is_due = every > 0 and (step % every == 0 or self._config.schedule.type == "iterative")
        return partial(self._sample_on_the_way, step) if is_due and step < self._config.step_limit[0] else None

    async def _sample_on_the_way(self, step: int) -> Score:
        score = await self._sample(step)
        self._journal.phase("training")
        return score

    async def _sample(self, step: int) -> Score:
        """Responses of the version that is served; returns what measures them."""
        self._journal.phase(f"evaluating step {step} on {self._prompts} held-out prompts")
        with self._journal.spans.measure("evaluation: sampling"):
            responses = await self._evaluator.sample()

        async def score() -> None:
            with self._journal.spans.measure("evaluation: scoring"):
                result = await self._evaluator.score(step, responses)
            self._journal.evaluation(result)

        return score
