"""The generator: a U-Net (paper, sections 3.2.1 and 6.1.1), as deep as the image size allows."""

from typing import Any

import keras
import tensorflow as tf

from trainer.config import ModelConfig
from trainer.model.layers import KEY_DTYPE, Blocks, inference_keys

MAX_WIDENING = 8
DROPOUT_LEVELS = 3


def depth_for(height: int, width: int) -> int:
    """Halvings that both sides allow: 8 at 256x256, whose bottleneck is 1x1; 4 at 240x176."""
    depth = 0
    while height % 2 == 0 and width % 2 == 0:
        height, width, depth = height // 2, width // 2, depth + 1
    return depth


def level_filters(filters: int, depth: int) -> list[int]:
    """Channels of each encoder level: 64, 128, 256, 512, 512, ... for 64."""
    return [filters * min(2**level, MAX_WIDENING) for level in range(depth)]


def unet(
    settings: ModelConfig,
    size: tuple[int, int],
    input_channels: int,
    target_channels: int,
    seed: int,
    *,
    any_size: bool = False,
) -> keras.Model:
    """Build the U-Net as deep as `size` (height, width) allows.

    With `any_size` the same network takes every image whose sides are multiples of 2 to the power of its depth.

    The model takes [image, keys]: image (batch, height, width, input_channels) in [-1, 1], keys uint32 (batch,) from
    `layers.example_keys` or `layers.inference_keys`; it gives (batch, height, width, target_channels) in [-1, 1].

    As in the paper's public code a skip carries the normalised convolution before its activation, and the decoder's ReLU
    acts on skip and decoder alike. The bottleneck has no norm: at batch 1 a norm over one pixel would zero it (erratum).
    """
    blocks = Blocks("generator", settings, seed)
    channels = level_filters(settings.generator.filters, depth_for(*size))
    image = keras.Input((*((None, None) if any_size else size), input_channels), name="image")
    keys = keras.Input((), dtype=KEY_DTYPE, name="keys")
    x, skips = _encoder(blocks, image, channels)
    x = _decoder(blocks, x, keys, skips, channels, settings.dropout)
    x = blocks.upconvolution(blocks.relu(x, "output"), target_channels, "output", normed=False)
    return keras.Model([image, keys], blocks.in_full_precision(x, "tanh", "tanh"), name="generator")


def _encoder(blocks: Blocks, image: Any, channels: list[int]) -> tuple[Any, list[Any]]:
    """Halve the image once a level; the first and the innermost level have no norm."""
    x, levels = image, []
    for number, filters in enumerate(channels):
        name = f"down{number + 1}"
        normed = 0 < number < len(channels) - 1
        x = blocks.leaky_relu(x, name) if number else x
        x = blocks.convolution(x, filters, name, stride=2, normed=normed)
        x = blocks.normalised(x, name, normed=normed)
        levels.append(x)
    return x, levels[:-1]


def _decoder(blocks: Blocks, x: Any, keys: Any, skips: list[Any], channels: list[int], dropout: float) -> Any:
    """Double the image once a level and join the skip of the same size; dropout in the first three levels."""
    for number, (skip, filters) in enumerate(zip(reversed(skips), reversed(channels[:-1]), strict=True)):
        name = f"up{number + 1}"
        x = blocks.upconvolution(blocks.relu(x, name), filters, name, normed=True)
        x = blocks.normalised(x, name)
        if number < DROPOUT_LEVELS:
            x = blocks.dropout(x, keys, dropout, number, name)
        x = blocks.joined([x, skip], f"{name}_skip")
    return x


def translate(generator: keras.Model, images: tf.Tensor, seed: int) -> tf.Tensor:
    """Draw the targets of images (batch, height, width, channels) in [-1, 1], in the generator's inference mode."""
    return generator([images, inference_keys(seed, tf.shape(images)[0])], training=False)
