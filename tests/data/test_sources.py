import os
from pathlib import Path

import pytest

from trainer.data.sources import list_pairs, split_of
from trainer.errors import DataError

ALL = (90, 5, 5)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_existing_split_folders_are_kept(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.jpg", "val/b.png", "test/deep/c.tif", "train/notes.txt", "train/.hidden.png")
    listing = list_pairs(str(tmp_path), "side_by_side", ALL)
    assert [(pair.key, pair.split) for pair in listing.pairs] == [
        ("test/deep/c", "test"), ("train/a", "train"), ("val/b", "val")
    ]  # fmt: skip
    assert listing.problems == []


def test_without_split_folders_the_key_decides_and_adding_pairs_moves_none(tmp_path: Path) -> None:
    names = [f"p{number}.png" for number in range(400)]
    touch(tmp_path, *names)
    before = {pair.key: pair.split for pair in list_pairs(str(tmp_path), "side_by_side", (80, 10, 10)).pairs}
    touch(tmp_path, *(f"q{number}.png" for number in range(100)))
    after = {pair.key: pair.split for pair in list_pairs(str(tmp_path), "side_by_side", (80, 10, 10)).pairs}
    assert {key: after[key] for key in before} == before
    shares = [list(before.values()).count(split) / 400 for split in ("train", "val", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.06)
    assert {split_of(key, (0, 0, 100)) for key in before} == {"test"}


def test_two_folders_are_matched_by_name_and_the_rest_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a/train/1.png", "a/train/2.jpg", "a/3.png", "b/train/1.tif", "b/train/2.png", "b/4.png")
    listing = list_pairs(f"{tmp_path}/a,{tmp_path}/b", "folders", ALL)
    assert [(pair.key, pair.input.name, pair.target.name) for pair in listing.pairs if pair.target] == [
        ("train/1", "1.png", "1.tif"), ("train/2", "2.jpg", "2.png")
    ]  # fmt: skip
    assert listing.problems == [
        f"{tmp_path}/a/3.png: has no partner in {tmp_path}/b",
        f"{tmp_path}/b/4.png: has no partner in {tmp_path}/a",
    ]


def test_same_name_twice_is_a_problem(tmp_path: Path) -> None:
    touch(tmp_path, "x.png", "x.jpg")
    listing = list_pairs(str(tmp_path), "side_by_side", ALL)
    assert len(listing.pairs) == 1
    assert listing.problems == [f"{tmp_path}/x.png: has the same name as {tmp_path}/x.jpg"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", "input,target,split,key\na/1.png,b/1.png,val,one\na/2.png,b/2.png,training,two\n"),
        ("l.jsonl", '{"input": "a/1.png", "target": "b/1.png", "split": "val", "key": "one"}\n'
         '{"input": "a/2.png", "target": "b/2.png", "split": "training", "key": "two"}\n'),
    ],
)  # fmt: skip
def test_lists_name_input_target_split_and_key(name: str, text: str, tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    (tmp_path / name).write_text(text)
    listing = list_pairs(str(tmp_path / name), "list", ALL)
    assert [(pair.key, pair.split, pair.input) for pair in listing.pairs] == [
        ("one", "val", tmp_path / "a/1.png"), ("two", "train", tmp_path / "a/2.png")
    ]  # fmt: skip


def test_wrong_rows_and_missing_files_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png")
    rows = ['{"input": "1.png", "target": "2.png"}', "not json",
            '{"target": "2.png"}',
            '{"input": "1.png", "target": "2.png", "split": "dev"}',
            '{"input": "9.png", "target": "2.png"}']  # fmt: skip
    path = tmp_path / "l.jsonl"
    path.write_text("\n".join(rows))
    listing = list_pairs(str(path), "list", ALL)
    assert len(listing.pairs) == 1
    assert [line.split(": ")[0] for line in listing.problems] == [
        f"{path}, row 2", f"{path}, row 3", f"{path}, row 4", f"{tmp_path}/9.png"
    ]  # fmt: skip
    assert "split: got 'dev', allowed: train, val or test" in listing.problems[2]


def test_a_list_of_two_layouts_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png")
    (tmp_path / "l.csv").write_text("input,target\n1.png,2.png\n2.png,\n")
    with pytest.raises(DataError, match="a data set has one layout"):
        list_pairs(str(tmp_path / "l.csv"), "list", ALL)


@pytest.mark.parametrize(
    ("source", "layout"), [("/nope", "side_by_side"), ("/nope,/no", "folders"), ("/nope", "folders"), ("/nope.csv", "list")]
)
def test_missing_source_is_one_line(source: str, layout: str) -> None:
    with pytest.raises(DataError, match=r"^[^\n]*nope[^\n]*$"):
        list_pairs(source, layout, ALL)


@pytest.mark.parametrize("header", ["input, target", "input ,target"])
def test_spaces_in_a_header_lose_no_column(header: str, tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png")
    (tmp_path / "l.csv").write_text(f"{header}\n1.png, 2.png\n")
    (pair,) = list_pairs(str(tmp_path / "l.csv"), "list", ALL).pairs
    assert pair.target == tmp_path / "2.png"


def test_unknown_columns_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png")
    (tmp_path / "l.csv").write_text("input,output\n1.png,2.png\n")
    (problem,) = list_pairs(str(tmp_path / "l.csv"), "list", ALL).problems
    assert problem.endswith("row 2: unknown column output; allowed: input, target, split, key")


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/a.png", "set/val/b.png")
    (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "val" / "loop").symlink_to(tmp_path / "set")
    pairs = list_pairs(f"{tmp_path}/set", "side_by_side", ALL).pairs
    assert sorted((pair.split, pair.input.name) for pair in pairs) == [("train", "a.png"), ("val", "b.png")]


@pytest.mark.parametrize(
    "text", ['{"input": "\\ud800.png"}', "[" * 100_000, '{"input": ' + "9" * 6000 + "}", '{"input": "' + "x" * 400 + '.png"}']
)
def test_rows_of_rubbish_are_problems_not_tracebacks(text: str, tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text(text + "\n")
    listing = list_pairs(str(tmp_path / "l.jsonl"), "list", ALL)
    assert (listing.pairs, len(listing.problems)) == ([], 1)


def test_names_that_are_not_utf_8_are_named(tmp_path: Path) -> None:
    os.close(os.open(os.fsencode(tmp_path) + b"/b\xff.png", os.O_CREAT))
    listing = list_pairs(str(tmp_path), "side_by_side", ALL)
    assert listing.pairs == []
    assert "is not UTF-8 text; rename it" in listing.problems[0]
    listing.problems[0].encode()
