"""File systems of a few megabytes that can be full or read-only."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.missing import missing


def _as_root(*command: str) -> None:
    """Run a command of the administrator's, with sudo where the tests are not root; no password is asked for."""
    sudo = [] if os.getuid() == 0 else ["sudo", "-n"]
    try:
        done = subprocess.run([*sudo, *command], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        missing(f"`{' '.join(command)}` needs root, or sudo: {error.strerror}: {error.filename}")
    if done.returncode:
        missing(f"`{' '.join(command)}` needs root, or sudo without a password: {done.stderr.strip()}")


class SmallDisk:
    """A file system of its own, in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filling = path / "of somebody else"

    def resize(self, size: int) -> None:
        """Give it so many bytes in all."""
        _as_root("mount", "-o", f"remount,size={size}", str(self.path))

    def fill(self, left: int = 0) -> None:
        """Let somebody else take all of its room but so many bytes; a page of 4096 is the least that a file takes."""
        status = os.statvfs(self.path)
        with self._filling.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - left)

    def free(self) -> None:
        """Give the room back."""
        self._filling.unlink()

    def make_read_only(self) -> None:
        _as_root("mount", "-o", "remount,ro", str(self.path))


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[SmallDisk]:
    """Mount a file system of so many bytes; everybody may write in it."""
    path.mkdir(parents=True)
    _as_root("mount", "-t", "tmpfs", "-o", f"size={size},mode=0777", "tmpfs", str(path))
    try:
        yield SmallDisk(path)
    finally:
        _as_root("umount", "--lazy", str(path))
