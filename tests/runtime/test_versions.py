"""What a run notes of what ran, and what is said when that has changed."""

import logging

import pytest

from trainer.runtime.versions import warn_of_changes, with_earlier


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        ({"image": "b"}, [("INFO", "since the run began: image a -> b")]),
        ({"image": "b", "revision": "2"}, [("INFO", "since the run began: image a -> b, revision 1 -> 2")]),
        ({"threads": "4"}, [("WARNING", "since the run began: threads 2 -> 4; results will agree to rounding, not bit for bit")]),
        ({}, []),
    ],
)
def test_another_image_changes_no_bits(
    changed: dict[str, str], lines: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("trainer").propagate = True
    before = {"threads": "2", "image": "a", "revision": "1"}
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
