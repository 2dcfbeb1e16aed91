"""`trainer predict`: pictures of the input kind alone -> pictures of the target kind, of the same sizes and names."""

import glob
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from trainer.counter import counted
from trainer.data import images
from trainer.data.images import Pixels
from trainer.data.pairs import from_unit_range, to_unit_range
from trainer.data.sources import pictures_below
from trainer.data.split import plain
from trainer.errors import DataError, UserError
from trainer.model.generators import translate
from trainer.runtime.files import write_bytes
from trainer.trained import TrainedRun


@dataclass(frozen=True)
class Job:
    """One picture to draw: where it is, and the output's path below the output folder."""

    source: Path
    name: Path


class Predictor:
    """Draws pictures of any size with a trained generator."""

    def __init__(self, run: TrainedRun, seed: int | None = None) -> None:
        """Load the generator; `seed` draws other dropout masks than the run's own seed."""
        self._specs, self._multiple = run.specs, run.multiple
        generator, chosen = run.generator(), run.config.seed if seed is None else seed
        signature = [tf.TensorSpec((1, None, None, self._specs.input.channels), tf.float32)]
        self._draw = tf.function(lambda image: self._levels(translate(generator, image, chosen)), input_signature=signature)

    def _levels(self, drawn: tf.Tensor) -> tf.Tensor:
        return from_unit_range(drawn, self._specs.target.bit_depth)

    def draw(self, pixels: Pixels) -> Pixels:
        """Draw the target of one picture, at the picture's own size, with the target's channels and depth.

        Args:
            pixels: uint8 or uint16, (height, width, channels).

        Raises:
            ValueError: depth or channels are not those of the training data.
        """
        spec = self._specs.input
        depth = pixels.dtype.itemsize * 8
        if depth != spec.bit_depth:
            raise ValueError(f"has {depth} bits, the generator was trained on {spec.bit_depth}")
        height, width = pixels.shape[:2]
        padded, top, left = pad(images.with_channels(pixels, spec.channels), self._multiple)
        image = to_unit_range(tf.constant(padded[None], tf.float32), spec)
        drawn = self._draw(image).numpy()[0, top : top + height, left : left + width]
        return np.asarray(drawn, np.uint8 if self._specs.target.bit_depth == 8 else np.uint16)


def pad(pixels: Pixels, multiple: int) -> tuple[Pixels, int, int]:
    """Pad both sides to multiples, evenly, by reflection; a picture too small for that repeats its edge.

    Returns the padded picture, and the row and column where the picture begins in it.
    """
    missing = [-side % multiple for side in pixels.shape[:2]]
    before = [share // 2 for share in missing]
    widths = [(first, share - first) for first, share in zip(before, missing, strict=True)]
    reflects = all(max(pair) < side for pair, side in zip(widths, pixels.shape[:2], strict=True))
    padded = np.pad(pixels, [*widths, (0, 0)], mode="reflect" if reflects else "edge")
    return padded, before[0], before[1]


def find_jobs(given: str) -> list[Job]:
    """The pictures that --input names: a folder, a glob, a .txt list of paths, or one picture.

    Raises:
        DataError: nothing is found, or an output would have an unsafe name or the name of another.
    """
    path = Path(given)
    if path.is_dir():
        jobs = [Job(picture, picture.relative_to(path)) for picture in pictures_below(path)]
    elif path.suffix == ".txt" and path.is_file():
        jobs = [Job(path.parent / line, Path(line)) for line in _lines(path)]
    elif path.is_file():
        jobs = [Job(path, Path(path.name))]
    else:
        jobs = _globbed(given)
    if not jobs:
        raise DataError(f"--input={given}: no pictures there; allowed: a folder, a glob, a .txt list of paths, one picture")
    return _checked([Job(job.source, job.name.with_suffix(".png")) for job in jobs])


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"--input={path}: the list is not UTF-8 text") from error


def _unsafe(name: Path) -> str | None:
    """Why an output must not have this name."""
    if name.is_absolute() or ".." in name.parts:
        return "its output would be unsafe, outside of --output; name it relative, without `..`"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in str(name)):
        return "its output would be unsafe: a control character, or bytes that are not UTF-8, in the name; rename it"
    return None


def _globbed(given: str) -> list[Job]:
    found = [Path(name) for name in sorted(glob.glob(given, recursive=True)) if Path(name).is_file()]
    parts = Path(given).parts
    depth = next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    root = Path(*parts[:depth]) if depth else Path()
    return [Job(path, path.relative_to(root)) for path in found]


def _checked(jobs: Sequence[Job]) -> list[Job]:
    problems, seen = [], dict[Path, Path]()
    for job in jobs:
        if reason := _unsafe(job.name):
            problems.append(f"{str(job.name)!r}: {reason}")
        elif job.name in seen:
            problems.append(f"{job.source}: its output would have the name of that of {seen[job.name]}")
        seen[job.name] = job.source
    if problems:
        raise DataError("\n".join(problems))
    return list(jobs)


def predict(run: TrainedRun, given: str, output: Path, seed: int | None = None) -> str:
    """Draw all pictures; return the closing line.

    Raises:
        DataError: some pictures could not be read; each is named, the others are drawn.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: is a file; give a folder")
    jobs = outside(find_jobs(given), Path(given), output)
    predictor = Predictor(run, seed)
    problems = [line for line in counted((_draw_one(predictor, job, output) for job in jobs), len(jobs), "drawing") if line]
    if problems:
        raise DataError("\n".join([*problems, f"{len(problems)} of {len(jobs)} pictures could not be drawn"]))
    return f"{len(jobs)} pictures in {output}, drawn with step {run.marker.step} of {run.folder.path}"


def outside(jobs: Sequence[Job], given: Path, output: Path) -> list[Job]:
    """The jobs without what an earlier run drew into an output folder that lies inside the input folder.

    Raises:
        DataError: an output would replace the picture that it is drawn from.
    """
    replaced = [job for job in jobs if (output / job.name).resolve() == job.source.resolve()]
    if replaced:
        raise DataError(f"--output={output}: {replaced[0].source} would be replaced by its drawing; choose another folder")
    drawn = output.resolve()
    if not drawn.is_relative_to(given.resolve()):
        return list(jobs)
    return [job for job in jobs if not job.source.resolve().is_relative_to(drawn)]


def _draw_one(predictor: Predictor, job: Job, output: Path) -> str | None:
    """Draw one picture into the output folder, whole or not at all; a line if it cannot be."""
    try:
        encoded = job.source.read_bytes()
        drawn = predictor.draw(images.decode(encoded, images.inspect(encoded)))
    except (OSError, ValueError) as error:
        return f"{job.source}: {error.strerror if isinstance(error, OSError) else error}"
    except tf.errors.OpError as error:
        return f"{job.source}: could not be drawn, perhaps for lack of memory: {plain(error)}"
    write_bytes(output / job.name, images.encode_png(drawn))
    return None
