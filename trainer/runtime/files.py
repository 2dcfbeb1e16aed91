"""Whole files or none: small helpers for everything that a run writes."""

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROBE_MEBIBYTES = 64
TEMPORARY = ".writing-"  # and not the file's own name: TensorBoard reads whatever has `tfevents` in it


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left below a folder; call it where no other process writes."""
    for path in folder.rglob(f"{TEMPORARY}*"):
        path.unlink()


def sync(path: Path) -> None:
    """Make a file's bytes, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_speed(folder: Path) -> float:
    """MB/s (10^6 bytes) at which the disk below a folder, or below where it would be, takes a file; nothing is left there."""
    below = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    block, began = os.urandom(1 << 20), time.perf_counter()
    with tempfile.TemporaryFile(dir=below) as file:
        for _ in range(PROBE_MEBIBYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return PROBE_MEBIBYTES * len(block) / 1e6 / (time.perf_counter() - began)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it takes that name, synced; on failure it is removed."""
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on success it takes that name, in place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
        sync(path.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
