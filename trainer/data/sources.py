"""Where a user's pairs are: side-by-side pictures, two folders, or a list of paths -> the pairs' files, keys and splits.

Here or in a bucket, whose pictures are listed with one request for a thousand, and keys and splits are the same for a copy.
"""

import csv
import hashlib
import io
import json
import os
import posixpath
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from trainer.errors import DataError
from trainer.storage.bucket import BucketPath, parse
from trainer.storage.places import Place, is_bucket, place
from trainer.storage.transfer import below

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_COLUMNS = ("input", "target", "split", "key")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True, order=True)
class Found(BucketPath):
    """A picture in a bucket, and its size in bytes as it was listed."""

    size: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class PairFile:
    """One pair, here or in a bucket.

    Attributes:
        key: names the pair, unique in the whole set.
        split: train, val or test.
        input: the picture that holds the input, or both sides.
        target: the picture that holds the target; None where `input` holds both.
    """

    key: str
    split: str
    input: Place
    target: Place | None = None

    @property
    def paths(self) -> list[Place]:
        """Its one or two files."""
        return [self.input] if self.target is None else [self.input, self.target]


@dataclass(frozen=True, slots=True)
class Listing:
    """What was found: the pairs, sorted by key, and a line for each file that is part of none."""

    pairs: list[PairFile]
    problems: list[str]


def split_of(key: str, percent: Sequence[int]) -> str:
    """train, val or test by a hash of the key alone: adding pairs later moves none of the others."""
    place = int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:8], "big") * 100 >> 64
    return "train" if place < percent[0] else "val" if place < percent[0] + percent[1] else "test"


def pictures_below(folder: Place) -> list[Place]:
    """All picture files below a folder, sorted; links to folders are followed once, hidden ones are passed over."""
    found: Iterable[Place] = _found_below(folder) if isinstance(folder, BucketPath) else _files_below(folder)
    pictures = [path for path in found if path.suffix.lower() in _SUFFIXES]
    return sorted(pictures, key=lambda path: relative(path, folder).parts)


def _files_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            found += [Path(here) / name for name in names if not name.startswith(".")]
        seen.add(real)
    return found


def _found_below(folder: BucketPath) -> list[Found]:
    shown = {name: state for name, state in folder.listing().items() if not f"/{name}".count("/.")}
    return [Found(folder.bucket, below(folder, name).key, state.size) for name, state in shown.items()]


def relative(path: Place, folder: Place) -> PurePosixPath:
    """The path below a folder; doubled slashes, which objects may have, count as one."""
    if isinstance(path, BucketPath) and isinstance(folder, BucketPath):
        return PurePosixPath(path.key[len(folder.key) :].lstrip("/"))
    return PurePosixPath(str(path)).relative_to(str(folder))


def _need_folder(folder: Place) -> None:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; --source takes one that exists")


def _place(path: Place, folder: Place, percent: Sequence[int]) -> tuple[str, str]:
    """Key and split of a picture: a first folder named train, val or test is the split."""
    parts = relative(path, folder).with_suffix("").parts
    split = _SPLIT_NAMES.get(parts[0].lower()) if len(parts) > 1 else None
    key = "/".join(parts)
    return key, split or split_of(key, percent)


def _is_text(key: str) -> bool:
    """Whether a key can be stored: a file name of other bytes than UTF-8 comes to Python as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in key)


def _without_repeats(pairs: Iterable[PairFile]) -> Listing:
    seen: dict[str, PairFile] = {}
    problems = []
    for pair in sorted(pairs, key=lambda pair: (pair.key, PurePosixPath(str(pair.input)))):
        if not _is_text(pair.key):
            problems.append(f"{str(pair.input)!r}: its name or key is not UTF-8 text; rename it")
        elif pair.key in seen:
            problems.append(f"{pair.input}: has the same name as {seen[pair.key].input}")
        else:
            seen[pair.key] = pair
    return Listing(list(seen.values()), problems)


def side_by_side(folder: Place, percent: Sequence[int]) -> Listing:
    """Each picture holds input and target, left and right."""
    _need_folder(folder)
    placed = ((path, *_place(path, folder, percent)) for path in pictures_below(folder))
    return _without_repeats(PairFile(key, split, path) for path, key, split in placed)


def two_folders(inputs: Place, targets: Place, percent: Sequence[int]) -> Listing:
    """Inputs and targets in folders of their own, matched by their path below the folder without its suffix."""
    for folder in (inputs, targets):
        _need_folder(folder)
    sides = []
    for folder in (inputs, targets):
        sides.append(_without_repeats(PairFile(*_place(path, folder, percent), path) for path in pictures_below(folder)))
    left, right = ({pair.key: pair for pair in side.pairs} for side in sides)
    pairs = [PairFile(key, left[key].split, left[key].input, right[key].input) for key in left if key in right]
    alone = [f"{left[key].input}: has no partner in {targets}" for key in left if key not in right]
    alone += [f"{right[key].input}: has no partner in {inputs}" for key in right if key not in left]
    return Listing(pairs, sides[0].problems + sides[1].problems + alone)


def read_list(path: Place, percent: Sequence[int]) -> Listing:
    """A CSV with a header or a JSONL file with `input`, `target` and, if wanted, `split` and `key` in each row.

    Paths are relative to the list's own folder, or gs:// addresses. A row without `target` holds both sides in `input`.
    """
    pairs, problems = [], []
    for number, row in _rows(path):
        try:
            pairs.append(_pair_of_row(row, path.parent, percent))
        except ValueError as error:
            problems.append(f"{path}, row {number}: {error}")
    listing = _without_repeats(pairs)
    named = {file for pair in listing.pairs for file in pair.paths}
    found: dict[Place, Place] = {file: file for file in named if isinstance(file, Path) and _is_file(file)}
    found.update(_looked_up({file for file in named if isinstance(file, BucketPath)}))
    missing = [f"{file}: {_missing(file, path)}" for pair in listing.pairs for file in pair.paths if file not in found]
    present = [_located(pair, found) for pair in listing.pairs if all(file in found for file in pair.paths)]
    if len({pair.target is None for pair in present}) > 1:
        raise DataError(f"{path}: some rows have a target and some have none; a data set has one layout")
    return Listing(present, problems + listing.problems + missing)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _missing(file: Place, path: Place) -> str:
    return f"is in {path} and not {'there' if isinstance(file, BucketPath) else 'on disk'}"


def _located(pair: PairFile, found: dict[Place, Place]) -> PairFile:
    return replace(pair, input=found[pair.input], target=found[pair.target] if pair.target else None)


def _looked_up(files: Collection[BucketPath]) -> dict[Place, Place]:
    """Those of some objects that are there: the folder that holds them all is listed, one for each bucket."""
    found: dict[Place, Place] = {}
    for bucket in {file.bucket for file in files}:
        keys = [f"/{file.parent.key}" for file in files if file.bucket == bucket]
        folder = BucketPath(bucket, posixpath.commonpath(keys).strip("/"))
        for name, state in folder.listing().items():
            there = below(folder, name)
            if there in files:
                found[there] = Found(bucket, there.key, state.size)
    return found


def _rows(path: Place) -> list[tuple[int, object]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"{path}: cannot read the list: {reason}") from error
    if path.suffix.lower() == ".csv":
        try:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True))
        except csv.Error as error:
            raise DataError(f"{path}: is not a CSV that can be read: {error}") from error
        return [(number, {str(name).strip(): value for name, value in row.items()}) for number, row in enumerate(rows, 2)]
    return [(number, _json(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _pair_of_row(row: object, folder: Place, percent: Sequence[int]) -> PairFile:
    if not isinstance(row, dict) or not isinstance(row.get("input"), str) or not row["input"]:
        raise ValueError('allowed: {"input": "a.png", "target": "b.png"}, or a CSV whose header names input and target')
    unknown = sorted(str(name) for name in row if name not in _COLUMNS)
    if unknown:
        raise ValueError(f"unknown column {', '.join(unknown)}; allowed: {', '.join(_COLUMNS)}")
    target, split, key = row.get("target") or None, row.get("split") or None, row.get("key") or row["input"]
    if not all(isinstance(value, str | None) for value in (target, split, key)):
        raise ValueError("target, split and key must be text")
    if split is not None and split not in _SPLIT_NAMES:
        raise ValueError(f"split: got {split!r}, allowed: train, val or test")
    chosen = _SPLIT_NAMES[split] if split else split_of(key, percent)
    return PairFile(str(key), chosen, _named(row["input"], folder), _named(target, folder) if target else None)


def _named(text: str, folder: Place) -> Place:
    """The file that a row names."""
    if is_bucket(text):
        return parse(text)
    if isinstance(folder, BucketPath):
        return BucketPath(folder.bucket, posixpath.normpath(posixpath.join(folder.key, text)))
    return folder / text


def list_pairs(source: str, layout: str, percent: Sequence[int]) -> Listing:
    """The pairs of a source in one of the layouts side_by_side, folders (INPUTS,TARGETS) and list.

    Raises:
        DataError: the source does not exist, or is not of this layout.
    """
    if layout == "side_by_side":
        return side_by_side(place(source, "--source"), percent)
    if layout == "list":
        return read_list(place(source, "--source"), percent)
    inputs, comma, targets = source.partition(",")
    if not comma:
        raise DataError(f"--source={source}: the layout `folders` takes two, as --source=INPUTS,TARGETS")
    return two_folders(place(inputs, "--source"), place(targets, "--source"), percent)
