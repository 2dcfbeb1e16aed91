"""From pixels to batches once more, in plain Python and NumPy: what the input pipeline must give.

Written from what docs and docstrings promise; nothing of `trainer/` is used here.
"""

import numpy as np

BITS_64 = 0xFFFFFFFFFFFFFFFF
ORDER, WITHIN, WINDOWS, AUGMENT = 1, 2, 3, 4


# Order and augmentation.


def splitmix(value: int) -> int:
    """The finaliser of SplitMix64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & BITS_64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & BITS_64
    return value ^ value >> 31


def hashed(*words: int) -> int:
    """Whole numbers folded into 64 bits, one after the other."""
    state = 0
    for word in words:
        state = splitmix((state + 0x9E3779B97F4A7C15 + splitmix(word)) & BITS_64)
    return state


def epoch_order(examples: int, seed: int, epoch: int, batch_size: int) -> list[list[int]]:
    """The records of every batch of an epoch: chunks are shuffled, cut into one stream a place, and shuffled in windows."""
    chunk = min(64, -(-examples // 8192))

    def shuffled_by_chunks(record: int) -> tuple[int, int]:
        return hashed(seed, ORDER, epoch, record // chunk), hashed(seed, WITHIN, epoch, record)

    steps, window = examples // batch_size, max(1, 4096 // batch_size)
    coarse = sorted(range(examples), key=shuffled_by_chunks)
    streams = [coarse[place * steps : (place + 1) * steps] for place in range(batch_size)]
    fine: list[list[int]] = []
    for stream in streams:
        windows = [stream[start : start + window] for start in range(0, steps, window)]
        fine.append([one for part in windows for one in sorted(part, key=lambda record: hashed(seed, WINDOWS, epoch, record))])
    return [list(batch) for batch in zip(*fine, strict=True)]


def augmentation(record: int, seed: int, epoch: int, jitter: int, mirror: bool) -> tuple[int, int, bool]:
    """Top and left of the crop, and whether it is mirrored."""
    bits = hashed(seed, AUGMENT, epoch, record)
    return (bits & 0x7FFFFFFF) % (jitter + 1), (bits >> 32) % (jitter + 1), mirror and bool(splitmix(bits) & 1)


# Pixels.


def _triangles(old: int, new: int) -> np.ndarray:
    """The weights of bilinear filtering along one side, (new, old): wider where it shrinks, centres half a pixel in."""
    scale = old / new
    centres = (np.arange(new)[:, None] + 0.5) * scale
    distances = np.abs(np.arange(old)[None] + 0.5 - centres)
    weights = np.maximum(0.0, 1.0 - distances / max(1.0, scale))
    return weights / weights.sum(1, keepdims=True)


def bilinear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """A photograph resized, float64, without rounding."""
    rows, columns = _triangles(pixels.shape[0], height), _triangles(pixels.shape[1], width)
    return np.einsum("hr,rcx,wc->hwx", rows, pixels.astype(np.float64), columns, optimize=True)


def nearest(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """A label map resized: each pixel is the one in whose square its centre lies."""
    rows = (2 * np.arange(height) + 1) * pixels.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * pixels.shape[1] // (2 * width)
    return pixels[rows][:, columns]


def seen_by_networks(
    pixels: np.ndarray, size: tuple[int, int], jitter: int = 0, how: tuple[int, int, bool] = (0, 0, False), labels: bool = False
) -> np.ndarray:
    """One side of a pair as the networks get it: resized, cropped, mirrored, and in [-1, 1] by the depth of its file; float64.

    Args:
        pixels: of the file, uint8 or uint16, (height, width, channels).
        size: height and width that the networks see.
        jitter: pixels that the resize adds to both.
        how: top and left of the crop, and whether it is mirrored.
        labels: whether it is a label map.
    """
    top, left, mirrored = how
    resized = (nearest if labels else bilinear)(pixels, size[0] + jitter, size[1] + jitter)
    crop = resized[top : top + size[0], left : left + size[1]]
    return (crop[:, ::-1] if mirrored else crop).astype(np.float64) / np.iinfo(pixels.dtype).max * 2 - 1
