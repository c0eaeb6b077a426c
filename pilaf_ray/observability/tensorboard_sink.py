"""TensorBoard, if wanted; ``metrics.jsonl`` has everything without it."""

import importlib.util
import logging
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pilaf_ray.errors import ConfigError

logger = logging.getLogger(__name__)

FOLDER = "tensorboard"
"""Where event files lie in a run folder."""


def require_tensorboard() -> None:
    """Raises ConfigError where the package is not installed; nothing is imported."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "logging.tensorboard: the package tensorboard is not installed: install it, or set "
            "logging.tensorboard: false"
        )


class TensorBoardSink:
    """Writes the numbers of each step to an event file; never a reason for a run to stop.

    The first failure is logged as a warning and ends the writing; the run goes on. Every sink has a file of
    its own, named by the time so that readers take those of a run in order.

    Args:
        folder: where event files lie; made if missing.
    """

    def __init__(self, folder: Path) -> None:
        # TensorBoard's own messages: torch's SummaryWriter would bring torch into the controller.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._session, self._summary = Event, SessionLog, Summary
        self._records: Any = None
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter((folder / name).open("xb"))
        except OSError as error:
            self._give_up(error)
        self._add(Event(file_version="brain.Event:2"))

    @property
    def active(self) -> bool:
        """Whether records still reach the event file."""
        return self._records is not None

    def write(self, record: Mapping[str, Any]) -> None:
        """The numbers of one object of ``metrics.jsonl``, at its ``step``; on disk when it returns."""
        values = [
            self._summary.Value(tag=key, simple_value=value)
            for key, value in record.items()
            if key != "step" and isinstance(value, int | float)
        ]
        self._add(self._event(step=record["step"], summary=self._summary(value=values)))

    def cut_after(self, step: int) -> None:
        """Readers forget what any file of the folder said of later steps: they will be done again."""
        self._add(self._event(step=step + 1, session_log=self._session(status=self._session.START)))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._records is not None:
            records, self._records = self._records, None
            try:
                records.close()
            except OSError as error:
                self._give_up(error)

    def _add(self, event: Any) -> None:
        if self._records is None:
            return
        event.wall_time = time.time()
        try:
            self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._records = None
        logger.warning("TensorBoard's file cannot be written, it ends here (metrics.jsonl goes on): %s", error)
