import io
import zlib

import numpy as np
import pytest
import tensorflow as tf
import tifffile
from PIL import Image, ImageOps

from tests.helpers.images import as_kind, encode, photo
from trainer.data import images

LOSSLESS = [
    *(("png", channels, bits) for channels in (1, 3, 4) for bits in (8, 16)),
    *(("tiff", channels, bits) for channels in (1, 3, 4) for bits in (8, 16)),
    ("bmp", 1, 8),
    ("bmp", 3, 8),
]


@pytest.mark.parametrize(("kind", "channels", "bits"), LOSSLESS)
def test_pixels_survive_each_kind_of_file(kind: str, channels: int, bits: int) -> None:
    pixels = as_kind(photo(0, 40, 30), channels, bits)
    encoded = encode(pixels, kind)
    info = images.inspect(encoded)
    assert (info.format, info.width, info.height, info.channels, info.bit_depth) == (kind, 30, 40, channels, bits)
    np.testing.assert_array_equal(images.decode(encoded, info), pixels)


@pytest.mark.parametrize("compression", ["lzw", "zlib", "packbits"])
def test_compressed_16_bit_tiff(compression: str) -> None:
    pixels = as_kind(photo(1, 40, 30), 3, 16)
    encoded = encode(pixels, "tiff", compression=compression)
    np.testing.assert_array_equal(images.decode(encoded, images.inspect(encoded)), pixels)


def test_planar_and_inverted_tiff() -> None:
    pixels = as_kind(photo(1, 40, 30), 3, 16)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.moveaxis(pixels, -1, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(images.decode(buffer.getvalue(), images.inspect(buffer.getvalue())), pixels)
    grey, buffer = as_kind(photo(1, 40, 30), 1, 16), io.BytesIO()
    tifffile.imwrite(buffer, grey[..., 0], photometric="miniswhite")
    np.testing.assert_array_equal(images.decode(buffer.getvalue(), images.inspect(buffer.getvalue())), 65535 - grey)


@pytest.mark.parametrize(
    ("kind", "settings"), [("jpeg", {"quality": 90}), ("webp", {"lossless": True}), ("webp", {"quality": 80})]
)
def test_pictures_are_as_pillow_shows_them(kind: str, settings: dict[str, object]) -> None:
    encoded = encode(photo(2), kind, **settings)
    theirs = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), int)
    assert np.abs(images.decode(encoded, images.inspect(encoded)) - theirs).max() <= 2


@pytest.mark.parametrize("mode", ["P", "1", "LA", "CMYK"])
def test_unusual_modes_are_as_pillow_shows_them(mode: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(photo(3)).convert(mode).save(buffer, format="JPEG" if mode == "CMYK" else "PNG")
    info = images.inspect(buffer.getvalue())
    wanted = {1: "L", 3: "RGB", 4: "RGBA"}[info.channels]
    theirs = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert(wanted)).reshape(64, 64, info.channels)
    np.testing.assert_array_equal(images.decode(buffer.getvalue(), info), theirs)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_exif_orientation_is_applied_as_viewers_do(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"quality": 95} if kind == "jpeg" else {"lossless": True} if kind == "webp" else {}
    encoded = encode(photo(4, 48, 32), kind, exif=exif, **settings)
    info = images.inspect(encoded)
    theirs = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB"), int)
    assert (info.height, info.width) == theirs.shape[:2]
    assert info.decodable == (orientation == 1 and kind != "tiff")
    assert np.abs(images.decode(encoded, info) - theirs).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_16_bit_tiff(orientation: int) -> None:
    pixels, buffer = as_kind(photo(4, 48, 32), 3, 16), io.BytesIO()
    tifffile.imwrite(buffer, pixels, extratags=[(274, "H", 1, orientation, True)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(encode((pixels >> 8).astype(np.uint8), "png", exif=exif))))
    info = images.inspect(buffer.getvalue())
    assert (info.width, info.height) == turned.size
    np.testing.assert_array_equal(images.decode(buffer.getvalue(), info) >> 8, np.asarray(turned))


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "webp"])
def test_what_is_called_decodable_tensorflow_decodes_to_the_same(kind: str) -> None:
    encoded = encode(photo(5), kind)
    info = images.inspect(encoded)
    assert info.decodable
    theirs = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), int)
    assert np.abs(tf.io.decode_image(encoded, channels=3, expand_animations=False).numpy() - theirs).max() <= 8


def animated(kind: str) -> bytes:
    frames, buffer = [Image.fromarray(photo(n)) for n in range(3)], io.BytesIO()
    frames[0].save(buffer, format=kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG whose header states 60,000 x 60,000 pixels."""
    encoded = bytearray(encode(photo(0), "png"))
    encoded[16:24] = (60_000).to_bytes(4, "big") * 2
    encoded[29:33] = zlib.crc32(bytes(encoded[12:29])).to_bytes(4, "big")
    return bytes(encoded)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "the file is empty"),
        (b"no picture at all", "not a picture that is read here"),
        (animated("WEBP"), "it has 3 frames or pages"),
        (animated("PNG"), "it has 3 frames or pages"),
        (animated("TIFF"), "it has 3 frames or pages"),
        (animated("GIF"), "GIF is not read here; convert it to PNG"),
        (bomb(), "more than 100,000,000 pixels"),
        (encode(np.zeros((4, 4, 1), np.uint8), "png")[:20], "its header is damaged"),
    ],
    ids=["empty", "text", "webp", "apng", "pages", "gif", "bomb", "cut header"],
)
def test_what_is_refused_says_why(encoded: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        images.inspect(encoded)


def test_float_pixels_are_refused() -> None:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.ones((8, 8), np.float32))
    with pytest.raises(ValueError, match="8 and 16 bits"):
        images.inspect(buffer.getvalue())


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "webp", "tiff"])
def test_a_picture_that_is_cut_short_is_refused(kind: str) -> None:
    encoded = encode(photo(6), kind)
    cut = encoded[: len(encoded) * 2 // 3]
    with pytest.raises(ValueError, match=r"damaged|decoded|not a picture"):
        images.decode(cut, images.inspect(cut))


def test_channels_change_only_where_nothing_is_lost() -> None:
    colour, grey = photo(7), as_kind(photo(7), 1, 8)
    np.testing.assert_array_equal(images.with_channels(grey, 3), np.repeat(grey, 3, -1))
    opaque = images.with_channels(colour, 4)
    assert (opaque[..., 3] == 255).all()
    np.testing.assert_array_equal(images.with_channels(opaque, 3), colour)
    with pytest.raises(ValueError, match="alpha channel that is not opaque"):
        images.with_channels(as_kind(photo(7), 4, 8), 3)
    with pytest.raises(ValueError, match="in colour, and grey is wanted"):
        images.with_channels(colour, 1)
