"""Picture files of users -> what they are and their pixels; whatever TensorFlow reads wrongly or not at all is found here.

TensorFlow ignores EXIF orientation, has no TIFF decoder, and misreads BMP with a palette; Pillow cuts 16-bit colour to 8.
So headers are read with Pillow (TIFF with tifffile where it has 16 bits), and pixels with the one that reads them exactly.
"""

import io
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import imagecodecs  # noqa: F401 - tifffile finds its decoders through it
import numpy as np
import tensorflow as tf
import tifffile
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 100_000_000
ORIENTATION_TAG = 0x0112
_CHANNELS = {"1": 1, "L": 1, "P": 3, "LA": 4, "RGB": 3, "RGBA": 4, "CMYK": 3, "YCbCr": 3}
_FORMATS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tiff"}

# What Pillow and tifffile raise on damaged bytes; both are fuzzed in tests/test_hostile.py.
_READER_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError,
    TypeError, ValueError, struct.error,
)  # fmt: skip


class PictureError(ValueError):
    """A picture that is not read here; the message says why."""


Pixels = NDArray[Any]  # uint8 or uint16, (height, width, channels)


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the header of a picture says.

    Attributes:
        format: jpeg, png, webp, bmp or tiff.
        width, height: in pixels, as a viewer shows it (EXIF orientation applied).
        channels: 1, 3 or 4.
        bit_depth: 8 or 16.
        orientation: the EXIF value, 1 for upright.
        decodable: TensorFlow gives exactly this picture from these bytes.
    """

    format: str
    width: int
    height: int
    channels: int
    bit_depth: int
    orientation: int
    decodable: bool


def inspect(encoded: bytes) -> ImageInfo:
    """Read a picture's header.

    Raises:
        PictureError: it is not a picture that we read; says why.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                return _describe(image, encoded)
        except UnidentifiedImageError as error:
            raise PictureError(_unidentified(encoded)) from error
        except Image.DecompressionBombError as error:
            raise PictureError(f"more than {MAX_PIXELS:,} pixels; make it smaller or cut it into tiles") from error
        except PictureError:
            raise
        except _READER_ERRORS as error:
            raise PictureError(f"its header is damaged ({error})") from error


def _unidentified(encoded: bytes) -> str:
    return "the file is empty" if not encoded else "not a picture that is read here (PNG, JPEG, WebP, BMP and TIFF are)"


def _describe(image: Image.Image, encoded: bytes) -> ImageInfo:
    name = _FORMATS.get(image.format or "")
    if name is None:
        raise PictureError(f"{image.format} is not read here; convert it to PNG")
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(f"{width}x{height} is more than {MAX_PIXELS:,} pixels; make it smaller or cut it into tiles")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise PictureError(f"it has {image.n_frames} frames or pages; extract one")  # type: ignore[attr-defined]
    channels, bits = _channels_and_bits(image, name, encoded)
    orientation = int(image.getexif().get(ORIENTATION_TAG, 1) or 1)
    if orientation > 4 and name != "tiff":  # of a TIFF, Pillow gives the size as a viewer shows it
        width, height = height, width
    return ImageInfo(name, width, height, channels, bits, orientation, _decodable(image, name, bits) and orientation == 1)


def _channels_and_bits(image: Image.Image, name: str, encoded: bytes) -> tuple[int, int]:
    if name == "png" and encoded[24] == 16:
        return {0: 1, 2: 3, 4: 4, 6: 4}[encoded[25]], 16
    if name == "tiff":
        with tifffile.TiffFile(io.BytesIO(encoded)) as tiff:
            page: Any = tiff.pages[0]
            if page.dtype == np.uint16:
                return _tiff_channels(int(page.samplesperpixel)), 16
    channels = _CHANNELS.get(image.mode)
    if channels is None:
        raise PictureError(f"its pixels are of kind {image.mode}; 8 and 16 bits, grey, colour and colour with alpha are read")
    if image.mode == "P" and "transparency" in image.info:
        channels = 4
    return channels, 8


def _tiff_channels(samples: int) -> int:
    if samples not in (1, 3, 4):
        raise PictureError(f"it has {samples} channels; 1, 3 and 4 are read")
    return samples


def _decodable(image: Image.Image, name: str, bits: int) -> bool:
    if name == "jpeg":
        return image.mode in ("L", "RGB")
    if name == "png":
        return bits == 16 or image.mode in ("L", "RGB", "RGBA", "P", "LA")
    return name in ("webp", "bmp") and image.mode == "RGB"


def decode(encoded: bytes, info: ImageInfo) -> Pixels:
    """The pixels of a picture, upright: uint8 or uint16 (height, width, channels).

    Raises:
        ValueError: the picture is cut short or damaged.
    """
    try:
        pixels = _decode(encoded, info)
    except tf.errors.OpError as error:
        raise ValueError("its pixels cannot be decoded: it is cut short or damaged") from error
    except _READER_ERRORS as error:
        raise ValueError(f"its pixels cannot be decoded ({error})") from error
    turned_by_pillow = info.format == "tiff" and info.bit_depth == 8
    return pixels if turned_by_pillow else upright(pixels, info.orientation)


def _decode(encoded: bytes, info: ImageInfo) -> Pixels:
    if info.format == "tiff" and info.bit_depth == 16:
        return _decode_tiff(encoded, info)
    if info.format == "png" and info.bit_depth == 16:
        return _array(tf.io.decode_png(encoded, channels=info.channels, dtype=tf.uint16))
    if info.decodable or (info.format == "jpeg" and info.channels == 1):
        return decode_with_tensorflow(encoded, info.format, info.channels)
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(encoded)) as image:
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[info.channels]
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], info.channels)


def _array(tensor: tf.Tensor) -> Pixels:
    pixels: Pixels = tensor.numpy()
    return pixels


def decode_with_tensorflow(encoded: bytes, image_format: str, channels: int) -> Pixels:
    """Decode 8-bit bytes exactly as training does."""
    if image_format == "jpeg":
        return _array(tf.io.decode_jpeg(encoded, channels=channels, dct_method="INTEGER_ACCURATE"))
    return _array(tf.io.decode_image(encoded, channels=channels, expand_animations=False))


def _decode_tiff(encoded: bytes, info: ImageInfo) -> Pixels:
    with tifffile.TiffFile(io.BytesIO(encoded)) as tiff:
        page: Any = tiff.pages[0]
        pixels = page.asarray()
        planar, inverted = page.planarconfig == 2 and pixels.ndim == 3, page.photometric == 0
    pixels = np.moveaxis(pixels, 0, -1) if planar else pixels
    pixels = pixels.reshape(*pixels.shape[:2], info.channels)
    return np.asarray(65535 - pixels if inverted else pixels, np.uint16)


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation (1 to 8), as viewers do."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def with_channels(pixels: Pixels, channels: int) -> Pixels:
    """Grey as three equal channels, or an opaque alpha dropped or added; nothing else is a change without loss.

    Raises:
        ValueError: the change would lose something.
    """
    have, top = pixels.shape[-1], np.iinfo(pixels.dtype).max
    if have == channels:
        return pixels
    if have == 4 and (pixels[..., 3] != top).any():
        raise ValueError(f"it has an alpha channel that is not opaque, and {channels} channels are wanted")
    if have == 1 and channels >= 3:
        pixels = pixels[..., [0, 0, 0]]
    if channels == 4:
        opaque = np.full_like(pixels[..., :1], top)
        return np.concatenate([pixels[..., :3], opaque], axis=-1, dtype=pixels.dtype)
    if channels == 3:
        return pixels[..., :3]
    raise ValueError("it is in colour, and grey is wanted")


def encode_png(pixels: Pixels) -> bytes:
    """Encode uint8 or uint16 pixels (height, width, channels) without loss."""
    encoded: bytes = tf.io.encode_png(np.ascontiguousarray(pixels)).numpy()
    return encoded
