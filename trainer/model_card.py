"""The model card: what an exported generator is, what it was trained on, and how good it was."""

from typing import Any

import yaml

from trainer.config import Config, to_tree
from trainer.runtime.ledger import Marker
from trainer.runtime.run_folder import RunFolder

_USE = """## Use

SavedModel, any size, without this package:

    served = tf.saved_model.load("saved_model")
    served.signatures["serving_default"](images=float32 in [-1, 1], (batch, height, width, {channels}))["outputs"]
    served.signatures["encoded"](encoded=[bytes of a picture file])["png"]

`images_seeded` and `encoded_seeded` take an int32 `seed` too: another dropout mask, another drawing.

Keras, {height}x{width} pixels, the run's own seed:

    keras.saving.load_model("keras/generator.keras")(float32 in [-1, 1], (batch, {height}, {width}, {channels}))
"""


def _scores(folder: RunFolder) -> list[str]:
    rows = ["| step | split | images | L1 of 255 | PSNR dB | SSIM |", "|---|---|---|---|---|---|"]
    for entry in folder.metrics():
        values = f"{entry['l1']:.2f} | {entry['psnr']:.2f} | {entry['ssim']:.4f}"
        rows.append(f"| {entry['step']} | {entry['split']} | {entry['images']} | {values} |")
    return rows


def model_card(config: Config, about: dict[str, Any], marker: Marker, folder: RunFolder) -> str:
    """The card as Markdown."""
    sides = [about["input"], about["target"]]
    source, target = sides if config.data.direction == "forward" else sides[::-1]
    height, width = config.data.image_size
    pairs = ", ".join(f"{split} {count}" for split, count in about["pairs"].items())
    lines = [
        f"# A pix2pix generator: {about['name']}",
        "",
        f"Draws {target['kind']} ({target['channels']} channels, {target['bit_depth']} bits) from {source['kind']} "
        f"({source['channels']} channels, {source['bit_depth']} bits). Step {marker.step}, {config.model.inference} inference"
        + (f", the moving average of its weights (decay {decay:g})." if (decay := config.train.ema_decay) else "."),
        "",
        "## Data",
        "",
        f"{about['name']}, from {about['source']}; licence: {about['licence']}. Pairs: {pairs}.",
        "",
        "## Metrics",
        "",
        *_scores(folder),
        "",
        "L1, PSNR and SSIM measure closeness to one target; they say little of how real a picture looks.",
        "",
        _USE.format(channels=source["channels"], height=height, width=width),
        "## Config",
        "",
        *(f"    {line}" for line in yaml.safe_dump(to_tree(config), sort_keys=False).splitlines()),
        "",
    ]
    return "\n".join(lines)
