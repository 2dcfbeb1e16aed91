"""Where a data set appears: in a folder beside OUTPUT that takes its name when it is whole, or in a bucket.

Both know after an interruption which shards are finished: a note beside each says its entry of the manifest, and what it was
made from. In a bucket nothing can be renamed: shards go where they will stay, as soon as they are written, and the manifest,
which comes last, makes a data set of them. Size and CRC-32C of what is there are asked of the service; no shard is read back.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from google.api_core import exceptions

from trainer.counter import counted
from trainer.data import records
from trainer.data.records import Manifest, Shard
from trainer.errors import DataError, TrainerError, UserError
from trainer.storage.bucket import BucketPath, State
from trainer.storage.places import Place, sync
from trainer.storage.transfer import UPLOADS, ahead, is_same, remove_all

PARTIAL_MARK = ".trainer-prepare"
_OWN = re.compile(r"(train|val|test)-\d{5,}-of-\d{5,}\.tfrecord(\.json)?")

Entry = tuple[Shard, list[str]]  # what the manifest says of a shard, and a line for each pair that was left out of it


def note_of(shard: str) -> str:
    """The name of the note beside a shard."""
    return f"{shard}.json"


def write_note(folder: Path, entry: Entry, made_from: str) -> None:
    """Say beside a shard that it is finished."""
    note = {"made_from": made_from, "shard": entry[0].model_dump(), "problems": entry[1]}
    (folder / note_of(entry[0].file)).write_text(json.dumps(note))


def read_note(folder: Place, shard: str, made_from: str) -> Entry | None:
    """What a note says, if it is there and of the same data set."""
    try:
        note = json.loads((folder / note_of(shard)).read_text(encoding="utf-8"))
        return (Shard.model_validate(note["shard"]), note["problems"]) if note["made_from"] == made_from else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _other(output: Place) -> UserError:
    return UserError(f"--output={output}: holds another data set; choose another or remove it")


def _no_data_set(output: Place) -> UserError:
    return UserError(f"--output={output}: is there and is no data set; choose another or remove it")


class LocalOutput:
    """A data set in the making, on this machine."""

    def __init__(self, folder: Path, made_from: str) -> None:
        self._folder, self._made_from = folder, made_from
        self._partial = folder.with_name(folder.name + ".partial")

    def is_prepared(self) -> bool:
        """Whether this very data set is there already.

        Raises:
            UserError: something else is there.
        """
        if not self._folder.exists():
            return False
        is_set = (self._folder / records.MANIFEST_NAME).is_file()
        if not self._folder.is_dir() or (any(self._folder.iterdir()) and not is_set):
            raise _no_data_set(self._folder)
        if not is_set:
            return False
        manifest = records.read_manifest(self._folder)
        if manifest.made_from != self._made_from:
            raise _other(self._folder)
        if (self._folder / PARTIAL_MARK).is_file():
            self._clear(manifest)
        return True

    @contextmanager
    def room(self) -> Iterator[Path]:
        """The folder in which shards are written: a new one, or the one that an interrupted run left.

        Raises:
            UserError: a folder of this name is somebody else's.
        """
        if self._partial.exists() and not (self._partial / PARTIAL_MARK).is_file():
            advice = "move it or choose another --output"
            raise UserError(f"{self._partial}: is in the way, and not from an interrupted `trainer prepare`; {advice}")
        self._partial.mkdir(parents=True, exist_ok=True)
        (self._partial / PARTIAL_MARK).touch()
        (self._partial / records.MANIFEST_NAME).unlink(missing_ok=True)
        yield self._partial

    def finished(self, shards: Sequence[str]) -> list[Entry | None]:
        """What an interrupted run finished of these shards from the same pictures."""
        return [self._finished(shard) for shard in shards]

    def _finished(self, shard: str) -> Entry | None:
        entry, file = read_note(self._partial, shard, self._made_from), self._partial / shard
        return entry if entry and file.is_file() and file.stat().st_size == entry[0].bytes else None

    def keep(self, entries: Iterable[Entry], total: int) -> Iterator[Entry]:
        """Hand on what was written: it is where it should be."""
        yield from entries

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self._partial)

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest, rename, and clear the notes away: from the second step on the data set exists.

        Where the rename fails, the same command resumes with what the notes say is finished.
        """
        named = {shard.file for shards in manifest.splits.values() for shard in shards}
        needed = {PARTIAL_MARK, *named, *map(note_of, named)}
        for path in self._partial.iterdir():
            if path.name not in needed:
                path.unlink()
        records.write_manifest(self._partial, manifest)
        sync(self._partial)
        try:
            self._partial.replace(self._folder)  # which is not there, or empty
        except OSError:
            if self._partial.exists() or not self._folder.exists():
                raise  # else it was done: NFS may report that what it did has failed
        sync(self._folder.parent)
        self._clear(manifest)

    def _clear(self, manifest: Manifest) -> None:
        """Remove the notes, and last the mark, from the finished data set."""
        for shards in manifest.splits.values():
            for shard in shards:
                (self._folder / note_of(shard.file)).unlink(missing_ok=True)
        (self._folder / PARTIAL_MARK).unlink(missing_ok=True)


class BucketOutput:
    """A data set in the making, in a bucket; a few of its shards at a time lie on this machine."""

    def __init__(self, folder: BucketPath, made_from: str) -> None:
        self._folder, self._made_from = folder, made_from
        self._there: dict[str, State] = {}
        self._room = Path()

    def is_prepared(self) -> bool:
        """Whether this very data set is there already, each shard with the size and checksum that the manifest says.

        Raises:
            DataError: a shard is missing, or is another.
            UserError: something else is there.
        """
        self._there = self._folder.listing()
        if self._folder.is_file():
            raise _no_data_set(self._folder)
        if records.MANIFEST_NAME not in self._there:
            if self._there and (PARTIAL_MARK not in self._there or not all(map(_is_own, self._there))):
                raise _no_data_set(self._folder)
            return False
        manifest = records.read_manifest(self._folder)
        if manifest.made_from != self._made_from:
            raise _other(self._folder)
        if problems := self._problems(manifest):
            raise DataError("\n".join([*problems, f"--output={self._folder}: is damaged; remove it, or choose another"]))
        self._sweep(manifest)
        return True

    def _problems(self, manifest: Manifest) -> list[str]:
        """A line for each shard that is not there with its size and checksum."""
        shards = [shard for shards in manifest.splits.values() for shard in shards]
        wrong = [shard for shard in shards if not is_same(self._there.get(shard.file), shard.bytes, shard.crc32c)]
        return [f"{self._folder / shard.file}: is not what the manifest says" for shard in wrong]

    @contextmanager
    def room(self) -> Iterator[Path]:
        """A temporary folder in which shards are written; the address is marked as ours."""
        if PARTIAL_MARK not in self._there:
            (self._folder / PARTIAL_MARK).write_bytes(b"")
        with tempfile.TemporaryDirectory(prefix="trainer-prepare-") as folder:
            self._room = Path(folder)
            yield self._room

    def finished(self, shards: Sequence[str]) -> list[Entry | None]:
        """What an interrupted run uploaded of these shards, made from the same pictures."""
        return list(ahead(self._finished, shards))

    def _finished(self, shard: str) -> Entry | None:
        if shard not in self._there or note_of(shard) not in self._there:
            return None
        entry = read_note(self._folder, shard, self._made_from)
        return entry if entry and is_same(self._there[shard], entry[0].bytes, entry[0].crc32c) else None

    def keep(self, entries: Iterable[Entry], total: int) -> Iterator[Entry]:
        """Upload what was written, several shards at once, while the next ones are written."""
        yield from counted(ahead(self._upload, entries, UPLOADS), total, "shards in the bucket")

    def _upload(self, entry: Entry) -> Entry:
        """Upload a shard, unless these bytes are there already, and after it its note; then make room for others."""
        shard, file = entry[0], self._room / entry[0].file
        if not file.is_file():  # finished by an earlier run
            return entry
        before = self._there.get(shard.file)
        if not is_same(before, shard.bytes, shard.crc32c):
            try:
                (self._folder / shard.file).upload(file, generation=before.generation if before else 0)
            except exceptions.PreconditionFailed as error:
                raise _shared(self._folder) from error
        note = self._room / note_of(shard.file)
        (self._folder / note.name).upload(note)
        file.unlink()
        note.unlink()
        return entry

    def discard(self) -> None:
        """Leave nothing behind."""
        names = [name for name in self._folder.listing() if _is_own(name)]
        remove_all(self._folder, [name for name in names if name != PARTIAL_MARK])
        remove_all(self._folder, [PARTIAL_MARK])

    def publish(self, manifest: Manifest) -> None:
        """Compare all shards with the manifest, write it, and clear the notes away: from the second step on the set exists.

        Raises:
            TrainerError: what is there is not what was uploaded.
            UserError: another process made a data set there meanwhile.
        """
        self._there = self._folder.listing()
        if problems := self._problems(manifest):
            raise TrainerError("\n".join([*problems, f"{self._folder}: was changed meanwhile; start the command again"]))
        records.write_manifest(self._room, manifest)
        try:
            (self._folder / records.MANIFEST_NAME).upload(self._room / records.MANIFEST_NAME, generation=0)
        except exceptions.PreconditionFailed as error:
            raise _shared(self._folder) from error
        self._sweep(manifest)

    def _sweep(self, manifest: Manifest) -> None:
        """Remove our notes, and shards that an earlier run made of other pictures; the mark goes last."""
        if PARTIAL_MARK not in self._there:
            return
        named = {shard.file for shards in manifest.splits.values() for shard in shards}
        remove_all(self._folder, [name for name in self._there if _is_own(name) and name not in {*named, PARTIAL_MARK}])
        remove_all(self._folder, [PARTIAL_MARK])


def _is_own(name: str) -> bool:
    return name == PARTIAL_MARK or _OWN.fullmatch(name) is not None


def _shared(folder: BucketPath) -> UserError:
    return UserError(f"--output={folder}: another process writes there; wait for it, or choose another")


Output = LocalOutput | BucketOutput


def output_at(place: Place, made_from: str) -> Output:
    """The output at a place."""
    return BucketOutput(place, made_from) if isinstance(place, BucketPath) else LocalOutput(place, made_from)
