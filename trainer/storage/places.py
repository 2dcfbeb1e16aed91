"""A place is a path of this machine or an address in a bucket; text becomes the one or the other here and nowhere else."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import UserError
from trainer.storage.bucket import SCHEME, BucketPath, State, checksum_of, parse

Place = Path | BucketPath


def place(text: str, flag: str) -> Place:
    """The place that a flag or a setting names.

    Raises:
        UserError: another scheme than gs://, or gs: with too few slashes, which would become a local folder of that name.
    """
    if text.startswith(SCHEME):
        try:
            return parse(text)
        except ValueError as error:
            raise UserError(f"{flag}={text}: {error}") from error
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:/|gs:", text):
        raise UserError(f"{flag}={text}: allowed: a folder of this machine, or gs://BUCKET/FOLDER")
    return Path(text)


@contextmanager
def naming(path: Place, temporary: Path | None = None) -> Iterator[None]:
    """Let an error of the system say which file it is about: that of a full disk names none, others the temporary one.

    Args:
        path: the file as the user knows it.
        temporary: the file that is written in its stead, if there is one.
    """
    try:
        yield
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Make a file's bytes, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_bucket(text: str) -> bool:
    """Whether a text names an address in a bucket."""
    return text.startswith(SCHEME)


def sizes_in(folder: Place) -> dict[str, int]:
    """The size of each file directly in a folder, by name: one request where the folder is in a bucket."""
    if isinstance(folder, BucketPath):
        return {name: state.size for name, state in folder.listing().items() if "/" not in name}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def checksum(file: Place) -> str:
    """CRC-32C of a file, 8 hexadecimal digits: read here, or as the service reports it.

    Raises:
        FileNotFoundError: it is not there.
    """
    if isinstance(file, Path):
        return checksum_of(file)
    state: State | None = file.state()
    if state is None:
        raise FileNotFoundError(2, "there is no such object", str(file))
    return state.crc32c
