"""What the terminal shows, on a terminal and off it."""

import io

from rich.console import Console

from pilaf_ray.observability.live_view import LiveView, sparkline


def metrics(step: int, *, reward: float | None = 0.4) -> dict[str, float | None]:
    return {
        "step": step,
        "loss": 0.6912,
        "reward/policy": reward,
        "kl/policy": 0.05,
        "train/margin": 0.013,
        "age/max": 1,
    }


def view(console: Console) -> LiveView:
    return LiveView(
        console=console,
        name="demo",
        max_steps=40,
        max_staleness_steps=2,
        roles=lambda: {"generator": (12, 0.93), "learner": (0, 0.4)},
    )


def test_sparkline_maps_the_range_of_the_last_values() -> None:
    assert sparkline([0.0, 7.0]) == "▁█"
    assert sparkline([float(i) for i in range(8)]) == "▁▂▃▄▅▆▇█"
    assert sparkline([99.0, 0.0, 7.0], width=2) == "▁█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""


def test_without_a_terminal_one_line_a_step_and_a_phase() -> None:
    file = io.StringIO()
    with view(Console(file=file, width=200)) as screen:
        screen.phase("training")
        screen.step(metrics(1), pairs=8)
        screen.step(metrics(2, reward=None), pairs=8)
    phase, first, second = file.getvalue().splitlines()
    assert phase.endswith("s] training")
    assert "step 1/40 loss 0.691  reward 0.40  kl 0.05  margin 0.01  age 1 of 2" in first
    assert "step 2/40" in second and "reward –" in second


def test_on_a_terminal_the_panel_is_drawn() -> None:
    file = io.StringIO()
    with view(Console(file=file, width=120, force_terminal=True)) as screen:
        screen.phase("training")
        screen.step(metrics(3), pairs=8)
    shown = file.getvalue()
    for text in ("demo  training", "generator", "93%", "idle", "step 3/40", "age 1 of 2"):
        assert text in shown, text
