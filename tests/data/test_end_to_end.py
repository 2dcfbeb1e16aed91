"""Picture files -> `prepare` -> batches, against the same files in NumPy: each layout, depth and direction."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.helpers import plain_pipeline
from tests.helpers.images import as_kind, encode, label, photo
from tests.helpers.settings import small_config
from trainer.data.images import encode_png
from trainer.data.pipeline import PairData, Specs, elements
from trainer.data.prepare import Options, prepare
from trainer.data.records import ImageSpec, read_manifest

BATCH, SEED = 2, 5
COUNTS = {"train": 5, "test": 3}
STEPS = range(3, 9)  # of two batches an epoch, so that they begin in an epoch and lie in four
# The pipeline filters in single precision; 16 bits are steps of 3e-5. What is not filtered is exact but for the last bit.
FILTERED, COPIED = 1e-5, 2.5e-7

Kind = tuple[int, int, str]  # channels, bits, format
Draw = Callable[[Image.Image], bytes]


class Case(NamedTuple):
    """Pictures of two kinds and what is asked of the pipeline."""

    input: Kind
    target: Kind
    layout: str
    height: int
    width: int
    size: tuple[int, int]
    labels: str = "none"
    direction: str = "forward"
    jitter: int = 0
    mirror: bool = False


CASES = {
    "side by side, shrunk": Case((3, 8, "png"), (3, 8, "png"), "side_by_side", 75, 62, (32, 48), jitter=7, mirror=True),
    "labels from side by side, reversed": Case(
        (3, 8, "bmp"), (3, 8, "bmp"), "side_by_side", 50, 41, (48, 32), "input", "reverse", 5, True
    ),
    "16-bit grey to 16-bit colour, enlarged": Case((1, 16, "tiff"), (3, 16, "png"), "folders", 31, 45, (64, 64), jitter=4),
    "4 channels to grey labels, reversed, mirrored": Case(
        (4, 8, "png"), (1, 8, "bmp"), "folders", 37, 80, (32, 32), "target", "reverse", mirror=True
    ),
    "16-bit 4 channels side by side, reversed": Case(
        (4, 16, "tiff"), (4, 16, "tiff"), "side_by_side", 40, 40, (32, 48), direction="reverse", jitter=9
    ),
    "labels on both sides of 8 and 16 bits": Case(
        (1, 16, "png"), (3, 8, "webp"), "folders", 64, 64, (32, 48), "both", jitter=3, mirror=True
    ),
}


def sides(case: Case, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of both pictures of a pair."""
    size = case.height, case.width
    return as_kind(label(number, *size), *case.input[:2]), as_kind(photo(number, *size), *case.target[:2])


def write(case: Case, folder: Path) -> str:
    """Write the pictures of all splits; what --source is to be."""
    for split, count in COUNTS.items():
        for number in range(count):
            left, right = sides(case, number + 5 * (split == "test"))
            files = {"in": (left, case.input[2]), "out": (right, case.target[2])}
            if case.layout == "side_by_side":
                files = {"both": (np.concatenate([left, right], 1), case.input[2])}
            for name, (pixels, kind) in files.items():
                file = folder / name / split / f"{number}.{kind}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(encode(pixels, kind, **({"lossless": True} if kind == "webp" else {})))
    return f"{folder}/both" if case.layout == "side_by_side" else f"{folder}/in,{folder}/out"


def expected_pair(case: Case, number: int, how: tuple[int, int, bool], jitter: int) -> dict[str, np.ndarray]:
    """A pair as the networks must see it."""
    seen = []
    for pixels, side in zip(sides(case, number), ("input", "target"), strict=True):
        seen.append(plain_pipeline.seen_by_networks(pixels, case.size, jitter, how, case.labels in (side, "both")))
    return dict(zip(("input", "target"), seen if case.direction == "forward" else seen[::-1], strict=True))


def need_equal(batch: dict[str, tf.Tensor], expected: list[dict[str, np.ndarray]], specs: Specs) -> None:
    """A batch holds these pairs, in single precision."""
    for side, spec in (("input", specs.input), ("target", specs.target)):
        found, whole = batch[side].numpy(), np.stack([pair[side] for pair in expected])
        assert found.dtype == np.float32
        assert found.shape == whole.shape
        np.testing.assert_allclose(found, whole, rtol=0, atol=COPIED if spec.kind == "labels" else FILTERED)


@pytest.mark.parametrize("name", CASES)
def test_batches_are_what_numpy_makes_of_the_picture_files(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    prepare(Options(write(case, tmp_path), case.layout, tmp_path / "data", labels=case.labels), 1)
    height, width = case.size
    data = PairData(tmp_path / "data", small_config(
        f"data.image_size=[{height},{width}]", f"data.direction={case.direction}", f"data.jitter={case.jitter}",
        f"data.mirror={str(case.mirror).lower()}", f"train.batch_size={BATCH}", f"seed={SEED}",
    ))  # fmt: skip
    specs = [
        ImageSpec(kind="labels" if case.labels in (side, "both") else "photo", channels=channels, bit_depth=bits)
        for side, (channels, bits, _) in (("input", case.input), ("target", case.target))
    ]
    assert [data.specs.input, data.specs.target] == (specs if case.direction == "forward" else specs[::-1])
    for step, batch in zip(STEPS, elements(data.training_batches(STEPS.start, STEPS.stop)), strict=True):
        epoch, place = divmod(step, COUNTS["train"] // BATCH)
        numbers = plain_pipeline.epoch_order(COUNTS["train"], SEED, epoch, BATCH)[place]
        hows = [plain_pipeline.augmentation(number, SEED, epoch, case.jitter, case.mirror) for number in numbers]
        pairs = [expected_pair(case, number, how, case.jitter) for number, how in zip(numbers, hows, strict=True)]
        need_equal(batch, pairs, data.specs)
        assert batch["index"].numpy().tolist() == [0, 1]
    (batch,) = elements(data.batches_of(data.split("test"), [2, 0, 1], 3))
    need_equal(batch, [expected_pair(case, 5 + number, (0, 0, False), 0) for number in (2, 0, 1)], data.specs)


def saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def with_hole(image: Image.Image) -> bytes:
    """A palette picture whose most frequent colour is transparent."""
    indexed, buffer = image.quantize(16), io.BytesIO()
    indexed.save(buffer, format="PNG", transparency=int(np.bincount(np.asarray(indexed).ravel()).argmax()))
    return buffer.getvalue()


COLOUR: dict[str, Draw] = {
    "grey.png": lambda image: saved(image.convert("L"), "PNG"),
    "one bit.png": lambda image: saved(image.convert("1"), "PNG"),
    "palette.png": lambda image: saved(image.convert("P"), "PNG"),
    "palette.bmp": lambda image: saved(image.convert("P"), "BMP"),
    "ink.jpg": lambda image: saved(image.convert("CMYK"), "JPEG"),
    "ink.tif": lambda image: saved(image.convert("CMYK"), "TIFF"),
    "colour.webp": lambda image: encode(np.asarray(image), "webp", lossless=True),
}
ALPHA: dict[str, Draw] = {
    "grey and alpha.png": lambda image: saved(Image.merge("LA", [image.convert("L"), image.getchannel(1)]), "PNG"),
    "palette with a hole.png": with_hole,
    "colour and alpha.png": lambda image: saved(Image.merge("RGBA", [*image.split(), image.getchannel(2)]), "PNG"),
    "colour and alpha.tif": lambda image: saved(Image.merge("RGBA", [*image.split(), image.getchannel(0)]), "TIFF"),
}


@pytest.mark.parametrize(("files", "mode"), [(COLOUR, "RGB"), (ALPHA, "RGBA")], ids=["colour", "alpha"])
def test_all_ways_to_store_a_colour_are_read_as_pillow_shows_them(files: dict[str, Draw], mode: str, tmp_path: Path) -> None:
    """Palettes, inks, grey among colour and alpha in one data set; nothing is resized, so each pixel is exact."""
    shown = {}
    for name, draw in sorted(files.items()):
        both = Image.fromarray(np.concatenate([label(len(shown)), photo(len(shown))], 1))
        path = tmp_path / "in" / name.replace(" ", "_").replace(".", f"-{len(shown)}.")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(draw(both))
        shown[path.stem] = np.asarray(Image.open(path).convert(mode))
    prepare(Options(f"{tmp_path}/in", "side_by_side", tmp_path / "data", percent=(100, 0, 0)), 1)
    data = PairData(tmp_path / "data", small_config(f"train.batch_size={len(files)}"))
    assert data.manifest.target.channels == len(mode)
    assert data.train.keys() == sorted(shown)
    (batch,) = elements(data.batches_of(data.train, range(len(files)), len(files)))
    whole = np.stack([shown[key] for key in sorted(shown)])
    for side, part in (("input", whole[:, :, :64]), ("target", whole[:, :, 64:])):
        levels = np.round((batch[side].numpy().astype(np.float64) + 1) * 127.5)
        np.testing.assert_array_equal(levels, part)


def test_jpeg_is_decoded_as_pillow_decodes_it(tmp_path: Path) -> None:
    """Most published data sets are JPEG. Both use the accurate transform, so no level differs by more than one."""
    (tmp_path / "in" / "train").mkdir(parents=True)
    pictures = []
    for number in range(3):
        encoded = encode(np.concatenate([label(number), photo(number)], 1), "jpeg", quality=90)
        (tmp_path / "in" / "train" / f"{number}.jpg").write_bytes(encoded)
        pictures.append(np.asarray(Image.open(io.BytesIO(encoded))))
    prepare(Options(f"{tmp_path}/in", "side_by_side", tmp_path / "data"), 1)
    assert read_manifest(tmp_path / "data").examples("train") == 3
    data = PairData(tmp_path / "data", small_config("train.batch_size=3"))
    (batch,) = elements(data.batches_of(data.train, range(3), 3))
    for side, part in (("input", slice(0, 64)), ("target", slice(64, 128))):
        whole = np.stack([picture[:, part] for picture in pictures]).astype(np.float64)
        assert np.abs((batch[side].numpy() + 1) * 127.5 - whole).max() <= 1.001


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_png_of_ours_is_read_by_others(channels: int) -> None:
    """What `predict` writes and `prepare` stores, decoded by another library than ours."""
    pixels = as_kind(photo(3, 40, 30), channels, 16)
    np.testing.assert_array_equal(imagecodecs.png_decode(encode_png(pixels)).reshape(pixels.shape), pixels)
