"""The discriminator: a PatchGAN (paper, sections 3.2.2 and 6.1.2) whose logits each see one patch of a pair."""

from typing import Any, NamedTuple

import keras

from trainer.config import ModelConfig, strided_layers
from trainer.model.layers import KERNEL_SIZE, Blocks

MAX_WIDENING = 8


class Convolution(NamedTuple):
    """One convolution of the PatchGAN."""

    filters: int
    kernel: int
    stride: int


def patch_convolutions(receptive_field: int, filters: int) -> list[Convolution]:
    """The convolutions from image to logits: C64-C128-C256-C512 and one to a single channel, for 70."""
    if receptive_field == 1:
        return [Convolution(filters, 1, 1), Convolution(2 * filters, 1, 1), Convolution(1, 1, 1)]
    strided = strided_layers(receptive_field)
    widths = [filters * min(2**level, MAX_WIDENING) for level in range(strided + 1)]
    body = [Convolution(width, KERNEL_SIZE, 2) for width in widths[:-1]]
    return [*body, Convolution(widths[-1], KERNEL_SIZE, 1), Convolution(1, KERNEL_SIZE, 1)]


def receptive_field(convolutions: list[Convolution]) -> int:
    """Side in pixels of the patch that one logit sees, worked out from kernels and strides."""
    side = 1
    for convolution in reversed(convolutions):
        side = (side - 1) * convolution.stride + convolution.kernel
    return side


def patchgan(settings: ModelConfig, size: tuple[int, int], input_channels: int, target_channels: int, seed: int) -> keras.Model:
    """Build the PatchGAN.

    The model takes [input, target], both (batch, height, width, channels) in [-1, 1], and gives logits (batch, rows,
    columns, 1): 30x30 at 256x256 for a receptive field of 70. The first layer and the logits have no norm.
    """
    blocks = Blocks("discriminator", settings, seed)
    source = keras.Input((*size, input_channels), name="input")
    target = keras.Input((*size, target_channels), name="target")
    x: Any = blocks.joined([source, target], "pair")
    *body, logits = patch_convolutions(settings.discriminator.receptive_field, settings.discriminator.filters)
    for number, (filters, kernel, stride) in enumerate(body):
        name = f"conv{number + 1}"
        x = blocks.convolution(x, filters, name, stride=stride, normed=number > 0, kernel=kernel)
        x = blocks.leaky_relu(blocks.normalised(x, name, normed=number > 0), name)
    x = blocks.convolution(x, logits.filters, "logits", stride=logits.stride, normed=False, kernel=logits.kernel)
    return keras.Model([source, target], blocks.in_full_precision(x, "linear", "float"), name="discriminator")
