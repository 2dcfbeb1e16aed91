"""`trainer evaluate`: how good a trained generator is on a split, with intervals, a table, and pictures to look at."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.pipeline import PairData
from trainer.data.sample import ensure_sample
from trainer.data.split import Split
from trainer.errors import DataError
from trainer.runtime.files import write_bytes
from trainer.runtime.pictures import save_grid
from trainer.storage.places import Place, place
from trainer.train.evaluate import Evaluator, PerImage
from trainer.trained import TrainedRun

RESAMPLES = 10_000
CONFIDENCE = 95


@dataclass(frozen=True)
class Summary:
    """One score over a split: the mean with its bootstrap interval, and the median."""

    mean: float
    low: float
    high: float
    median: float


def summarise(values: NDArray[np.float64], seed: int = 0) -> Summary:
    """Mean, median, and the 95 % percentile bootstrap interval of the mean (Efron 1979) from 10,000 seeded resamples."""
    rng = np.random.default_rng(seed)
    means = np.array([rng.choice(values, values.size).mean() for _ in range(RESAMPLES)])
    low, high = np.percentile(means, [(100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2])
    return Summary(float(values.mean()), float(low), float(high), float(np.median(values)))


def table(summaries: Mapping[str, Summary]) -> str:
    """The scores as text."""
    units = {"l1": "L1 (of 255)", "psnr": "PSNR (dB)", "ssim": "SSIM", "ms_ssim": "MS-SSIM"}
    lines = [f"{'':12} {'mean':>9} {'95 % interval':>21} {'median':>9}"]
    for name, s in summaries.items():
        lines.append(f"{units[name]:12} {s.mean:9.4f} {f'{s.low:.4f} to {s.high:.4f}':>21} {s.median:9.4f}")
    return "\n".join(lines)


def per_image_csv(keys: Sequence[str], scores: PerImage) -> bytes:
    """One row for each image, in the order of the data set."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", *scores])
    for row, key in enumerate(keys):
        writer.writerow([key, *(f"{values[row]:.6f}" for values in scores.values())])
    return text.getvalue().encode()


def evaluate(run: TrainedRun, data_dir: str, split_name: str) -> str:
    """Measure a split, write per_image.csv, summary.json and extremes.png into the run's folder; return the table.

    Raises:
        DataError: the data set is missing, damaged, of another kind, or has no such split.
    """
    named = data_dir or run.config.data.dir
    folder = place(named, "--data_dir") if named else ensure_sample(run.folder.sample_data)
    data = PairData(folder, run.config)
    split = data.split(split_name)
    if not split.examples:
        raise DataError(f"{folder}: no pairs in the split {split_name!r}; it has {', '.join(data.manifest.splits)}")
    if data.specs != run.specs:
        raise DataError(f"{folder}: its pictures differ from those that the run was trained on (channels, bits, label maps)")
    evaluator = Evaluator(run.generator(any_size=False), data, run.config)
    scores = evaluator.per_image(split, lambda: False, multiscale=True)
    mode = run.config.model.inference
    other = "" if data.manifest.digest() == run.folder.notes().get("data") else f"-{data.manifest.digest()[:8]}"
    output = run.folder.path / "evaluation" / f"{split_name}-step-{run.marker.step:07d}-{mode}{other}"
    summaries = {name: summarise(values) for name, values in scores.items()}
    write_reports(output, run, data, split, scores, summaries)
    save_extremes(output / "extremes.png", evaluator, split, scores["l1"])
    heading = f"{split.examples} pairs of {split_name}, step {run.marker.step}, {mode} inference"
    closing = f"{split_name} L1 {summaries['l1'].mean:.1f} of 255"
    return "\n".join([heading, table(summaries), f"reports     {output}", closing])


def write_reports(
    output: Place, run: TrainedRun, data: PairData, split: Split, scores: PerImage, summaries: Mapping[str, Summary]
) -> None:
    """per_image.csv and summary.json."""
    document = {
        "split": split.name,
        "images": split.examples,
        "step": run.marker.step,
        "inference": run.config.model.inference,
        "data": data.manifest.digest(),
        "scores": {name: summary.__dict__ for name, summary in summaries.items()},
    }
    write_bytes(output / "per_image.csv", per_image_csv(split.keys(), scores))
    write_bytes(output / "summary.json", json.dumps(document, indent=1).encode() + b"\n")


def save_extremes(path: Place, evaluator: Evaluator, split: Split, l1: NDArray[np.float64]) -> None:
    """Best, median and worst image by L1: input, target and output."""
    ranked = np.argsort(l1, kind="stable")
    chosen = [int(ranked[0]), int(ranked[len(ranked) // 2]), int(ranked[-1])]
    title = "best, median, worst by L1: " + ", ".join(f"{l1[number]:.1f}" for number in chosen)
    save_grid(path, title, evaluator.columns(split, chosen))
