"""One log file a role; the terminal stays free for the live view."""

import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

LOG_BYTES = 32 << 20
"""A log that is longer becomes ``<role>.log.1``, in the place of the one before: a role keeps twice that at most."""


def setup_logging(role: str, folder: Path, *, log_bytes: int = LOG_BYTES) -> None:
    """Send this process's log to ``folder/<role>.log``."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        handlers=[RotatingFileHandler(folder / f"{role}.log", maxBytes=log_bytes, backupCount=1)],
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logging.captureWarnings(True)


def close_logging() -> None:
    """Close this process's log file, so that its folder may go."""
    logging.captureWarnings(False)
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]:
        root.removeHandler(handler)
        handler.close()
