"""What a process asks of the file system that a power cut or a network file system may break: syncs, renames and removals."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Act(NamedTuple):
    """One call.

    Attributes:
        kind: sync, rename or remove.
        path: of what was synced or removed; what a rename made.
        size: bytes that were there when it was synced, 0 for all else.
        source: what was renamed.
    """

    kind: str
    path: Path
    size: int = 0
    source: Path | None = None


class Journal:
    """Writes down each call of this process, in order; the calls are made as always."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.acts: list[Act] = []
        fsync, replace, unlink = os.fsync, os.replace, os.unlink

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            self.acts.append(Act("sync", Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor).st_size))

        def renamed(source: Any, target: Any, **where: Any) -> None:
            replace(source, target, **where)
            self.acts.append(Act("rename", Path(target), source=Path(source)))

        def removed(path: Any, **where: Any) -> None:
            unlink(path, **where)
            self.acts.append(Act("remove", Path(path)))

        for name, call in (
            ("fsync", synced),
            ("replace", renamed),
            ("rename", renamed),
            ("unlink", removed),
            ("remove", removed),
        ):
            monkeypatch.setattr(os, name, call)

    def rename_of(self, target: Path) -> int:
        """Which act made a path by a rename: its number."""
        (number,) = [number for number, act in enumerate(self.acts) if (act.kind, act.path) == ("rename", target)]
        return number

    def syncs(self, path: Path) -> list[int]:
        """Which acts were syncs of a path."""
        return [number for number, act in enumerate(self.acts) if (act.kind, act.path) == ("sync", path)]


def fail_rename(monkeypatch: pytest.MonkeyPatch, number: int, code: int, *, done: bool) -> Callable[[], int]:
    """Let one rename of this process fail, counted from 1, as those of a network file system do.

    Args:
        monkeypatch: takes it back.
        number: which one.
        code: of the error.
        done: the server had renamed it before its answer was lost.

    Returns:
        how many there were so far.
    """
    replace, count = os.replace, 0

    def replacing(source: Any, target: Any, **where: Any) -> None:
        nonlocal count
        count += 1
        if count != number or done:
            replace(source, target, **where)
        if count == number:
            raise OSError(code, os.strerror(code), str(source), None, str(target))

    monkeypatch.setattr(os, "replace", replacing)
    return lambda: count
