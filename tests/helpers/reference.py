"""Both networks in NumPy, written from the paper's description (sections 3 and 6) and not from the package; float64.

Weights are given by the names of layers: `down1/kernel`, `down2_norm/gamma`, `conv1/bias` and so on.
"""

from typing import NamedTuple

import numpy as np

Array = np.ndarray
Weights = dict[str, Array]

# The operation that computes a leaky ReLU takes its slope in float32, whatever it is given.
SLOPE, EPSILON, DROPPED_LEVELS = float(np.float32(0.2)), 1e-5, 3
GOLDEN = np.uint32(0x9E3779B9)


class Mode(NamedTuple):
    """How the networks are used: kind of norm, in training or not, and at inference the paper's way or `frozen`."""

    norm: str
    training: bool
    inference: str = "paper"
    dropout: float = 0.5


def leaky(x: Array) -> Array:
    return np.where(x > 0, x, SLOPE * x)


def convolution(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Multiply each window of the padded image with a kernel (height, width, in, out) that is not turned round."""
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("nyxcij,ijco->nyxo", windows, kernel)


def upconvolution(x: Array, kernel: Array) -> Array:
    """Paint a kernel (height, width, out, in) around each pixel, two pixels apart; cut one pixel off each side."""
    count, height, width, _ = x.shape
    canvas = np.zeros((count, 2 * height + 2, 2 * width + 2, kernel.shape[2]))
    for row in range(4):
        for column in range(4):
            painted = np.einsum("nyxc,oc->nyxo", x, kernel[row, column])
            canvas[:, row : row + 2 * height : 2, column : column + 2 * width : 2] += painted
    return canvas[:, 1:-1, 1:-1]


def hash32(bits: Array) -> Array:
    """The published integer hash lowbias32."""
    bits = bits.astype(np.uint32)
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B)
    return bits ^ (bits >> np.uint32(16))


def folded(keys: Array, word: int) -> Array:
    """One more number folded into a key."""
    with np.errstate(over="ignore"):
        return hash32(keys + GOLDEN + hash32(np.array([word], np.uint32)))


def dropout(x: Array, keys: Array, rate: float, level: int) -> Array:
    """An element stays where the hash of its example's key, its level and its place is rate x 2^32 or more.

    What stays grows by 1 / (1 - rate), rounded to float32.
    """
    places = hash32(np.arange(x[0].size, dtype=np.uint32) + GOLDEN)
    bits = hash32(folded(keys, level)[:, None] ^ places[None]).reshape(x.shape)
    return np.where(bits >= np.uint32(round(rate * 2**32)), x * np.float32(1 / (1 - rate)), 0.0)


def moments(x: Array, mode: Mode, weights: Weights, layer: str) -> tuple[Array, Array]:
    """By which mean and variance a layer normalises."""
    if mode.norm != "instance" and not mode.training and mode.inference == "frozen":
        return weights[f"{layer}/moving_mean"], weights[f"{layer}/moving_variance"]
    over_batch = mode.norm != "instance" and mode.training
    axes = (0, 1, 2) if over_batch else (1, 2)
    return x.mean(axes, keepdims=True), x.var(axes, keepdims=True)


def finished(x: Array, layer: str, normed: bool, mode: Mode, weights: Weights) -> Array:
    """After a convolution: a norm, or a bias where there is none."""
    if not normed or mode.norm == "none":
        return x + weights[f"{layer}/bias"]
    mean, variance = moments(x, mode, weights, f"{layer}_norm")
    return (x - mean) / np.sqrt(variance + EPSILON) * weights[f"{layer}_norm/gamma"] + weights[f"{layer}_norm/beta"]


def generator(image: Array, keys: Array, weights: Weights, mode: Mode) -> Array:
    """The U-Net: convolutions of stride 2 down to where a side is odd, and back, each level beside its mirror image."""
    levels = sum(name.startswith("down") and name.endswith("/kernel") for name in weights)
    x, skips = image, []
    for level in range(1, levels + 1):
        x = convolution(leaky(x) if level > 1 else x, weights[f"down{level}/kernel"], stride=2, padding=1)
        x = finished(x, f"down{level}", 1 < level < levels, mode, weights)
        skips.append(x)
    skips.pop()
    for level in range(1, levels):
        x = finished(upconvolution(np.maximum(x, 0), weights[f"up{level}/kernel"]), f"up{level}", True, mode, weights)
        if level <= DROPPED_LEVELS and (mode.training or mode.inference == "paper"):
            x = dropout(x, keys, mode.dropout, level - 1)
        x = np.concatenate([x, skips.pop()], -1)
    return np.tanh(upconvolution(np.maximum(x, 0), weights["output/kernel"]) + weights["output/bias"])


def discriminator(source: Array, target: Array, weights: Weights, mode: Mode) -> Array:
    """The PatchGAN: of its convolutions all have stride 2 but the last two; those of one pixel, for a field of 1, none."""
    count = sum(name.startswith("conv") and name.endswith("/kernel") for name in weights)
    x = np.concatenate([source, target], -1)
    one_pixel = weights["conv1/kernel"].shape[0] == 1
    for number in range(1, count + 1):
        stride = 1 if one_pixel or number == count else 2
        x = convolution(x, weights[f"conv{number}/kernel"], stride, padding=0 if one_pixel else 1)
        x = leaky(finished(x, f"conv{number}", number > 1, mode, weights))
    return convolution(x, weights["logits/kernel"], 1, 0 if one_pixel else 1) + weights["logits/bias"]
