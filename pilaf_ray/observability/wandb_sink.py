"""Weights & Biases, if wanted; ``metrics.jsonl`` has everything without it."""

import logging
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

WandbMode = Literal["auto", "offline", "disabled"]


class WandbSink:
    """Tracks a run under one id, also over resumes; never a reason for a run to stop.

    The first failure is logged as a warning and ends tracking; the run goes on.

    Args:
        mode: ``auto`` is online where a key is configured and offline otherwise.
        folder: where wandb keeps its files.
        module: the wandb module; imported here when not given and not disabled.
    """

    def __init__(
        self,
        *,
        project: str,
        run_id: str,
        mode: WandbMode,
        folder: Path,
        config: Mapping[str, Any] | None = None,
        module: Any = None,
    ) -> None:
        self._run: Any = None
        self._wandb = module
        if mode == "disabled":
            return
        if self._wandb is None:
            try:
                import wandb
            except ImportError as error:
                logger.warning("wandb cannot be imported, tracking is off: %s", error)
                return
            self._wandb = wandb
        resolved = "online" if mode == "auto" and has_wandb_login(os.environ) else "offline"
        self._attempt(self._start, project, run_id, resolved, folder, dict(config or {}))

    @property
    def active(self) -> bool:
        """Whether records still reach wandb."""
        return self._run is not None

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one object of ``metrics.jsonl``, its ``step`` included; None values are left out."""
        if self._run is not None:
            self._attempt(self._run.log, {key: value for key, value in record.items() if value is not None})

    def alert(self, title: str, text: str) -> None:
        """Send an alert to those who follow the run."""
        if self._run is not None:
            self._attempt(self._run.alert, title, text)

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log samples as a table; all rows have the keys of the first."""
        if self._run is not None and rows:
            self._attempt(self._table, step, rows)

    def write_checkpoint(self, step: int, folder: Path) -> None:
        """Keep a model folder as the next version of the run's artifact; its upload goes on beside the run."""
        if self._run is not None:
            self._attempt(self._artifact, step, folder)

    def close(self) -> None:
        """Finish the run; a second call does nothing."""
        if self._run is not None:
            self._attempt(self._run.finish)
            self._run = None

    def _start(self, project: str, run_id: str, mode: str, folder: Path, config: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        run = self._wandb.init(
            project=project,
            id=run_id,
            name=run_id,
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=config,
            settings=self._wandb.Settings(silent=True, init_timeout=60),
        )
        # Steps come again after a resume; wandb's own counter would refuse them.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        self._run = run

    def _table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(rows[0])
        table = self._wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in rows])
        self._run.log({"step": step, "samples": table})

    def _artifact(self, step: int, folder: Path) -> None:
        artifact = self._wandb.Artifact(f"{self._run.id}-policy", type="model", metadata={"step": step})
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact, aliases=[f"step-{step}"])

    def _attempt(self, action: Callable[..., object], *arguments: Any) -> None:
        # The one place where wandb may fail: its own errors, the network and the disk.
        try:
            action(*arguments)
        except (self._wandb.Error, OSError) as error:
            self._run = None
            logger.warning("wandb failed, tracking is off from here on (metrics.jsonl goes on): %s", error)


def has_wandb_login(environment: Mapping[str, str]) -> bool:
    """Whether wandb would find an API key: WANDB_API_KEY, or an entry in the netrc file."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = environment.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc.netrc(environment.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
