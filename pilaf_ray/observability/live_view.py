"""The terminal while a run is under way: a live panel, or plain lines where there is no terminal."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], *, width: int = 40) -> str:
    """The last ``width`` values as bars between their minimum and maximum."""
    shown = values[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in shown)


class LiveView:
    """Shows what each role is doing and how the run goes.

    Args:
        max_steps: the last step, where it is known.
        roles: name → (calls under way, utilisation) of each role now.
    """

    def __init__(
        self,
        *,
        console: Console,
        name: str,
        max_steps: int | None,
        max_staleness_steps: int,
        roles: Callable[[], dict[str, tuple[int, float]]],
    ) -> None:
        self._console = console
        self._name = name
        self._max_steps = max_steps
        self._bound = max_staleness_steps
        self._roles = roles
        self._started = time.monotonic()
        self._phase = "starting"
        self._last: dict[str, Any] = {}
        self._pairs = 0
        self._training_since: float | None = None
        self._steps_done = 0
        self._rewards: list[float] = []
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2)

    def __enter__(self) -> "LiveView":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    @property
    def current_phase(self) -> str:
        """What the run as a whole is doing."""
        return self._phase

    def phase(self, text: str) -> None:
        """Say what the run as a whole is doing."""
        self._phase = text
        if text == "training" and self._training_since is None:
            self._training_since = time.monotonic()
        if not self._console.is_terminal:
            self._console.print(f"[{time.monotonic() - self._started:5.0f} s] {text}", markup=False)

    def step(self, metrics: dict[str, Any], *, pairs: int) -> None:
        """Show a finished step."""
        self._last = metrics
        self._pairs += pairs
        self._steps_done += 1
        if metrics.get("reward/policy") is not None:
            self._rewards.append(metrics["reward/policy"])
        if not self._console.is_terminal:
            self._console.print(
                f"[{time.monotonic() - self._started:5.0f} s] step {metrics['step']}{self._of_all} {self._figures()}",
                markup=False,
            )

    @property
    def _of_all(self) -> str:
        return "" if self._max_steps is None else f"/{self._max_steps}"

    def _figures(self) -> str:
        last = self._last
        elapsed = time.monotonic() - (self._training_since or self._started)
        left = ""
        if self._max_steps is not None:
            seconds = (self._max_steps - last["step"]) * elapsed / max(1, self._steps_done)
            left = f"  {seconds:.0f} s left"
        # A run against a reward model has no margin of its own; what matters there is whether the model can tell.
        accuracy = last.get("reward_model/accuracy")
        judge = "" if accuracy is None else f"r̂ accuracy {accuracy:.2f}  "
        return (
            f"loss {last['loss']:.3f}  reward {_number(last['reward/policy'])}  kl {_number(last['kl/policy'])}  "
            f"margin {_number(last.get('train/margin'))}  {judge}age {last['age/max']} of {self._bound}  "
            f"{self._pairs / elapsed:.2f} pairs/s{left}"
        )

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("role", "calls under way", "utilisation"):
            table.add_column(column, justify="left" if column == "role" else "right")
        for role, (calls, share) in self._roles().items():
            table.add_row(role, str(calls) if calls else "idle", f"{share:.0%}")
        seconds = time.monotonic() - self._started
        parts: list[RenderableType] = [Text(f"{self._name}  {self._phase}  {seconds:.0f} s", style="bold"), table]
        if self._last:
            parts.append(Text(f"step {self._last['step']}{self._of_all}  {self._figures()}"))
            parts.append(Text(f"reward {sparkline(self._rewards)}", style="cyan"))
        return Group(*parts)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
