"""Draw both networks from the built models, as SVG: python docs/draw_networks.py (or: make drawings).

Nothing is written by hand but the layout: sizes, channels, norms and dropout are read from the layers.
"""

from collections.abc import Iterator
from math import log2
from pathlib import Path

import keras

from trainer.config import Config
from trainer.model.discriminators import patch_convolutions, patchgan, receptive_field
from trainer.model.generators import unet

IMAGES = Path(__file__).parent / "images"
FILL = {"down": "#7fb3d5", "up": "#f0b27a", "conv": "#82c29a", "image": "#d5d8dc", "logits": "#c39bd3", "output": "#d5d8dc"}


def height_of(side: int) -> float:
    """Boxes are as high as the logarithm of the image is large."""
    return 14 + 17 * log2(side)


def box(x: float, middle: float, side: int, kind: str, lines: list[str]) -> Iterator[str]:
    """One layer: a bar, and what it is below the lowest bar."""
    height = height_of(side)
    top, look = middle - height / 2, f'rx="3" fill="{FILL[kind]}" stroke="#444"'
    yield f'<rect x="{x}" y="{top:.1f}" width="22" height="{height:.1f}" {look}/>'
    for number, line in enumerate(lines):
        yield f'<text x="{x + 11}" y="{middle + 92 + 15 * number}" text-anchor="middle" font-size="11">{line}</text>'


def remarks(network: keras.Model, name: str) -> list[str]:
    """What follows a convolution: norm, dropout."""
    names = {layer.name for layer in network.layers}
    return [word for word in ("norm", "dropout") if f"{name}_{word}" in names]


def convolutions(network: keras.Model) -> list[keras.layers.Layer]:
    """The layers with kernels, from image to output."""
    return [layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.Conv2DTranspose)]


def describe(network: keras.Model, layer: keras.layers.Layer) -> list[str]:
    """Channels, size, and what follows."""
    _, height, width, channels = layer.output.shape
    return [f"{channels}", f"{height}x{width}", *remarks(network, layer.name)]


def document(width: float, height: float, title: str, body: list[str]) -> str:
    """The SVG around the shapes."""
    head_of_arrow = '<path d="M0,0 L7,3 L0,6 z" fill="#888"/>'
    arrow = f'<marker id="a" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">{head_of_arrow}</marker>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" font-family="sans-serif">'
    frame = f'<rect width="100%" height="100%" fill="white"/><text x="16" y="26" font-size="15">{title}</text>'
    return "\n".join([head, f"<defs>{arrow}</defs>", frame, *body, "</svg>", ""])


def draw_generator(network: keras.Model) -> str:
    """Encoder and decoder on one line, skips as arcs over it."""
    layers, gap, middle = convolutions(network), 66, 268
    half = len(layers) // 2
    body = list(box(40, middle, network.input_shape[0][1], "image", ["image", f"{network.input_shape[0][3]} channels"]))
    for number, layer in enumerate(layers, 1):
        kind = "output" if number == len(layers) else "down" if number <= half else "up"
        body += box(40 + gap * number, middle, layer.output.shape[1], kind, describe(network, layer))
    for number in range(1, half):
        left, right = 51 + gap * number, 51 + gap * (2 * half - number)
        top, rise = middle - height_of(layers[number - 1].output.shape[1]) / 2, 6 + 13 * (half - number)
        path = f"M{left},{top:.1f} C{left},{top - rise - 40:.1f} {right},{top - rise - 40:.1f} {right},{top - 2:.1f}"
        body.append(f'<path d="{path}" fill="none" stroke="#888" stroke-dasharray="4 3" marker-end="url(#a)"/>')
    title = "Generator: U-Net. Blue: convolution 4x4, stride 2. Orange: transposed convolution 4x4, stride 2. Dashed: skips."
    return document(40 + gap * (len(layers) + 1), 440, title, body)


def draw_discriminator(network: keras.Model, field: int) -> str:
    """The convolutions in a row."""
    layers, gap, middle = convolutions(network), 110, 160
    channels = sum(shape[3] for shape in network.input_shape)
    body = list(box(40, middle, network.input_shape[0][1], "image", ["input and target", f"{channels} channels"]))
    for number, layer in enumerate(layers, 1):
        kind = "logits" if number == len(layers) else "conv"
        lines = [*describe(network, layer), f"stride {layer.strides[0]}"]
        body += box(40 + gap * number, middle, layer.output.shape[1], kind, lines)
    title = f"Discriminator: PatchGAN. Each logit sees {field}x{field} pixels of the pair."
    return document(40 + gap * (len(layers) + 1), 330, title, body)


def drawings() -> dict[str, str]:
    """File name and SVG text of each drawing, at the paper's settings."""
    model, size = Config().model, (256, 256)
    patch = model.discriminator
    field = receptive_field(patch_convolutions(patch.receptive_field, patch.filters))
    return {
        "generator.svg": draw_generator(unet(model, size, 3, 3, 0)),
        "discriminator.svg": draw_discriminator(patchgan(model, size, 3, 3, 0), field),
    }


if __name__ == "__main__":
    for name, text in drawings().items():
        (IMAGES / name).write_text(text)
        print(f"wrote {IMAGES / name}")
