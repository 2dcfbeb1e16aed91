"""Real picture files of every kind that users bring, cut from the sample; and the damage that they meet."""

import io
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from trainer.data.sample import SAMPLE_FOLDER

SAMPLE_FILES = sorted((SAMPLE_FOLDER / "test").glob("*.jpg")) + sorted((SAMPLE_FOLDER / "train").glob("*.jpg"))


def photo(number: int, height: int = 64, width: int = 64) -> np.ndarray:
    """A piece of a tissue photograph, uint8 (height, width, 3)."""
    whole = np.asarray(Image.open(SAMPLE_FILES[number % len(SAMPLE_FILES)]))[:, 256:]
    return np.ascontiguousarray(np.tile(whole, (3, 3, 1))[:height, :width])


def label(number: int, height: int = 64, width: int = 64) -> np.ndarray:
    """The label map of the same piece, uint8 (height, width, 3)."""
    whole = np.asarray(Image.open(SAMPLE_FILES[number % len(SAMPLE_FILES)]))[:, :256]
    return np.ascontiguousarray(np.tile(whole, (3, 3, 1))[:height, :width])


def as_kind(pixels: np.ndarray, channels: int, bits: int) -> np.ndarray:
    """The same picture with other channels and depth; 16 bits use the low byte too."""
    grey = pixels.mean(-1, keepdims=True).round().astype(np.uint8)
    kinds = {1: grey, 3: pixels, 4: np.concatenate([pixels, grey], -1)}
    chosen = kinds[channels]
    return chosen if bits == 8 else (chosen.astype(np.uint16) * 257 ^ np.uint16(0x35))


def encode(pixels: np.ndarray, kind: str, **settings: object) -> bytes:
    """The bytes of a picture file: png, jpeg, webp, bmp or tiff."""
    if pixels.dtype == np.uint16:
        if kind == "png":
            return bytes(imagecodecs.png_encode(pixels))
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, **settings)
        return buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, format=kind.upper(), **settings)
    return buffer.getvalue()


def write_pairs(folder: Path, count: int, kind: str = "png", size: tuple[int, int] = (64, 64)) -> None:
    """Side-by-side pictures [label | photo] with names p000, p001, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        both = np.concatenate([label(number, *size), photo(number, *size)], axis=1)
        (folder / f"p{number:03d}.{kind}").write_bytes(encode(both, kind))
