"""The card of an exported generator says what is so: sides, channels, depth, weights, data, scores, config."""

from typing import Any

import pytest
import yaml

from trainer.config import Config, to_tree
from trainer.model_card import model_card
from trainer.trained import TrainedRun

INPUT = {"kind": "labels", "channels": 1, "bit_depth": 8}
TARGET = {"kind": "image", "channels": 4, "bit_depth": 16}


def card_of(run: TrainedRun, about: dict[str, Any] | None = None, **changes: dict[str, object]) -> str:
    """The card of a run, of data with two sides that differ, and with other settings."""
    tree = to_tree(run.config)
    for section, settings in changes.items():
        tree[section] = tree[section] | settings
    sides = {"input": INPUT, "target": TARGET}
    return model_card(Config.model_validate(tree), run.about | sides | (about or {}), run.marker, run.folder)


@pytest.mark.parametrize(
    ("direction", "sentence", "channels"),
    [
        ("forward", "Draws image (4 channels, 16 bits) from labels (1 channels, 8 bits).", 1),
        ("reverse", "Draws labels (1 channels, 8 bits) from image (4 channels, 16 bits).", 4),
    ],
)
def test_what_is_drawn_from_what(trained_run: TrainedRun, direction: str, sentence: str, channels: int) -> None:
    card = card_of(trained_run, data={"direction": direction})
    assert sentence in card
    assert f"(images=float32 in [-1, 1], (batch, height, width, {channels}))" in card
    assert f"(float32 in [-1, 1], (batch, 64, 64, {channels}))" in card


def test_which_weights_and_how_they_are_used(trained_run: TrainedRun) -> None:
    assert "Step 24, paper inference.\n" in card_of(trained_run)
    averaged = card_of(trained_run, train={"ema_decay": 0.999}, model={"inference": "frozen"})
    assert "Step 24, frozen inference, the moving average of its weights (decay 0.999).\n" in averaged


def test_data_and_licence(trained_run: TrainedRun) -> None:
    about = {"name": "nuclei", "source": "a place", "licence": "CC0-1.0", "pairs": {"train": 7, "val": 2, "test": 1}}
    card = card_of(trained_run, about)
    assert card.startswith("# A pix2pix generator: nuclei\n")
    assert "nuclei, from a place; licence: CC0-1.0. Pairs: train 7, val 2, test 1.\n" in card


def test_scores_are_those_of_the_runs_metrics(trained_run: TrainedRun) -> None:
    rows = [line.strip("|").split("|") for line in card_of(trained_run).splitlines() if line.startswith("| ")][1:]
    told = [
        (int(step), split.strip(), int(images), float(l1), float(db), float(ssim)) for step, split, images, l1, db, ssim in rows
    ]
    entries = trained_run.folder.metrics()
    rounded = [
        (entry["step"], entry["split"], entry["images"], round(entry["l1"], 2), round(entry["psnr"], 2), round(entry["ssim"], 4))
        for entry in entries
    ]
    assert told == rounded
    assert {split for _, split, *_ in told} == {"val", "test"}


def test_the_config_can_be_read_back(trained_run: TrainedRun) -> None:
    config = card_of(trained_run).split("## Config\n\n")[1]
    assert yaml.safe_load(config) == to_tree(trained_run.config)
