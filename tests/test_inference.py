"""Scores and drawings against the picture files themselves: what `evaluate`, `predict` and `export` say, computed once more.

Pictures of several kinds are written, prepared and trained on. What is expected is read from the original files and from the
drawings on disk by Pillow, tifffile and imagecodecs, and computed in NumPy and scikit-image.
"""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import pytest
import tensorflow as tf
import tifffile
from PIL import Image

from tests.helpers.images import as_kind, encode, label, photo
from tests.helpers.processes import run_trainer
from tests.helpers.scores import means_of_all_resamples, scores_of
from tests.helpers.settings import SMALL, flags
from trainer.data.pipeline import PairData
from trainer.data.prepare import Options, prepare
from trainer.evaluate import evaluate
from trainer.export import Served
from trainer.predict import predict
from trainer.train.evaluate import Evaluator
from trainer.trained import TrainedRun, open_run

COUNTS = {"train": 3, "val": 1, "test": 5}
SETTINGS = (
    "train.steps=8",
    "train.ema_decay=0.5",
    "train.evaluate_every=0",
    "train.sample_every=0",
    "optimizer.learning_rate=0.02",
)


class Side(NamedTuple):
    """The pictures of one side: what they show, and their kind of file."""

    picture: Callable[..., np.ndarray]
    channels: int
    bits: int
    file: str


class Kind(NamedTuple):
    """A data set: its two sides as they are stored, and how it is trained on."""

    input: Side
    target: Side
    size: tuple[int, int]
    direction: str

    @property
    def drawn_from(self) -> Side:
        return self.input if self.direction == "forward" else self.target

    @property
    def drawn(self) -> Side:
        return self.target if self.direction == "forward" else self.input


KINDS = {
    "16-bit grey from four channels, reverse": Kind(Side(photo, 1, 16, "tiff"), Side(label, 4, 8, "png"), (32, 48), "reverse"),
    "16-bit colour from grey": Kind(Side(label, 1, 8, "png"), Side(photo, 3, 16, "png"), (176, 176), "forward"),
    "four channels from 16-bit colour": Kind(Side(label, 3, 16, "png"), Side(photo, 4, 8, "png"), (32, 32), "forward"),
    "colour from colour, reverse": Kind(Side(photo, 3, 8, "bmp"), Side(label, 3, 8, "tiff"), (48, 32), "reverse"),
}
SLOW_KINDS = ("16-bit colour from grey", "four channels from 16-bit colour", "colour from colour, reverse")


class Done(NamedTuple):
    """A kind, the folder with its pictures (`in`, `out`), and what was said and written: run, evaluation and drawings."""

    kind: Kind
    folder: Path
    run: TrainedRun
    table: str

    @property
    def reports(self) -> Path:
        return self.run.folder.path / "evaluation" / "test-step-0000008-paper"

    def target(self, number: int) -> np.ndarray:
        """An original, read without the trainer."""
        side = "out" if self.kind.direction == "forward" else "in"
        return pixels_of(self.folder / side / "test" / f"{number}.{self.kind.drawn.file}")

    def drawn(self, number: int) -> np.ndarray:
        return pixels_of(self.folder / "drawn" / f"{number}.png")

    def expected(self) -> list[dict[str, float]]:
        """The scores of each test picture."""
        return [scores_of(self.drawn(number), self.target(number)) for number in range(COUNTS["test"])]


def pixels_of(file: Path) -> np.ndarray:
    """(height, width, channels) with the depth that the file has; Pillow would make 8 bits of colour with 16."""
    encoded = file.read_bytes()
    if file.suffix == ".tiff":
        pixels = tifffile.imread(file)
    elif file.suffix == ".png":
        pixels = imagecodecs.png_decode(encoded)
    else:
        pixels = np.asarray(Image.open(file))
    return pixels.reshape(*pixels.shape[:2], -1)


def write_pictures(folder: Path, side: Side, size: tuple[int, int]) -> None:
    for place, (split, count) in enumerate(COUNTS.items()):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            pixels = as_kind(side.picture(10 * place + number, *size), side.channels, side.bits)
            (folder / split / f"{number}.{side.file}").write_bytes(encode(pixels, side.file))


def make(folder: Path, kind: Kind) -> None:
    """Pictures -> data set -> a trained run."""
    write_pictures(folder / "in", kind.input, kind.size)
    write_pictures(folder / "out", kind.target, kind.size)
    labels = "input" if kind.input.picture is label else "target"
    prepare(Options(f"{folder}/in,{folder}/out", "folders", folder / "data", labels=labels), 1)
    size = f"data.image_size=[{kind.size[0]},{kind.size[1]}]"
    settings = (*SMALL, *SETTINGS, size, f"data.direction={kind.direction}")
    done = run_trainer(*flags(folder / "run", *settings, data_dir=folder / "data"))
    assert done.returncode == 0, done.stderr


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW_KINDS else ()) for name in KINDS]
)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder, kind = tmp_path_factory.mktemp("files"), KINDS[request.param]
    make(folder, kind)
    run = open_run(folder / "run")
    given = folder / ("in" if kind.direction == "forward" else "out") / "test"
    predict(run, given, folder / "drawn")
    return Done(kind, folder, run, evaluate(run, "", "test"))


def test_a_drawing_has_the_targets_channels_depth_and_size(done: Done) -> None:
    for number in range(COUNTS["test"]):
        assert done.drawn(number).shape == (*done.kind.size, done.kind.drawn.channels)
        assert done.drawn(number).dtype == {8: np.uint8, 16: np.uint16}[done.kind.drawn.bits]
    header = (done.folder / "drawn" / "0.png").read_bytes()[16:26]
    assert header[8] == done.kind.drawn.bits, "the depth that the PNG states"
    levels = np.unique(done.drawn(0) >> (done.kind.drawn.bits - 8))
    assert levels.max() - levels.min() > 40, "an image of the whole range, not of a part of it"


def test_per_image_scores_are_those_of_the_files(done: Done) -> None:
    rows = list(csv.DictReader((done.reports / "per_image.csv").read_text().splitlines()))
    expected = done.expected()
    assert [row.pop("key") for row in rows] == [f"test/{number}" for number in range(COUNTS["test"])]
    for row, scores in zip(rows, expected, strict=True):
        assert row.keys() == scores.keys()
        assert float(row["l1"]) == pytest.approx(scores["l1"], abs=3e-4)
        assert float(row["psnr"]) == pytest.approx(scores["psnr"], abs=3e-4)
        assert float(row["ssim"]) == pytest.approx(scores["ssim"], abs=1e-4)
        assert float(row.get("ms_ssim", 0)) == pytest.approx(scores.get("ms_ssim", 0), abs=1e-4)


def test_summary_and_table_are_mean_median_and_interval_of_the_files_scores(done: Done) -> None:
    """The interval: between which the middle 95 % of the means of all resamples lie, of which 10,000 were drawn."""
    summary = json.loads((done.reports / "summary.json").read_text())
    expected = done.expected()
    assert (summary["split"], summary["images"], summary["step"]) == ("test", COUNTS["test"], 8)
    assert summary["scores"].keys() == expected[0].keys()
    for name, told in summary["scores"].items():
        values = np.array([scores[name] for scores in expected])
        assert told["mean"] == pytest.approx(values.mean(), abs=3e-4)
        assert told["median"] == pytest.approx(np.median(values), abs=3e-4)
        assert abs(values.mean() - np.median(values)) > 2e-3 or name.endswith("ssim"), "a mean that is no median"
        means = means_of_all_resamples(values)
        for end, percent in (("low", 2.5), ("high", 97.5)):
            least, most = np.percentile(means, [percent - 0.7, percent + 0.7])
            assert least - 3e-4 <= told[end] <= most + 3e-4
    rows = {re.split(r" [( ]", line)[0]: re.findall(r"[-\d.]+", line.split("  ", 1)[1]) for line in done.table.splitlines()[2:-2]}
    names = {"l1": "L1", "psnr": "PSNR", "ssim": "SSIM", "ms_ssim": "MS-SSIM"}
    for name, told in summary["scores"].items():
        columns = [told["mean"], told["low"], told["high"], told["median"]]
        assert [float(text) for text in rows[names[name]]] == pytest.approx(columns, abs=6e-5)
    assert done.table.splitlines()[-1] == f"test L1 {np.mean([scores['l1'] for scores in expected]):.1f} of 255"


def test_the_run_itself_measured_the_same(done: Done) -> None:
    """With the moving average of its weights, which is what is used of it."""
    (told,) = (entry for entry in done.run.folder.metrics() if entry["split"] == "test")
    for name in ("l1", "psnr", "ssim"):
        assert told[name] == pytest.approx(np.mean([scores[name] for scores in done.expected()]), abs=3e-4)


def test_pictures_of_an_evaluation_show_the_files(done: Done) -> None:
    """Input and target as they are in the files, the output as it was drawn, each with 8 bits."""
    data = PairData(done.folder / "data", done.run.config)
    evaluator = Evaluator(done.run.generator(any_size=False), data, done.run.config)
    columns = dict(evaluator.columns(data.split("test"), range(COUNTS["test"])))
    for number in range(COUNTS["test"]):
        for name, pixels in (("target", done.target(number)), ("output", done.drawn(number))):
            rounded = np.round(pixels * (255.0 / np.iinfo(pixels.dtype).max))
            difference = np.abs(columns[name][number] - rounded)
            assert difference.max() <= (1 if name == "output" else 0)
            assert (difference > 0).mean() < 0.01


def test_what_is_exported_draws_the_files_pixels(done: Done) -> None:
    """The graph that a SavedModel holds; tests/test_export.py saves and loads one."""
    side = "in" if done.kind.direction == "forward" else "out"
    files = [done.folder / side / "test" / f"{number}.{done.kind.drawn_from.file}" for number in range(COUNTS["test"])]
    readable = done.kind.drawn_from.file != "tiff"  # by TensorFlow
    encoded = [file.read_bytes() if readable else encode(pixels_of(file), "png") for file in files]
    for number, png in enumerate(Served(done.run).encoded(tf.constant(encoded))["png"].numpy()):
        drawn = imagecodecs.png_decode(png).reshape(done.drawn(number).shape)
        np.testing.assert_array_equal(drawn, done.drawn(number), strict=True)
