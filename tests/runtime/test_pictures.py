"""Pictures for people: each image stands where its title says."""

from pathlib import Path

import numpy as np
from PIL import Image

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
