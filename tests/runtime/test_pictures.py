"""Pictures for people: each image stands where its title says."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.disks import small_disk
from trainer.runtime import pictures


def test_grid_shows_each_image_in_its_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey, colour = (
        rng.integers(0, 256, (2, 2, 40, 50, 3), np.uint8)[0][..., :1],
        rng.integers(0, 256, (2, 40, 50, 4), np.uint8),
    )
    pictures.save_grid(tmp_path / "deep" / "grid.png", "step 5", [("input", grey), ("output", colour)])
    sheet = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    top, left = 2 * pictures.HEADER + 44, 54
    assert sheet.shape == (2 * pictures.HEADER + 84, 104, 3)
    np.testing.assert_array_equal(sheet[top : top + 40, left : left + 50], colour[1][..., :3])
    np.testing.assert_array_equal(sheet[top : top + 40, :50], np.repeat(grey[1], 3, -1))
    assert (sheet[: pictures.HEADER] < 100).any(), "the title is drawn"


def test_a_sheet_shows_each_picture_in_its_cell(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    shown = [(f"p{number}", rng.integers(0, 256, (30, 40, 3), np.uint8)) for number in range(5)]
    pictures.save_sheet(tmp_path / "sheet.png", "five", shown, columns=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    width, height = 40 + pictures.GAP, 30 + pictures.HEADER
    assert sheet.shape == (pictures.HEADER + 2 * height, 3 * width - pictures.GAP, 3)
    for place, (_, picture) in enumerate(shown):
        left, top = place % 3 * width, pictures.HEADER + place // 3 * height
        np.testing.assert_array_equal(sheet[top : top + 30, left : left + 40], picture)
        assert (sheet[top + 30 : top + height, left : left + 40] < 100).any(), "its name is drawn below"
    assert (sheet[pictures.HEADER + height :, 2 * width :] == 255).all(), "there is no sixth"


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path: Path) -> None:
    image = np.zeros((1, 8, 8, 3), np.uint8)
    pictures.save_grid(tmp_path / "grid.png", "old", [("input", image)])
    before = (tmp_path / "grid.png").read_bytes()
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        path = disk.path / "grid.png"
        path.write_bytes(before)
        disk.fill()
        noise = np.random.default_rng(2).integers(0, 256, (4, 64, 64, 3), np.uint8)
        with pytest.raises(OSError, match="No space left on device"):
            pictures.save_grid(path, "new", [("input", noise)])
        assert path.read_bytes() == before
        disk.free()
        assert list(disk.path.iterdir()) == [path]
