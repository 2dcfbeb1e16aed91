"""`trainer predict`: pictures of the input kind alone -> pictures of the target kind, of the same sizes and names.

Pictures and drawings may each be here or in a bucket; they are read before they are needed and written while the next ones are
drawn, each whole or not at all.
"""

import glob
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePath

import numpy as np
import tensorflow as tf

from trainer.counter import counted
from trainer.data import images
from trainer.data.images import Pixels
from trainer.data.pairs import from_unit_range, to_unit_range
from trainer.data.sources import pictures_below, relative
from trainer.data.split import plain
from trainer.errors import DataError, UserError
from trainer.model.generators import translate
from trainer.runtime.files import write_bytes
from trainer.storage.bucket import BucketPath, parse
from trainer.storage.places import Place, is_bucket, place
from trainer.storage.transfer import ahead, below
from trainer.trained import TrainedRun

AT_ONCE = 4  # pictures that are read ahead, and as many drawings that are being written


@dataclass(frozen=True)
class Job:
    """One picture to draw: where it is, and the output's path below the output folder."""

    source: Place
    name: PurePath


class Predictor:
    """Draws pictures of any size with a trained generator."""

    def __init__(self, run: TrainedRun, seed: int | None = None) -> None:
        """Load the generator; `seed` draws other dropout masks than the run's own seed."""
        self._specs, self._multiple = run.specs, run.multiple
        generator, chosen = run.generator(), run.config.seed if seed is None else seed
        signature = [tf.TensorSpec((1, None, None, self._specs.input.channels), tf.float32)]
        self._draw = tf.function(
            lambda image: self._levels(translate(generator, image, chosen)), input_signature=signature, autograph=False
        )

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


def find_jobs(given: Place | str) -> list[Job]:
    """The pictures that --input names: a folder, a glob, a .txt list of paths, or one picture.

    Raises:
        DataError: nothing is found, or an output would have an unsafe name or the name of another.
    """
    path = place(str(given), "--input")
    if path.is_dir():
        jobs = [Job(picture, relative(picture, path)) for picture in pictures_below(path)]
    elif path.suffix == ".txt" and path.is_file():
        jobs = [_job_of_line(line, path.parent) for line in _lines(path)]
    elif path.is_file():
        jobs = [Job(path, PurePath(path.name))]
    else:
        jobs = _globbed_in_bucket(path) if isinstance(path, BucketPath) else _globbed(str(given))
    if not jobs:
        raise DataError(f"--input={given}: no pictures there; allowed: a folder, a glob, a .txt list of paths, one picture")
    return _checked([Job(job.source, job.name.with_suffix(".png")) for job in jobs])


def _job_of_line(line: str, folder: Place) -> Job:
    """What a line of a list names: a path below the list's folder, or an address, whose key becomes the output's path."""
    if not is_bucket(line):
        return Job(folder / line, PurePath(line))
    try:
        return Job(parse(line), PurePath(parse(line).key))
    except ValueError as error:
        raise DataError(f"{line}: {error}") from error


def _lines(path: Place) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"--input={path}: the list is not UTF-8 text") from error


def _unsafe(name: PurePath) -> str | None:
    """Why an output must not have this name."""
    if not name.name:
        return "names no picture"
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


def _globbed_in_bucket(pattern: BucketPath) -> list[Job]:
    """As `glob` finds them: a star crosses no slash, two stars do, and what is hidden is not found."""
    parts = pattern.key.split("/")
    depth = next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    root = BucketPath(pattern.bucket, "/".join(parts[:depth]))
    names = sorted(root.listing()) if depth < len(parts) else []
    found = [below(root, name) for name in names if _fits(name.split("/"), parts[depth:])]
    return [Job(path, relative(path, root)) for path in found]


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    hidden = parts[0].startswith(".")
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or (not hidden and _fits(parts[1:], pattern))
    fits = fnmatchcase(parts[0], pattern[0]) and (not hidden or pattern[0].startswith("."))
    return fits and _fits(parts[1:], pattern[1:])


def _checked(jobs: Sequence[Job]) -> list[Job]:
    problems, seen = [], dict[PurePath, Place]()
    for job in jobs:
        if reason := _unsafe(job.name):
            problems.append(f"{str(job.name)!r}: {reason}")
        elif job.name in seen:
            problems.append(f"{job.source}: its output would have the name of that of {seen[job.name]}")
        seen[job.name] = job.source
    if problems:
        raise DataError("\n".join(problems))
    return list(jobs)


def predict(run: TrainedRun, given: Place | str, output: Place, seed: int | None = None) -> str:
    """Draw all pictures; return the closing line.

    Raises:
        DataError: some pictures could not be read; each is named, the others are drawn.
    """
    if output.is_file() or (isinstance(output, Path) and output.exists() and not output.is_dir()):
        raise UserError(f"--output={output}: is a file; give a folder")
    jobs = outside(find_jobs(given), place(str(given), "--input"), output)
    predictor = Predictor(run, seed)
    drawn = (_draw_one(predictor, job, encoded) for job, encoded in zip(jobs, ahead(_read, jobs, AT_ONCE), strict=True))
    done = ahead(partial(_write_one, output=output), drawn, AT_ONCE)
    problems = [line for line in counted(done, len(jobs), "drawing") if line]
    if problems:
        raise DataError("\n".join([*problems, f"{len(problems)} of {len(jobs)} pictures could not be drawn"]))
    return f"{len(jobs)} pictures in {output}, drawn with step {run.marker.step} of {run.folder.path}"


def outside(jobs: Sequence[Job], given: Place, output: Place) -> list[Job]:
    """The jobs without what an earlier run drew into an output folder that lies inside the input folder.

    Raises:
        DataError: an output would replace the picture that it is drawn from.
    """
    replaced = [job for job in jobs if _resolved(output / job.name) == _resolved(job.source)]
    if replaced:
        raise DataError(f"--output={output}: {replaced[0].source} would be replaced by its drawing; choose another folder")
    drawn = _resolved(output)
    if not drawn.is_relative_to(_resolved(given)):
        return list(jobs)
    return [job for job in jobs if not _resolved(job.source).is_relative_to(drawn)]


def _resolved(where: Place) -> PurePath:
    """One path for one file: links are followed, and a bucket counts as a root of its own."""
    return PurePath(str(where)) if isinstance(where, BucketPath) else where.resolve()


def _read(job: Job) -> bytes | OSError:
    try:
        return job.source.read_bytes()
    except OSError as error:
        return error


def _draw_one(predictor: Predictor, job: Job, encoded: bytes | OSError) -> tuple[Job, bytes | str]:
    """Draw one picture: a PNG; or a line, if it cannot be drawn."""
    if isinstance(encoded, OSError):
        return job, f"{job.source}: {encoded.strerror}"
    try:
        return job, images.encode_png(predictor.draw(images.decode(encoded, images.inspect(encoded))))
    except ValueError as error:
        return job, f"{job.source}: {error}"
    except tf.errors.OpError as error:
        return job, f"{job.source}: could not be drawn, perhaps for lack of memory: {plain(error)}"


def _write_one(drawn: tuple[Job, bytes | str], output: Place) -> str | None:
    """Write one drawing into the output folder, whole or not at all; or hand on the line."""
    job, png = drawn
    if isinstance(png, str):
        return png
    write_bytes(output / job.name, png)
    return None
