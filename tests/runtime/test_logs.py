"""The trainer's own lines: for people beside a bar, for machines one JSON object each."""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from trainer.runtime.logs import FIELDS, Where, configure_logs


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Afterwards all loggers are as they were."""
    loggers = [logging.getLogger(name) for name in ("", "trainer", "tensorflow", "py.warnings")]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for name, value in (("worker", 0), ("workers", 1), ("step", None)):
        monkeypatch.setattr(Where, name, value)
    yield
    logging.captureWarnings(False)
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("workers", "level", "line"),
    [
        (1, logging.INFO, "step 5\n"),
        (1, logging.WARNING, "warning: step 5\n"),
        (2, logging.INFO, "[worker 1] step 5\n"),
        (2, logging.ERROR, "[worker 1] error: step 5\n"),
        (1, logging.DEBUG, ""),
    ],
)
def test_a_line_for_people_says_who_and_how_bad(workers: int, level: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("text")
    Where.workers, Where.worker = workers, workers - 1
    logging.getLogger("trainer.train.loop").log(level, "step %d", 5)
    assert capsys.readouterr().err == line


def test_a_line_for_machines_is_one_object_with_all_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json")
    Where.workers, Where.worker, Where.step = 2, 1, 7
    logging.getLogger("trainer").warning('two\nlines, "quoted" in läuft\n')
    logging.getLogger("tensorflow").warning("of TensorFlow")
    warnings.warn("of Python", stacklevel=1)
    ours, tensorflows, pythons = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert tuple(ours) == FIELDS
    age = datetime.now(UTC) - datetime.fromisoformat(ours.pop("time"))
    assert timedelta(0) <= age < timedelta(minutes=5)
    assert ours == {"severity": "WARNING", "step": 7, "worker": 1, "message": 'two\nlines, "quoted" in läuft'}
    assert (tensorflows["message"], tensorflows["severity"]) == ("of TensorFlow", "WARNING"), "once"
    assert "of Python" in pythons["message"]


class Gone(io.StringIO):
    """A reader who has gone away."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_reader_who_is_gone_stops_nothing(
    log_format: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logs(log_format)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", Gone())
        logging.getLogger("trainer").info("nobody reads it")
    logging.getLogger("trainer").info("somebody does")
    assert capsys.readouterr().err.count("somebody does") == 1
