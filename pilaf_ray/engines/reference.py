"""log π_ref of given responses, batched."""

from collections.abc import Sequence

import torch

from pilaf_ray.data.collate import TokenPair, collate, micro_batches
from pilaf_ray.engines.scoring import ScoringModel, load_network, sum_by_row
from pilaf_ray.observability.usage import UsageClock
from pilaf_ray.types import ReferenceLogprobs, ResponsePair, RoleUsage


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
    ) -> None:
        torch.set_num_threads(cpu_threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = load_network(model_path, dtype=getattr(torch, dtype))
        self._model = ScoringModel(network, chunk_tokens=logprob_chunk_tokens).to(self._device).eval()
        self._max_tokens = micro_batch_tokens
        self._clock = UsageClock("reference")

    def score(self, pairs: Sequence[ResponsePair]) -> list[ReferenceLogprobs]:
        """Sequence log-probabilities of both sides, in order."""
        items: list[TokenPair] = []
        for pair in pairs:
            prompt = pair.plan.prompt.token_ids
            items += [(prompt, pair.a.token_ids), (prompt, pair.b.token_ids)]
        scores = self.score_responses(items)
        return [
            ReferenceLogprobs(pair_id=pair.plan.pair_id, a=scores[2 * i], b=scores[2 * i + 1])
            for i, pair in enumerate(pairs)
        ]

    @torch.no_grad()
    def score_responses(self, items: Sequence[TokenPair]) -> list[float]:
        """Sequence log-probabilities of (prompt, response) token pairs, in order."""
        scores = [0.0] * len(items)
        lengths = [len(prompt) + len(response) for prompt, response in items]
        with self._clock.busy():
            for group in micro_batches(lengths, rows_per_item=1, max_tokens=self._max_tokens):
                batch = collate([items[i] for i in group]).to(self._device)
                totals = sum_by_row(self._model(batch), batch).tolist()
                for index, total in zip(group, totals, strict=True):
                    scores[index] = total
        return scores

    def usage(self) -> RoleUsage:
        """Busy time and peak memory."""
        return self._clock.usage()
