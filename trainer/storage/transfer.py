"""Many files at once, to and from a bucket: bounded in memory, in order, and only what is not there already.

google.cloud.storage.transfer_manager is not used. It takes all files at its beginning and answers when the last one is done, so
that nothing can be shown, made or removed meanwhile, and goes on with all others when the first is refused; its condition is
one for all objects; and it takes the echo of an upload whose answer was lost (412) for somebody else's object. What it does
with threads is this: `Blob.upload_from_filename` in a ThreadPoolExecutor, and so it is here, through `BucketPath.upload`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from trainer.storage.bucket import BucketPath, State, checksum_of

THREADS = 16  # of small requests: one takes about 50 ms, most of them spent waiting
UPLOADS = 4  # of large files: one connection moves about 50 MB/s

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS) -> Iterator[Result]:
    """Apply a function to items in threads; results come in order, and no more than one a thread is kept waiting.

    Items are taken by the caller's own thread, one for each result that it takes. What the function raises is raised in its
    place; what has not begun then never begins, and what has begun is not waited for: it may take as long as a bucket is away.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="transfer")
    submitted = (pool.submit(function, item) for item in items)
    try:
        waiting: deque[Future[Result]] = deque(islice(submitted, threads))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(islice(submitted, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def is_same(state: State | None, size: int, crc32c: str) -> bool:
    """Whether an object is there with these bytes, as the service reports it."""
    return state is not None and (state.size, state.crc32c) == (size, crc32c)


def remove_all(folder: BucketPath, names: Iterable[str]) -> None:
    """Remove some objects of a folder; one that is gone already is no failure."""

    def remove(name: str) -> None:
        below(folder, name).unlink(missing_ok=True)

    for _ in ahead(remove, names):
        pass


def below(folder: BucketPath, name: str) -> BucketPath:
    """The object that `listing` names, letter by letter: a path would lose doubled slashes."""
    return BucketPath(folder.bucket, f"{folder.key}/{name}" if folder.key else name)


def replace_folder(local: Path, folder: BucketPath, key_file: str = "") -> None:
    """Make a folder of a bucket hold these files and nothing else; what is there already is not sent again.

    Args:
        local: the files, in folders or not.
        folder: where they go.
        key_file: the path of the file without which the others cannot be used: it goes first and comes last, so that at no
            moment an old one is used with new ones, or a new one before all others are there.
    """
    there = folder.listing()
    files = {path.relative_to(local).as_posix(): path for path in sorted(local.rglob("*")) if path.is_file()}
    changed = [name for name, path in files.items() if not is_same(there.get(name), path.stat().st_size, checksum_of(path))]
    gone = [name for name in there if name not in files]
    if not changed and not gone:
        return
    if key_file in there:
        below(folder, key_file).unlink(missing_ok=True)

    def send(name: str) -> None:
        below(folder, name).upload(files[name])

    for _ in ahead(send, [name for name in changed if name != key_file], UPLOADS):
        pass
    remove_all(folder, (name for name in gone if name != key_file))
    if key_file in files:
        send(key_file)
