"""gs:// addresses that are used as pathlib's paths are, as far as the trainer needs it."""

import base64
import fnmatch
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath

import google_crc32c
from google.api_core import exceptions
from google.cloud.storage import Blob, Bucket

from trainer.errors import TrainerError
from trainer.storage.service import TIMEOUT, Patience, client, going_on_for, patiently

SCHEME = "gs://"
MARK = "trainer-write"
# What objects that live for a moment are called; one that a killed process left counts for nothing.
PROBES = (".preflight-", ".clock-")
UPLOAD_CHUNK = 32 << 20  # bytes of one request of a large upload; a cut one is sent again from where it was cut
_BLOCK = 1 << 22


@dataclass(frozen=True)
class State:
    """What the service says of an object.

    Attributes:
        size: in bytes.
        crc32c: CRC-32C of the bytes, 8 hexadecimal digits.
        generation: a number that rises whenever the object is written.
        updated: when it was written, by the service's clock.
    """

    size: int
    crc32c: str
    generation: int
    updated: datetime


@dataclass(frozen=True, order=True)
class BucketPath:
    """One address. A folder is what the keys of some objects begin with; it is neither made nor removed.

    All requests are tried again while what fails may pass. Methods raise what `service.patiently` raises.
    """

    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}" if self.key else f"{SCHEME}{self.bucket}"

    def __truediv__(self, name: object) -> "BucketPath":
        return BucketPath(self.bucket, str(PurePosixPath(self.key) / str(name)) if self.key else str(name))

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.key)

    @property
    def name(self) -> str:
        """The last part."""
        return self._pure.name

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return self._pure.stem

    @property
    def suffix(self) -> str:
        """The last part's suffix, with its dot."""
        return self._pure.suffix

    @property
    def parent(self) -> "BucketPath":
        """The folder it is in."""
        key = str(self._pure.parent)
        return BucketPath(self.bucket, "" if key == "." else key)

    def with_name(self, name: str) -> "BucketPath":
        """Another name in the same folder."""
        return self.parent / name

    def relative_to(self, folder: "BucketPath") -> PurePosixPath:
        """The path below a folder."""
        return self._pure.relative_to(folder.key)

    # -- what is there

    def state(self, seconds: float | None = None) -> State | None:
        """Size, checksum and generation; None if there is no such object."""
        found = self._found(seconds)
        return None if found is None else _state(found)

    def is_file(self) -> bool:
        """Whether there is an object of exactly this name."""
        return bool(self.key) and self.state() is not None

    def is_dir(self) -> bool:
        """Whether there is anything below."""
        return any(True for _ in self._list(limit=1))

    def exists(self) -> bool:
        """Whether it is an object, or there is anything below."""
        return self.is_file() or self.is_dir()

    def listing(self, seconds: float | None = None) -> dict[str, State]:
        """All objects below but for probes, by their path relative to this one: one request for a thousand."""
        prefix = len(self._prefix)
        return {blob.name[prefix:]: _state(blob) for blob in self._list(seconds=seconds) if _counts(blob.name)}

    def iterdir(self) -> Iterator["BucketPath"]:
        """What lies directly below, objects and folders."""
        yield from (self / name for name in sorted({name.split("/", 1)[0] for name in self.listing()}))

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """The objects below whose relative path fits a pattern; `*` does not cross a slash."""
        depth = pattern.count("/")
        fits = (name for name in self.listing() if name.count("/") == depth and fnmatch.fnmatchcase(name, pattern))
        yield from (self / name for name in sorted(fits))

    # -- reading

    def read_bytes(self) -> bytes:
        """The whole object, its checksum compared."""

        def read() -> bytes:
            content: bytes = self._blob().download_as_bytes(timeout=TIMEOUT, retry=None, checksum="crc32c")
            return content

        return patiently(read, str(self))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`, fewer where the object ends before; no checksum is known for a part.

        This is how training data are read, so it gives up soon when the process is asked to stop.
        """

        def read() -> bytes:
            try:
                content: bytes = self._blob().download_as_bytes(
                    start=start, end=end - 1, timeout=TIMEOUT, retry=None, checksum=None, raw_download=True
                )
            except exceptions.RequestRangeNotSatisfiable:
                return b""
            return content

        return patiently(read, str(self), hurries=True)

    def download(self, to: Path) -> None:
        """Copy the object to a file, its checksum compared; a cut download goes on where it was cut."""

        def copy() -> None:
            self._blob().download_to_filename(str(to), timeout=TIMEOUT, retry=going_on_for(Patience.seconds), checksum="crc32c")

        patiently(copy, str(self))

    # -- writing

    def write_bytes(self, content: bytes, generation: int | None = None, seconds: float | None = None) -> State:
        """Write the object, at once or not at all.

        Args:
            content: all of it.
            generation: write only if the object is of this generation; 0: only if there is none; None: in any case.
            seconds: how long to try; by default what the config says.

        Raises:
            exceptions.PreconditionFailed: the object is of another generation.
        """
        mark = secrets.token_hex(8)

        def write() -> State:
            blob = self._blob(mark=mark)
            condition = {"if_generation_match": generation, "timeout": TIMEOUT, "checksum": "crc32c"}
            blob.upload_from_string(content, content_type="application/octet-stream", retry=None, **condition)
            return _state(blob)

        return self._under_condition(write, mark, (len(content), _crc_of(content)), seconds)

    def write_text(self, text: str, encoding: str = "utf-8") -> State:
        """Write the object, at once or not at all."""
        return self.write_bytes(text.encode(encoding))

    def upload(self, file: Path, generation: int | None = None, seconds: float | None = None) -> State:
        """Copy a file to the object and compare size and checksum that the service reports; conditions as `write_bytes`.

        Raises:
            exceptions.PreconditionFailed: the object is of another generation.
        """
        limit = Patience.seconds if seconds is None else seconds
        mark = secrets.token_hex(8)

        def send() -> State:
            blob = self._blob(UPLOAD_CHUNK, mark)
            condition = {"if_generation_match": generation, "timeout": TIMEOUT, "checksum": "crc32c"}
            blob.upload_from_filename(str(file), content_type="application/octet-stream", retry=going_on_for(limit), **condition)
            return _state(blob)

        return self._under_condition(send, mark, (file.stat().st_size, checksum_of(file)), seconds)

    def _under_condition(self, write: Callable[[], State], mark: str, sent: tuple[int, str], seconds: float | None) -> State:
        """Write; a refusal that is only the echo of this very write, whose answer was lost, counts as success.

        The object bears a mark of the write in its metadata: equal bytes could be another writer's.
        """
        try:
            state = patiently(write, str(self), seconds)
        except exceptions.PreconditionFailed:
            found = self._found(seconds)
            if found is None or (found.metadata or {}).get(MARK) != mark:
                raise
            state = _state(found)
        if (state.size, state.crc32c) != sent:
            raise TrainerError(f"{self}: the service reports {state.size} bytes of {state.crc32c}, {sent} were sent; try again")
        return state

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove the object."""

        def remove() -> None:
            self._blob().delete(timeout=TIMEOUT, retry=None)

        try:
            patiently(remove, str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def unlink_if(self, generation: int, seconds: float | None = None) -> None:
        """Remove the object if it is of this generation.

        Raises:
            exceptions.PreconditionFailed: it is of another.
            FileNotFoundError: it is not there.
        """

        def remove() -> None:
            self._blob().delete(if_generation_match=generation, timeout=TIMEOUT, retry=None)

        patiently(remove, str(self), seconds)

    def read_versioned(self, seconds: float | None = None) -> tuple[bytes, int]:
        """The whole object and its generation; b"" and 0 if there is none."""

        def read() -> tuple[bytes, int]:
            found = self._bucket().get_blob(self.key, timeout=TIMEOUT, retry=None)
            if found is None:
                return b"", 0
            condition = {"if_generation_match": found.generation, "timeout": TIMEOUT, "retry": None, "checksum": "crc32c"}
            return found.download_as_bytes(**condition), int(found.generation)

        while True:
            try:
                return patiently(read, str(self), seconds)
            except (exceptions.PreconditionFailed, FileNotFoundError):  # written between the two requests
                continue

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """A bucket needs no folders."""

    # -- inside

    @property
    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""

    def _bucket(self) -> Bucket:
        return client().bucket(self.bucket)

    def _blob(self, chunk_size: int | None = None, mark: str = "") -> Blob:
        blob = self._bucket().blob(self.key, chunk_size=chunk_size)
        if mark:
            blob.metadata = {MARK: mark}
        return blob

    def _found(self, seconds: float | None) -> Blob | None:
        """What the service says of the object."""
        return patiently(lambda: self._bucket().get_blob(self.key, timeout=TIMEOUT, retry=None), str(self), seconds)

    def _list(self, limit: int | None = None, seconds: float | None = None) -> list[Blob]:
        def ask() -> list[Blob]:
            fields = "items(name,size,crc32c,generation,updated),nextPageToken"
            found = client().list_blobs(
                self.bucket, prefix=self._prefix, max_results=limit, fields=fields, timeout=TIMEOUT, retry=None
            )
            return list(found)

        try:
            return patiently(ask, str(self), seconds)
        except FileNotFoundError:
            return []


def _counts(key: str) -> bool:
    return not key.endswith("/") and not key.rpartition("/")[2].startswith(PROBES)


def _state(blob: Blob) -> State:
    return State(int(blob.size), base64.b64decode(blob.crc32c).hex(), int(blob.generation), blob.updated)


def _crc_of(content: bytes) -> str:
    return bytes(google_crc32c.Checksum(content).digest()).hex()


def checksum_of(file: Path) -> str:
    """CRC-32C of a file, 8 hexadecimal digits."""
    checksum = google_crc32c.Checksum()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            checksum.update(block)
    return bytes(checksum.digest()).hex()


def parse(text: str) -> BucketPath:
    """`gs://bucket/some/key` as an address.

    Raises:
        ValueError: it names no bucket, or a key that no file could have.
    """
    bucket, _, key = text.removeprefix(SCHEME).partition("/")
    parts = [part for part in key.split("/") if part]
    if not bucket or any(part in (".", "..") for part in parts):
        raise ValueError("allowed: gs://BUCKET or gs://BUCKET/FOLDER, without . and ..")
    return BucketPath(bucket, "/".join(parts))
