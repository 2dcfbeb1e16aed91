"""One pair's files -> one record: what is kept byte for byte, what is stored anew, and which file a problem names."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from tests.helpers.images import as_kind, encode, label, photo
from trainer.data.convert import Converted, convert, read_headers
from trainer.data.sources import PairFile

Features = dict[str, object]


def both(number: int) -> np.ndarray:
    return np.concatenate([label(number), photo(number)], axis=1)


def features(converted: Converted) -> Features:
    """What is in a record: bytes and whole numbers."""
    assert converted.problem is None
    found = tf.train.Example.FromString(converted.record).features.feature
    return {name: (one.bytes_list.value or one.int64_list.value)[0] for name, one in found.items()}


def converted(pairs: Sequence[PairFile]) -> list[Converted]:
    headers = read_headers(pairs)
    assert [one.problem for one in headers] == [None] * len(headers)
    return convert(headers)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp"])
def test_what_tensorflow_decodes_is_kept_byte_for_byte(kind: str, tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes(encode(both(0), kind))
    (one,) = converted([PairFile("a/1", "train", tmp_path / "1")])
    assert features(one) == {
        "key": b"a/1", "pair/encoded": (tmp_path / "1").read_bytes(), "pair/format": kind.encode(),
        "pair/height": 64, "pair/width": 128, "pair/channels": 3, "pair/bit_depth": 8,
    }  # fmt: skip


def test_the_rest_is_stored_as_png_of_the_same_pixels_upright(tmp_path: Path) -> None:
    """A JPEG on its side, whose pixels a viewer turns, and a TIFF of 16 bits."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in.jpg").write_bytes(encode(photo(1, 40, 56), "jpeg", exif=exif))
    deep = as_kind(photo(1, 56, 40), 4, 16)
    (tmp_path / "out.tif").write_bytes(encode(deep, "tiff"))
    (one,) = converted([PairFile("k", "train", tmp_path / "in.jpg", tmp_path / "out.tif")])
    found = features(one)
    assert (found["input/format"], found["target/format"]) == (b"png", b"png")
    assert [found[f"input/{name}"] for name in ("height", "width", "channels", "bit_depth")] == [56, 40, 3, 8]
    assert [found[f"target/{name}"] for name in ("height", "width", "channels", "bit_depth")] == [56, 40, 4, 16]
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "in.jpg")), int)
    stored = np.asarray(Image.open(io.BytesIO(found["input/encoded"])), int)  # type: ignore[arg-type]
    assert np.abs(stored - shown).max() <= 2
    np.testing.assert_array_equal(tf.io.decode_png(found["target/encoded"], dtype=tf.uint16), deep)


def test_a_picture_that_changes_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    """Of one size and kind, so that nothing else would notice; the manifest says from which contents a set is made."""
    pairs = []
    for number in range(3):
        for side in ("in", "out"):
            (tmp_path / f"{number}-{side}.bmp").write_bytes(encode(photo(number), "bmp"))
        pairs.append(PairFile(str(number), "train", tmp_path / f"{number}-in.bmp", tmp_path / f"{number}-out.bmp"))
    headers = read_headers(pairs)
    (tmp_path / "1-out.bmp").write_bytes(encode(photo(9), "bmp"))
    (tmp_path / "2-in.bmp").unlink()
    first, second, third = convert(headers)
    assert first.problem is None
    assert second.problem == f"{tmp_path}/1-out.bmp: was changed after its header was read; start the command again"
    assert third.problem == f"{tmp_path}/2-in.bmp: cannot be read: No such file or directory"
    assert (second.record, third.record) == (b"", b"")


@pytest.mark.parametrize("kind", ["jpeg", "bmp"])
def test_a_picture_that_is_cut_short_does_not_reach_a_record(kind: str, tmp_path: Path) -> None:
    """Its header is sound, and its bytes would be kept as they are: they are decoded here for this alone."""
    encoded = encode(both(2), kind)
    (tmp_path / "1").write_bytes(encoded[: len(encoded) * 3 // 4])
    (one,) = converted([PairFile("1", "train", tmp_path / "1")])
    assert one.record == b""
    assert str(one.problem).startswith(f"{tmp_path}/1: its pixels cannot be decoded")


def test_the_same_files_give_the_same_bytes_and_another_key_others(tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes(encode(both(3), "png"))
    one, same, other = converted([PairFile(key, "train", tmp_path / "1") for key in ("a", "a", "b")])
    assert one.record == same.record != other.record


def test_headers_name_the_file_that_is_wrong(tmp_path: Path) -> None:
    files = {
        "good": encode(photo(0), "png"),
        "low": encode(photo(0, 48), "png"),
        "odd": encode(photo(0, 64, 63), "png"),
        "no": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pairs = [("good", "low"), ("good", "no"), ("no", "good"), ("good", "gone"), ("odd", None), ("good", "good"), ("good", None)]
    found = read_headers([PairFile("k", "train", tmp_path / left, tmp_path / right if right else None) for left, right in pairs])
    assert [one.problem and one.problem.replace(f"{tmp_path}/", "") for one in found] == [
        "good: is 64x64, its partner low is 64x48",
        "no: the file is empty",
        "no: the file is empty",
        "gone: cannot be read: No such file or directory",
        "odd: its width of 63 pixels has no middle to split it at",
        None,
        None,
    ]
