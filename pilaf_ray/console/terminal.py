"""A run on one terminal screen, for people on a login node."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pilaf_ray.console.app import open_reader
from pilaf_ray.console.forecast import forecast
from pilaf_ray.console.ledger_reader import LedgerReader
from pilaf_ray.console.records import RunRecords
from pilaf_ray.console.rendering import WAITS, ago, clock_time, number, share
from pilaf_ray.observability.live_view import sparkline

KEYS = ("loss", "reward/policy", "kl/policy", "train/margin", "train/accuracy", "response/tokens", "age/max")
EVENTS = 6


def screen(records: RunRecords, ledger: LedgerReader, *, now: float) -> RenderableType:
    """All that fits one screen; text of models and messages is never read as markup."""
    records.refresh()
    counts, status, state = ledger.counts(), records.status(), records.state(now)
    plan = forecast(records, counts, now=now)
    head = Text.assemble(
        (records.name, "bold"), f"  {state}", f"  {status.phase}" if status and state == "running" else ""
    )
    parts: list[RenderableType] = [head]
    if status is not None and state == "running" and status.waits_for:
        parts.append(Text(WAITS[status.waits_for], style="yellow"))
    left = f", {ago(plan.seconds_left)} left" if plan.seconds_left is not None else ""
    parts.append(
        Text(
            f"step {plan.steps} of {plan.max_steps}{left}   labels {plan.labels} of {plan.budget}   "
            f"{number(plan.pairs_per_second, 3)} pairs/s"
        )
    )
    if records.evaluations:
        newest = records.evaluations[-1]
        parts.append(
            Text(
                f"held-out at step {newest.step}: reward {newest.reward:.3f} ± {newest.reward_se:.3f}, "
                f"KL {newest.kl:.3f}, J {newest.objective:.3f}"
            )
        )
    curves = Table(box=None, pad_edge=False, show_header=False)
    for key in KEYS:
        values = [float(row[key]) for row in records.metrics if isinstance(row.get(key), int | float)]
        if values:
            curves.add_row(key, Text(number(values[-1])), Text(sparkline(values), style="green"))
    parts.append(curves)
    parts.append(Text("pairs  " + "   ".join(f"{name} {count}" for name, count in counts.items() if count)))
    if status is not None and status.roles:
        parts.append(Text("busy   " + "   ".join(f"{r.role} {share(r.busy)} ({r.in_flight})" for r in status.roles)))
    parts += _events(list(records.events)[-EVENTS:])
    return Group(*parts)


def _events(events: Sequence[dict[str, object]]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for event in events:
        details = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event"))
        lines.append(Text(f"{clock_time(float(str(event['time'])))}  {event['event']}  {details}", style="dim"))
    return lines


def show(run: Path, *, once: bool, console: Console, seconds: float = 1.0) -> None:
    """Draw the screen once, or until Ctrl-C."""
    records = RunRecords(run)
    ledger = open_reader(run, records.config)
    if once or not console.is_terminal:
        console.print(screen(records, ledger, now=time.time()))
    else:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            try:
                while True:
                    live.update(screen(records, ledger, now=time.time()), refresh=True)
                    time.sleep(seconds)
            except KeyboardInterrupt:
                pass
    ledger.close()
