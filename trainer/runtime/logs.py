"""The trainer's own log lines: for people beside a live bar, or for machines as one JSON object a line."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, ClassVar

from tqdm import tqdm

FIELDS = ("severity", "time", "step", "worker", "message")


class Where:
    """Where the run stands, for lines that do not say it themselves."""

    workers: ClassVar[int] = 1
    worker: ClassVar[int] = 0
    step: ClassVar[int | None] = None


def entry(severity: str, message: str) -> dict[str, Any]:
    """One line for machines: severity as Google Cloud names it, time in UTC, step, worker, message."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return dict(zip(FIELDS, (severity, now, Where.step, Where.worker, message), strict=True))


class _BesideTheBar(logging.Handler):
    """Writes log lines to stderr without tearing the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = f"[worker {Where.worker}] " if Where.workers > 1 else ""
        mark += f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        try:
            tqdm.write(mark + self.format(record), file=sys.stderr)
        except OSError:  # whoever read our lines is gone; the training goes on
            self.handleError(record)


class _JsonLines(logging.Handler):
    """Writes each record as one JSON object."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(json.dumps(entry(record.levelname, self.format(record).rstrip())) + "\n")
            sys.stderr.flush()
        except OSError:
            self.handleError(record)


def configure_logs(log_format: str) -> None:
    """Send the trainer's own log lines to stderr: `text` as they are, `json` for the relay, together with the libraries' own."""
    handler = _JsonLines() if log_format == "json" else _BesideTheBar()
    logging.captureWarnings(log_format == "json")  # they have several lines, and no severity of their own
    if log_format == "json":
        logging.getLogger().handlers = [handler]
        logging.getLogger("tensorflow").handlers = []  # its lines reach the root too, and would be written twice
    logger = logging.getLogger("trainer")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
