"""Whole files or none, here or in a bucket: small helpers for everything that a run writes."""

import errno
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.storage.bucket import PROBES, BucketPath
from trainer.storage.places import Place, naming, sync
from trainer.storage.transfer import replace_folder

log = logging.getLogger(__name__)
PROBE_MEBIBYTES = 64
_GENERATED = "__autograph_generated_file"
_SCRATCH: list[Path] = []
TEMPORARY = ".writing-"  # and not the file's own name: TensorBoard reads whatever has `tfevents` in it


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left below a folder; call it where no other process writes."""
    for path in list(folder.rglob(f"{TEMPORARY}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_speed(folder: Place) -> float:
    """MB/s (10^6 bytes) at which the disk below a folder, or below where it would be, or the bucket takes a file of 64 MiB.

    Nothing is left there.
    """
    if isinstance(folder, BucketPath):
        return _upload_speed(folder)
    below = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    block, began = os.urandom(1 << 20), time.perf_counter()
    with tempfile.TemporaryFile(dir=below) as file:
        for _ in range(PROBE_MEBIBYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return PROBE_MEBIBYTES * len(block) / 1e6 / (time.perf_counter() - began)


def _upload_speed(folder: BucketPath) -> float:
    probe = folder / f"{TEMPORARY}{secrets.token_hex(6)}"
    with tempfile.TemporaryDirectory() as here:
        file = Path(here) / "probe"
        file.write_bytes(os.urandom(PROBE_MEBIBYTES << 20))
        began = time.perf_counter()
        size = probe.upload(file).size
        seconds = time.perf_counter() - began
    probe.unlink(missing_ok=True)
    return size / 1e6 / seconds


def scratch() -> Path:
    """A folder in TMPDIR for as long as the process works; `remove_scratch` takes it away, since the process leaves at once."""
    made = Path(tempfile.mkdtemp(prefix="trainer-"))
    _SCRATCH.append(made)
    return made


def remove_scratch() -> None:
    """Remove what `scratch` gave."""
    while _SCRATCH:
        folder = _SCRATCH.pop()
        try:
            shutil.rmtree(folder)
        except OSError as error:  # no reason to end with another exit code than that of the work
            log.warning("%s: could not be removed: %s", folder, error)
    _remove_generated()


def _remove_generated() -> None:
    """Remove the Python files that TensorFlow wrote for its graphs: it would do so at an end that never comes."""
    for name in [name for name in sys.modules if name.startswith(_GENERATED)]:
        Path(str(sys.modules[name].__file__)).unlink(missing_ok=True)


def try_out(folder: BucketPath) -> None:
    """List a folder, and write and remove an object in it, to see whether that is allowed."""
    folder.is_dir()
    file = folder / f"{PROBES[0]}{secrets.token_hex(6)}"
    file.write_bytes(b"written by trainer to see whether it may; it can be removed")
    file.unlink(missing_ok=True)


@contextmanager
def replacing(path: Place) -> Iterator[Path]:
    """Give a temporary path; on success `path` holds what was written there, whole; on failure nothing has changed.

    The temporary file lies beside `path`, and is synced; for a bucket it lies in TMPDIR, and is uploaded.
    """
    if isinstance(path, BucketPath):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            path.upload(Path(folder) / path.name)
        return
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}")
    try:
        with naming(path, temporary):
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Place, text: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Place, content: bytes) -> None:
    """Write a file whole or not at all; its folder is made if it is missing."""
    if isinstance(path, BucketPath):
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing_folder(path: Place, key_file: str = "") -> Iterator[Path]:
    """Give a temporary folder; on success `path` is a folder of what was written there, in place of what was there.

    Beside a local `path`, whose name it takes. For a bucket it lies in TMPDIR and its files are uploaded, all but those that are
    there already; `key_file` names the one without which the others cannot be used: it goes first and comes last.
    """
    if isinstance(path, BucketPath):
        with tempfile.TemporaryDirectory(prefix="trainer-") as folder:
            yield Path(folder)
            replace_folder(Path(folder), path, key_file)
        return
    if path.is_symlink() or path.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(6)}")
    try:
        temporary.mkdir()
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            sync(written)
        _put_in_place(temporary, path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _put_in_place(new: Path, path: Path) -> None:
    """Give a folder its name. The one that has it is put aside, and removed at the end; where that fails, it has it again."""
    old = path.with_name(f"{path.name}.old-{secrets.token_hex(6)}")
    try:
        if path.exists():
            _rename(path, old)
        _rename(new, path)
    finally:
        if old.exists() and not path.exists():
            _rename(old, path)
    sync(path.parent)
    if old.exists():
        shutil.rmtree(old)


def _rename(folder: Path, to: Path) -> None:
    """Rename a folder, to a name that is free; NFS may report that what it did has failed."""
    try:
        folder.replace(to)
    except OSError:
        if folder.exists() or not to.exists():
            raise
