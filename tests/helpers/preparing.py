"""`trainer prepare`: its options, pictures that it must not take, and what it leaves."""

import hashlib
from pathlib import Path

from tests.helpers.images import as_kind, encode, photo
from trainer.data.prepare import Options


def options(source: Path | str, output: Path, **more: object) -> Options:
    """For side-by-side pictures, if no other layout is named."""
    return Options(str(source), output=output, **({"layout": "side_by_side"} | more))  # type: ignore[arg-type]


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a data set, by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def spoil(folder: Path) -> list[str]:
    """Bad pictures of each kind among good ones of `write_pairs`; returns what the report must say of each."""
    good = (folder / "p001.jpeg").read_bytes()
    (folder / "cut.jpeg").write_bytes(good[: len(good) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "odd.png").write_bytes(encode(photo(0, 64, 127), "png"))
    (folder / "deep.png").write_bytes(encode(as_kind(photo(0, 64, 128), 3, 16), "png"))
    return [
        "cut.jpeg: its pixels cannot be decoded", "empty.png: the file is empty", "text.png: not a picture that is read here",
        "odd.png: its width of 127 pixels has no middle", "deep.png: has 16 bits, most have 8",
    ]  # fmt: skip
