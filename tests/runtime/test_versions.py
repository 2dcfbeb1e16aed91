"""What a run notes of what ran, and what is said when that has changed."""

import logging
import platform

import keras
import pytest
import tensorflow as tf

from trainer import __version__
from trainer.runtime.versions import run_notes, warn_of_changes, with_earlier

ROUNDING = "results will agree to rounding, not bit for bit"


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        ({"image": "b"}, [("INFO", "since the run began: image a -> b")]),
        ({"image": "b", "revision": "2"}, [("INFO", "since the run began: image a -> b, revision 1 -> 2")]),
        ({"threads": "4"}, [("WARNING", "since the run began: threads 2 -> 4; results will agree to rounding, not bit for bit")]),
        (
            {"threads": "4", "image": "b", "tensorflow": "2.21.0"},
            [
                ("INFO", "since the run began: image a -> b"),
                ("WARNING", f"since the run began: threads 2 -> 4, tensorflow 2.20.0 -> 2.21.0; {ROUNDING}"),
            ],
        ),
        ({"new": "1"}, []),
        ({}, []),
    ],
)
def test_another_image_changes_no_bits(
    changed: dict[str, str], lines: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("trainer").propagate = True
    before = {"threads": "2", "image": "a", "revision": "1", "tensorflow": "2.20.0"}
    with caplog.at_level(logging.INFO):
        warn_of_changes(before, before | changed)
    assert [(record.levelname, record.message) for record in caplog.records] == lines


@pytest.mark.parametrize(
    ("now", "image", "revision"),
    [
        ({}, "a", "1"),
        ({"revision": "1"}, "a", "1"),
        ({"revision": "2"}, None, "2"),
        ({"image": "b"}, "b", None),
        ({"image": "b", "revision": "2"}, "b", "2"),
    ],
)
def test_what_a_start_is_not_told_of_its_image_stays_as_it_was(
    now: dict[str, str], image: str | None, revision: str | None
) -> None:
    kept = with_earlier({"image": "a", "revision": "1", "threads": "2"}, {"threads": "4", **now})
    assert (kept.get("image"), kept.get("revision"), kept["threads"]) == (image, revision, "4")


@pytest.mark.parametrize(("before", "now", "said"), [("8", "4", True), ("4", "4", False), (None, "4", False)])
def test_batch_normalisation_over_other_parts_is_another_computation(
    before: str | None, now: str, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Not a matter of rounding: it is said apart, with both sizes."""
    logging.getLogger("trainer").propagate = True

    def notes(together: str | None) -> dict[str, str]:
        return {"threads": "2"} | ({"pairs normalised together": together} if together else {})

    with caplog.at_level(logging.INFO):
        warn_of_changes(notes(before), notes(now))
    line = "model.norm=batch normalises over 4 pairs at a time instead of 8: from here on it is another computation"
    first = [(record.levelname, record.message) for record in caplog.records][:1]
    assert first == ([("WARNING", line)] if said else [])


def test_what_ran_is_noted_as_it_is_installed() -> None:
    assert run_notes(3, "abc") == {
        "trainer": __version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": "3",
        "data": "abc",
    }
