"""What a person sees while it trains."""

import io
import logging

import pytest

from trainer.runtime.progress import Progress


def test_without_a_terminal_progress_is_a_plain_line(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("trainer").propagate = True
    progress = Progress(0, 10, 2)
    with caplog.at_level(logging.INFO):
        progress.update(5, 3.0, {"l1": 9.0})
        progress.update(10, 3.0, {"discriminator": 0.5, "generator_gan": 1.25, "l1": 8.0})
    assert [record.message for record in caplog.records] == ["step 10/10  3.0 images/s  D 0.5  G 1.25  L1 8  left 0:00"]


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(0, 10, 1)
    progress.update(5, 3.0, {"l1": 9.0})
    progress.close()
    assert "50%" in terminal.getvalue()
    assert "step 5/10" in terminal.getvalue()
    assert "L1 9" in terminal.getvalue()
