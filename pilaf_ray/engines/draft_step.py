"""One step of an engine that drafts ahead: the policy writes some tokens of each request, the reference judges them.

::

    vLLM's forward over what it scheduled (policy only) ─▶ logits ─▶ first drafts
    policy over the drafts, a token a request at a time ─▶ logits ─▶ next drafts        (window − 1 times)
    reference over what was scheduled and all drafts of the mixed requests, at once ─▶ kept or replaced

A plain request takes all of its drafts. A mixed one takes them up to the first that is replaced, and that
one's replacement. Either ends like after ordinary steps: all tokens but the last are in both caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pilaf_ray.engines.reference_shelf import POLICY, REFERENCE, ReferenceShelf
from pilaf_ray.engines.row_draws import Row, draft, mix_logits, own_logprobs, row_logprobs, settle
from pilaf_ray.engines.side_forward import Stretch, side_states


@dataclass(kw_only=True, slots=True)
class DraftingRow:
    """A request in the step under way."""

    row: Row
    scheduled: Stretch
    """The tokens that vLLM scheduled."""
    count: int
    """Tokens that it may get in this step; 0 where its prompt is not complete yet."""
    ends: frozenset[int]
    """Tokens that end its response."""
    drafts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """What it got."""
    logprobs: list[float] = field(default_factory=list)
    """Their behaviour log-probabilities."""

    @property
    def drafting(self) -> bool:
        """It may get another draft."""
        return len(self.drafts) < self.count and not (self.drafts and self.drafts[-1] in self.ends)

    def take(self, token: int, logprob: float) -> None:
        """The next token of the response."""
        self.tokens.append(token)
        self.logprobs.append(logprob)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stage:
    """What the policy gave at the drafts of one round, rows of mixed requests only."""

    places: dict[int, int]
    """Request's place in the batch → row of the tensors."""
    logits: Tensor
    logprobs: Tensor
    drafts: Tensor


class DraftStep:
    """Draft and judge; ``runner`` is vLLM's model runner with an interpolated model."""

    def __init__(self, runner: Any, rows: Sequence[DraftingRow]) -> None:
        self._runner = runner
        self._rows = rows
        self._stages: list[_Stage] = []

    def draft(self, logits: Tensor) -> None:
        """Draft from ``logits``, (requests, vocab), of the policy behind the scheduled tokens, and go on from there."""
        places = [place for place, row in enumerate(self._rows) if row.drafting]
        logits = logits[places]
        while places:
            self._draft_once(places, logits)
            places = [place for place in places if self._rows[place].drafting]
            if places:
                ahead = [self._last_draft(place) for place in places]
                logits = self._runner.model.policy.compute_logits(side_states(self._runner, POLICY, ahead))

    def _draft_once(self, places: Sequence[int], logits: Tensor) -> None:
        rows = [self._rows[place] for place in places]
        draws = [row.row.draw for row in rows]
        logprobs = row_logprobs(logits, draws)
        drafts = draft(logprobs, draws, [len(row.row.output) + len(row.drafts) for row in rows])
        chosen = logprobs.gather(1, drafts.unsqueeze(1)).squeeze(1)
        for row, token, logprob in zip(rows, drafts.tolist(), chosen.tolist(), strict=True):
            row.drafts.append(token)
            if not row.row.coefficient:
                row.take(token, logprob)
        mixed = [number for number, row in enumerate(rows) if row.row.coefficient]
        self._stages.append(
            _Stage(
                places={places[number]: at for at, number in enumerate(mixed)},
                logits=logits[mixed],
                logprobs=logprobs[mixed],
                drafts=drafts[mixed],
            )
        )

    def _last_draft(self, place: int) -> Stretch:
        row = self._rows[place]
        start = row.scheduled.start + len(row.scheduled.tokens) + len(row.drafts) - 1
        return Stretch(row=row.scheduled.row, start=start, tokens=row.drafts[-1:])

    def judge(self, shelf: ReferenceShelf) -> None:
        """Keep or replace the drafts of mixed requests; what both networks gave the tokens goes to ``shelf``."""
        mixed = [place for place, row in enumerate(self._rows) if row.row.coefficient]
        if not mixed:
            return
        reference, offsets = self._reference_logits(mixed)
        alive = [place for place in mixed if self._rows[place].drafts]
        passes = sum(self._rows[place].row.draw is not None for place in alive)
        for number, stage in enumerate(self._stages):
            alive = [place for place in alive if place in stage.places]
            if not alive:
                break
            kept = self._judge_once(stage, alive, reference[[offsets[place] + number for place in alive]], shelf)
            alive = [place for place, still in zip(alive, kept, strict=True) if still]
        drawn = [row for row in self._rows if row.row.coefficient and row.row.draw]
        shelf.counter.add(drafted=sum(len(row.drafts) for row in drawn), judged=0, kept=torch.tensor(0), passes=passes)

    def _reference_logits(self, mixed: Sequence[int]) -> tuple[Tensor, dict[int, int]]:
        """The reference's logits at every draft, (drafts, vocab), and where those of each request begin."""
        stretches: list[Stretch] = []
        wanted: list[int] = []
        offsets: dict[int, int] = {}
        tokens = 0
        for place in mixed:
            row = self._rows[place]
            seen = (*row.scheduled.tokens, *row.drafts[:-1])
            stretches.append(Stretch(row=row.scheduled.row, start=row.scheduled.start, tokens=seen))
            tokens += len(seen)
            offsets[place] = len(wanted)
            wanted += range(tokens - len(row.drafts), tokens)
        states = side_states(self._runner, REFERENCE, stretches)
        logits: Tensor = self._runner.model.reference.compute_logits(states[wanted])
        return logits, offsets

    def _judge_once(self, stage: _Stage, places: list[int], reference: Tensor, shelf: ReferenceShelf) -> list[bool]:
        """One position of each request: its token, and whether that is the draft."""
        at = [stage.places[place] for place in places]
        rows = [self._rows[place] for place in places]
        draws = [row.row.draw for row in rows]
        positions = [len(row.row.output) + len(row.tokens) for row in rows]
        policy = stage.logits[at]
        coefficients = torch.tensor([row.row.coefficient for row in rows], device=policy.device)
        mixed = row_logprobs(mix_logits(policy, reference, coefficients), draws)
        tokens, kept = settle(stage.logprobs[at], mixed, stage.drafts[at], draws, positions)
        logprobs = mixed.gather(1, tokens.unsqueeze(1)).squeeze(1)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.take(token, logprob)
        drawn = [number for number, draw in enumerate(draws) if draw]
        if drawn:
            own = own_logprobs(policy[drawn], reference[drawn], tokens[drawn])
            shelf.records.add([draw.record for draw in draws if draw], [positions[number] for number in drawn], own)
            shelf.counter.add(drafted=0, judged=len(drawn), kept=kept[drawn], passes=0)
        return [bool(still) for still in kept.tolist()]
