"""Who labelled what, how fast, and how far they agree."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pilaf_ray.console.access import AccessRole, Grant
from pilaf_ray.console.gold import GoldBook
from pilaf_ray.oracle.agreement import agreement_by_annotator, krippendorff_alpha
from pilaf_ray.store.records import LabelEvent, LabelKind


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatorReport:
    """One annotator's work, over the newest 5000 events of the log."""

    name: str
    answers: int
    skips: int
    taken_back: int
    late: int
    seconds: float | None
    """Median time that the page was open for an answer."""
    left_share: float | None
    """Share of the left side among clear preferences: far from ½ is a habit, not a judgement."""
    kappa: float | None
    shared: int
    gold_right: int
    gold_asked: int
    newest_at: int | None
    paused: bool
    invited: bool
    """Whether they hold a valid token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatorReports:
    """All annotators, and their agreement as a group."""

    annotators: Sequence[AnnotatorReport]
    alpha: float | None
    shared_pairs: int


def annotator_reports(events: Sequence[LabelEvent], grants: Sequence[Grant], gold: GoldBook) -> AnnotatorReports:
    """Reports from the log; withdrawn answers count as taken back only."""
    withdrawn = {event.withdraws for event in events if event.kind is LabelKind.WITHDRAWAL and not event.late}
    standing = [e for e in events if e.kind is not LabelKind.WITHDRAWAL and e.sequence not in withdrawn]
    votes: dict[str, dict[str, float]] = {}
    for event in standing:
        if event.kind is LabelKind.VOTE and event.probability is not None and event.annotator:
            votes.setdefault(f"{event.pair_id}/{event.sampling}", {})[event.annotator] = event.probability
    agreement = {found.annotator: found for found in agreement_by_annotator(votes)}
    valid = {grant.name: grant for grant in grants if grant.revoked is None}
    able = [name for name, grant in valid.items() if grant.role is not AccessRole.VIEWER]
    names = dict.fromkeys([*able, *(str(e.annotator) for e in events)])
    reports = []
    for name in names:
        mine = [event for event in standing if event.annotator == name]
        given = [event for event in mine if event.kind is LabelKind.VOTE]
        details = [json.loads(event.details) for event in given if event.details]
        seconds = [float(d["seconds"]) for d in details if d["seconds"] is not None]
        sides = [d["choice"][0] for d in details if d["choice"] not in ("equal", "both_bad")]
        found = agreement.get(name)
        right, asked = gold.accuracy(name)
        reports.append(
            AnnotatorReport(
                name=name,
                answers=len(given),
                skips=len(mine) - len(given),
                taken_back=sum(e.sequence in withdrawn for e in events if e.annotator == name),
                late=sum(event.late for event in mine),
                seconds=median(seconds) if seconds else None,
                left_share=sides.count("a") / len(sides) if sides else None,
                kappa=found.kappa if found else None,
                shared=found.shared if found else 0,
                gold_right=right,
                gold_asked=asked,
                newest_at=max((event.created_at for event in mine), default=None),
                paused=valid[name].paused if name in valid else False,
                invited=name in valid,
            )
        )
    shared = sum(len(given) > 1 for given in votes.values())
    return AnnotatorReports(annotators=reports, alpha=krippendorff_alpha(votes), shared_pairs=shared)
