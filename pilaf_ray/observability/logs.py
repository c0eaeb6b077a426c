"""One log file a role; the terminal stays free for the live view."""

import logging
from pathlib import Path


def setup_logging(role: str, folder: Path) -> None:
    """Send this process's log to ``folder/<role>.log``."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=folder / f"{role}.log",
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
