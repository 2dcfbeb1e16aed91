"""Pictures for people: PNG files with a line of text above."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from trainer.runtime import files
from trainer.storage.places import Place

HEADER = 22
GAP = 4
_BACKGROUND, _INK = (255, 255, 255), (30, 30, 30)


def _as_rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey images get three equal channels, a fourth channel is not shown."""
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image[..., :3]


def save_grid(path: Place, title: str, columns: Sequence[tuple[str, NDArray[np.uint8]]]) -> None:
    """Write one row for each example and one column for each (name, images), images uint8 (examples, h, w, c)."""
    examples, height, width = columns[0][1].shape[:3]
    size = (len(columns) * (width + GAP) - GAP, 2 * HEADER + examples * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((4, 3), title, _INK, font)
    for column, (name, images) in enumerate(columns):
        left = column * (width + GAP)
        draw.text((left + 4, HEADER + 1), name, _INK, font)
        for row, image in enumerate(images):
            sheet.paste(Image.fromarray(_as_rgb(image)), (left, 2 * HEADER + row * (height + GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def save_sheet(path: Place, title: str, pictures: Sequence[tuple[str, NDArray[np.uint8]]], columns: int = 4) -> None:
    """Write a contact sheet of equally large (name, picture), pictures uint8 (h, w, 3), in rows."""
    height, width = pictures[0][1].shape[:2]
    rows = -(-len(pictures) // columns)
    cell = (width + GAP, height + HEADER)
    sheet = Image.new("RGB", (columns * cell[0] - GAP, HEADER + rows * cell[1]), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    draw.text((4, 3), title, _INK, font)
    for place, (name, picture) in enumerate(pictures):
        left, top = place % columns * cell[0], HEADER + place // columns * cell[1]
        sheet.paste(Image.fromarray(picture), (left, top))
        draw.text((left + 2, top + height + 2), name[-(width // 7) :], _INK, font)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
