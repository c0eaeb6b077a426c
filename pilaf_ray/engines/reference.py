"""log π_ref of given responses, batched."""

from collections.abc import Sequence

import torch

from pilaf_ray.data.collate import SequenceBatch, collate, micro_batches
from pilaf_ray.data.pair_batches import PairBatches
from pilaf_ray.engines.scoring import ScoringModel, load_network, sum_by_sequence
from pilaf_ray.engines.shared_prompt import shares_prompts
from pilaf_ray.observability.progress import PROGRESS
from pilaf_ray.observability.usage import UsageClock
from pilaf_ray.types import ReferenceLogprobs, ResponsePair, RoleUsage, TokenPair


class ReferenceModel:
    """The fixed reference policy."""

    def __init__(
        self,
        *,
        model_path: str,
        dtype: str,
        cpu_threads: int,
        micro_batch_tokens: int,
        logprob_chunk_tokens: int,
        share_prompts: bool = True,
    ) -> None:
        torch.set_num_threads(cpu_threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = load_network(model_path, dtype=getattr(torch, dtype))
        self._model = ScoringModel(network, chunk_tokens=logprob_chunk_tokens).to(self._device).eval()
        self._max_tokens = micro_batch_tokens
        share = share_prompts and shares_prompts(network, self._model, device=self._device)
        self._batches = PairBatches(share=share, max_tokens=micro_batch_tokens)
        self._clock = UsageClock("reference")

    def score(self, pairs: Sequence[ResponsePair]) -> list[ReferenceLogprobs]:
        """Sequence log-probabilities of both sides, in order."""
        sums = [0.0] * (2 * len(pairs))
        with self._clock.busy():
            for group in self._batches.groups(pairs):
                sequences = [sequence for i in group for sequence in (2 * i, 2 * i + 1)]
                self._score(self._batches.collate([pairs[i] for i in group]), sequences, sums)
        return [
            ReferenceLogprobs(pair_id=pair.plan.pair_id, a=sums[2 * i], b=sums[2 * i + 1])
            for i, pair in enumerate(pairs)
        ]

    def score_responses(self, items: Sequence[TokenPair]) -> list[float]:
        """Sequence log-probabilities of (prompt, response) token pairs, in order."""
        sums = [0.0] * len(items)
        lengths = [len(prompt) + len(response) for prompt, response in items]
        with self._clock.busy():
            for group in micro_batches(lengths, rows_per_item=1, max_tokens=self._max_tokens):
                self._score(collate([items[i] for i in group]), group, sums)
        return sums

    @torch.no_grad()
    def score_tokens(self, items: Sequence[TokenPair]) -> list[list[float]]:
        """Log-probability of each response token of (prompt, response) pairs, in order."""
        scores: list[list[float]] = [[] for _ in items]
        lengths = [len(prompt) + len(response) for prompt, response in items]
        with self._clock.busy():
            for group in micro_batches(lengths, rows_per_item=1, max_tokens=self._max_tokens):
                batch = collate([items[i] for i in group]).to(self._device)
                logprobs = self._model(batch)
                for row, place in enumerate(group):
                    scores[place] = logprobs[batch.token_sequence == row].tolist()
                PROGRESS.advance()
        return scores

    @torch.no_grad()
    def _score(self, batch: SequenceBatch, places: Sequence[int], sums: list[float]) -> None:
        """Write the log-probability of each sequence of ``batch`` to its place in ``sums``."""
        batch = batch.to(self._device)
        for place, total in zip(places, sum_by_sequence(self._model(batch), batch).tolist(), strict=True):
            sums[place] = total
        PROGRESS.advance()

    def usage(self) -> RoleUsage:
        """Busy time and peak memory."""
        return self._clock.usage()
