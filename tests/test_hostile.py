"""Hundreds of damaged records and pictures: each ends in one line that names it, or is sound after all; never in a riddle."""

from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.damage import Damaged, damaged_pictures, damaged_records
from tests.helpers.images import encode, photo, write_pairs
from tests.helpers.processes import run_trainer
from tests.helpers.settings import SMALL, small_config
from trainer.data import records
from trainer.data.pipeline import PairData, elements
from trainer.data.prepare import Options, prepare
from trainer.data.split import Split
from trainer.data.verify import verify
from trainer.errors import DataError
from trainer.predict import Predictor, predict
from trainer.trained import TrainedRun


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        write_pairs(folder / "pictures" / split, count)
    prepare(Options(str(folder / "pictures"), "side_by_side", folder / "data", labels="input"), 1)
    return folder / "data"


@pytest.fixture(scope="module")
def sound_records(sound: Path) -> list[bytes]:
    split = Split(sound, records.read_manifest(sound), "train")
    return [split.read(number) for number in range(split.examples)]


def write(folder: Path, sound: Path, framed: dict[str, list[bytes]]) -> None:
    """A data set whose shards hold these frames, with a manifest that is right about all that it states."""
    manifest, splits = records.read_manifest(sound), {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, frames in framed.items():
        name = records.shard_name(split, 0, 1)
        content = b"".join(frames)
        (folder / name).write_bytes(content)
        offsets = np.cumsum([0, *(len(one) for one in frames)]).tolist()
        checksum = f"{google_crc32c.value(content):08x}"
        splits[split] = [records.Shard(file=name, bytes=len(content), crc32c=checksum, offsets=offsets[:-1])]
    records.write_manifest(folder, manifest.model_copy(update={"splits": splits}))


def test_check_names_each_of_200_damaged_records(sound: Path, sound_records: list[bytes], tmp_path: Path) -> None:
    damaged = list(damaged_records(sound_records, 200, seed=1))
    good = [records.frame(record) for record in sound_records]
    write(tmp_path / "good", sound, {"train": good})
    assert verify(tmp_path / "good", 2)[1] == []
    write(tmp_path / "data", sound, {"train": [*good, *(one.framed for one in damaged)]})
    _, lines = verify(tmp_path / "data", 2)
    named = {int(line.split("record ")[1].split(":")[0]) for line in lines}
    assert len(named) == len(lines)
    assert all(line.startswith(f"{tmp_path}/data/train-00000-of-00001.tfrecord, record ") for line in lines)
    assert [line for line in lines if "\n" in line or "{{" in line or "Traceback" in line] == []
    missed = {one.kind for number, one in enumerate(damaged, len(good)) if one.certain and number not in named}
    assert missed == set()
    assert named.isdisjoint(range(len(good)))


def through_pipeline(data: PairData, split: Split, *, training: bool) -> DataError | None:
    batches = data.training_batches(0, split.examples) if training else data.batches_of(split, range(split.examples), 2)
    try:
        with data.naming_damage(split, lambda: range(split.examples)):
            for _ in elements(batches):
                pass
    except DataError as error:
        return error
    return None


def assert_named(one: Damaged, error: DataError | None, folder: Path, split: str) -> None:
    if one.certain or error:
        assert error is not None, one.kind
        assert str(error).startswith(f"{folder}/{split}-00000-of-00001.tfrecord, record 2: "), one.kind
        assert "\n" not in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("count", [10, 40])
def test_training_and_evaluation_name_the_damaged_record(
    count: int, sound: Path, sound_records: list[bytes], tmp_path: Path
) -> None:
    """Each kind of damage in one of the two, and in the next round in the other."""
    good = [records.frame(record) for record in sound_records[:2]]
    for number, one in enumerate(damaged_records(sound_records, count, seed=count)):
        folder = tmp_path / str(number)
        split = "train" if (number + number // 10) % 2 else "test"
        write(folder, sound, {"train": good, split: [*good, one.framed]})
        data = PairData(folder, small_config())
        assert_named(one, through_pipeline(data, data.split(split), training=split == "train"), folder, split)


def test_predict_names_each_of_150_damaged_pictures_and_draws_the_rest(trained_run: TrainedRun, tmp_path: Path) -> None:
    kinds = [encode(photo(number, 40, 56), kind) for number, kind in enumerate(["png", "jpeg", "webp", "bmp", "tiff", "png"])]
    (tmp_path / "in").mkdir()
    for number, picture in enumerate(damaged_pictures(kinds, 150, seed=3)):
        (tmp_path / "in" / f"{number:03d}.png").write_bytes(picture)
    with pytest.raises(DataError) as caught:
        predict(trained_run, str(tmp_path / "in"), tmp_path / "out")
    *lines, summary = str(caught.value).splitlines()
    drawn = {path.name for path in (tmp_path / "out").iterdir()}
    named = {line.split(": ")[0].rsplit("/", 1)[1] for line in lines}
    assert summary == f"{len(lines)} of 150 pictures could not be drawn"
    assert len(named) == len(lines)
    assert drawn | named == {f"{number:03d}.png" for number in range(150)}
    assert drawn.isdisjoint(named)
    assert len(named) > 75
    for path in (tmp_path / "out").iterdir():
        assert tf.io.decode_png(path.read_bytes()).shape[-1] == 3


@pytest.mark.parametrize("name", ["check", pytest.param("train", marks=pytest.mark.slow), "evaluate", "predict"])
def test_a_command_ends_with_2_and_lines_without_a_traceback(
    name: str, trained_run: TrainedRun, sound: Path, sound_records: list[bytes], tmp_path: Path
) -> None:
    good = [records.frame(record) for record in sound_records[:3]]
    bad = [one.framed for one in damaged_records(sound_records, 9, seed=5)]
    write(tmp_path / "data", sound, {"train": [*good, *bad], "test": [*good, *bad], "val": good})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    data, run = f"--data_dir={tmp_path}/data", f"--model_dir={trained_run.folder.path}"
    commands = {
        "check": ["check", data],
        "train": [data, f"--model_dir={tmp_path}/run", *(f"--set={setting}" for setting in SMALL)],
        "evaluate": ["evaluate", data, run],
        "predict": ["predict", run, f"--input={tmp_path}/in", f"--output={tmp_path}/out"],
    }
    done = run_trainer(*commands[name])
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    named = "bad.png" if name == "predict" else ".tfrecord, record "
    assert named in done.stderr
    assert all(line.startswith("trainer: ") for line in done.stderr.splitlines() if named in line)


def test_a_predictor_refuses_another_depth(trained_run: TrainedRun) -> None:
    with pytest.raises(ValueError, match="has 16 bits, the generator was trained on 8"):
        Predictor(trained_run).draw(np.zeros((64, 64, 3), np.uint16))
