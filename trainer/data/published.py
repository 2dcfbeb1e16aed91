"""The published data sets by name: downloaded with resume, checked against a kept checksum, unpacked safely, prepared."""

import gzip
import hashlib
import logging
import os
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import requests
import urllib3
from tqdm import tqdm

from trainer.data.prepare import Options, prepare
from trainer.data.records import MANIFEST_NAME, read_manifest
from trainer.errors import DataError, TrainerError, UserError
from trainer.storage.places import Place

log = logging.getLogger(__name__)
BASE_URL = "http://efrosgans.eecs.berkeley.edu/pix2pix/datasets/"
TRIES = 8
TIMEOUT_SECONDS = 30
BLOCK = 1 << 20
MAX_UNPACKED_BYTES = 20_000_000_000
MAX_MEMBERS = 400_000


@dataclass(frozen=True)
class Published:
    """A data set of the paper: which half of each picture, left (input) or right (target), is a label map."""

    labels: str
    licence: str = "as its publisher says; research use"


PUBLISHED = {
    "facades": Published("target"),
    "maps": Published("none"),
    "cityscapes": Published("target"),
    "edges2shoes": Published("none"),
    "edges2handbags": Published("none"),
    "night2day": Published("none"),
}


def fetch(name: str, options: Options, base_url: str | None, processes: int, skip_bad: bool) -> str:
    """Download, unpack and prepare a published set; return the closing lines. A second call goes on where one stopped.

    Raises:
        DataError: the archive is not what it was, or not what it should be.
        TrainerError: the server could not be reached.
    """
    url = f"{(base_url or BASE_URL).rstrip('/')}/{name}.tar.gz"
    if (options.output / MANIFEST_NAME).is_file():
        manifest = read_manifest(options.output)
        if (manifest.name, manifest.source) != (name, url):
            raise UserError(f"--output={options.output}: holds another data set, {manifest.name}; choose another or remove it")
        return f"{options.output} is prepared already"
    work = workshop(name, options.output)
    archive = download(url, work / f"{name}.tar.gz")
    pictures = unpack(archive, work / "unpacked")
    published = PUBLISHED[name]
    labels = published.labels if options.labels == "none" else options.labels
    named = replace(options, source=str(pictures), labels=labels, name=name, origin=url, licence=published.licence)
    done = prepare(named, processes, skip_bad)
    shutil.rmtree(work / "unpacked")
    return f"{done}\nthe archive is kept in {work}; remove it if you need the room"


def workshop(name: str, output: Place) -> Path:
    """The folder of this machine for archive and pictures: OUTPUT.download, or one in TMPDIR where the output is in a bucket.

    Raises:
        UserError: the one in TMPDIR, where everybody may write, is somebody else's.
    """
    if isinstance(output, Path):
        work = output.with_name(output.name + ".download")
        work.mkdir(parents=True, exist_ok=True)
        return work
    work = Path(tempfile.gettempdir()) / f"trainer-{os.getuid()}-{name}.download"
    work.mkdir(mode=0o700, exist_ok=True)
    if work.stat().st_uid != os.getuid():
        raise UserError(f"{work}: is in the way, and somebody else's; choose another TMPDIR")
    return work


def download(url: str, path: Path) -> Path:
    """Download a file, going on after dropped connections and in later calls; keep its SHA-256 and verify it from then on.

    Raises:
        DataError: a kept archive does not match its kept checksum, or the server has no such file.
        TrainerError: the server could not be reached, or dropped the connection too often.
    """
    kept = path.with_name(path.name + ".sha256")
    if not path.is_file():
        _download(url, path)
    digest = sha256(path)
    words = kept.read_text().split() if kept.is_file() else []
    if not words:
        _need_whole_gzip(path)
        kept.write_text(f"{digest}  {path.name}\n")
    elif words[0] != digest:
        raise DataError(f"{path}: does not match the checksum kept in {kept.name}; remove both to download it again")
    return path


def _need_whole_gzip(path: Path) -> None:
    """Read an archive to its end, where its own checksum stands; one that is not whole is removed.

    Raises:
        TrainerError: it is not whole; it can be downloaded again.
    """
    try:
        with gzip.open(path) as archive:
            while archive.read(BLOCK):
                pass
    except (OSError, EOFError, zlib.error) as error:
        path.unlink()
        raise TrainerError(
            f"{path}: came damaged, or is no .tar.gz ({error}); it was removed, start the command again"
        ) from error


def _download(url: str, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    for number in range(1, TRIES + 1):
        try:
            if _append(url, part):
                part.replace(path)
                return
            reason = "the connection was dropped"
        except requests.RequestException as error:
            reason = type(error).__name__
        if number < TRIES:
            log.info("%s: %s at %d bytes; try %d of %d", url, reason, _size(part), number + 1, TRIES)
            time.sleep(min(30.0, 0.2 * 2**number))
    raise TrainerError(f"{url}: could not be downloaded in {TRIES} tries ({reason}); the same command goes on from {part}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _append(url: str, part: Path) -> bool:
    """Ask for the bytes that are missing and add them; whether the file is whole now."""
    have = _size(part)
    headers = {"Range": f"bytes={have}-"} if have else {}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as reply:
        if reply.status_code == requests.codes.requested_range_not_satisfiable:
            part.unlink()
            return False
        if 400 <= reply.status_code < 500:
            raise DataError(f"{url}: the server says {reply.status_code} {reply.reason}; --base_url names a mirror")
        reply.raise_for_status()
        begins = reply.headers.get("Content-Range", f"bytes {have}-").startswith(f"bytes {have}-")
        resumed = reply.status_code == requests.codes.partial_content and begins
        have = have if resumed else 0
        total = have + int(reply.headers["Content-Length"]) if "Content-Length" in reply.headers else None
        with part.open("ab" if resumed else "wb") as file, _bar(part.name, have, total) as bar:
            whole = _receive(reply, lambda block: bar.update(file.write(block)))
    return whole and (total is None or _size(part) == total)


def _receive(reply: requests.Response, take: Callable[[bytes], object]) -> bool:
    """Hand on the body as far as it comes, so that what came before a drop is kept; whether it came to its end."""
    try:
        while block := reply.raw.read1(BLOCK):
            take(block)
    except urllib3.exceptions.HTTPError as error:
        log.info("%s after a part of the body", type(error).__name__)
        return False
    return True


def _bar(name: str, have: int, total: int | None) -> Any:
    return tqdm(desc=name, initial=have, total=total, unit="B", unit_scale=True, disable=None)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack an archive into a folder and return the folder that holds its pictures.

    Nothing is written outside, links are refused, and a bomb is refused before it is unpacked.

    Raises:
        DataError: the archive is damaged or unsafe.
    """
    if folder.exists():
        shutil.rmtree(folder)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            tar.extractall(folder, members=_safe_members(tar, archive), filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive}: cannot be unpacked safely: {error}") from error
    inner = [path for path in folder.iterdir() if path.is_dir()]
    return inner[0] if len(inner) == 1 else folder


def _safe_members(tar: tarfile.TarFile, archive: Path) -> Iterator[tarfile.TarInfo]:
    unpacked = 0
    for number, member in enumerate(tar, 1):
        unpacked += member.size
        if unpacked > MAX_UNPACKED_BYTES or number > MAX_MEMBERS:
            raise DataError(f"{archive}: more than {MAX_UNPACKED_BYTES:,} bytes or {MAX_MEMBERS:,} files; not unpacked")
        if not (member.isfile() or member.isdir()):
            raise DataError(f"{archive}: {member.name} is neither file nor folder; not unpacked")
        yield member
