"""Small configs, and the flags of small runs. Nothing here loads TensorFlow."""

from pathlib import Path

from trainer.config import Config, load_config

SMALL = (
    "data.image_size=[64,64]",
    "data.jitter=6",
    "model.generator.filters=4",
    "model.discriminator.filters=4",
    "model.discriminator.receptive_field=16",
)
TINY = (
    "data.image_size=[32,32]",
    "data.jitter=3",
    "model.generator.filters=4",
    "model.discriminator.filters=4",
    "model.discriminator.receptive_field=16",
)  # the smallest images; what a run of them takes is little more than making its graphs


def small_config(*overrides: str) -> Config:
    """Networks of four filters on 64x64 images: a step takes milliseconds."""
    return load_config(None, [*SMALL, *overrides])


def flags(model_dir: Path | str, *settings: str, data_dir: Path | str | None = None) -> list[str]:
    """--model_dir, --data_dir if there is one, and each setting as --set."""
    data = [] if data_dir is None else [f"--data_dir={data_dir}"]
    return [f"--model_dir={model_dir}", *data, *(f"--set={setting}" for setting in settings)]
