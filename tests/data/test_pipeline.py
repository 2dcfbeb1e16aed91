import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.damage import flip_in_record
from tests.helpers.settings import small_config
from trainer.data import order, records
from trainer.data.pipeline import PairData, elements
from trainer.data.sample import SAMPLE_FOLDER, ensure_sample
from trainer.errors import DataError


def hashes(dataset: tf.data.Dataset) -> list[bytes]:
    return [batch["input"].numpy().tobytes() + batch["target"].numpy().tobytes() for batch in dataset]


def test_batches_are_a_function_of_the_step_alone(small_data: PairData) -> None:
    all_at_once = hashes(small_data.training_batches(0, 45))
    assert hashes(small_data.training_batches(17, 45)) == all_at_once[17:]
    assert len(set(all_at_once)) == 45


def test_batches_do_not_depend_on_threads_or_cache(sample_folder: Path) -> None:
    plain = PairData(sample_folder, small_config("train.batch_size=2"))
    cached = PairData(sample_folder, small_config("train.batch_size=2", "data.cache=memory"))
    one_thread = tf.data.Options()
    one_thread.threading.private_threadpool_size = 1
    expected = hashes(plain.training_batches(0, 30).with_options(one_thread))
    assert hashes(plain.training_batches(0, 30)) == expected
    assert hashes(cached.training_batches(0, 30)) == expected


def test_batches_hold_the_records_of_the_order_augmented_as_it_says(small_data: PairData) -> None:
    """Recomputed record by record through the pure functions, in the second epoch."""
    (batch,) = small_data.training_batches(21, 22)
    numbers = order.epoch_order(40, 0, 1, 2)[1]
    how = order.augmentation(numbers, 0, 1, 6, True)
    for place, number in enumerate(numbers):
        expected = reference_pair(small_data, int(number), how[place])
        np.testing.assert_allclose(batch["target"][place], expected, atol=1e-5)
    assert batch["index"].numpy().tolist() == [0, 1]


def reference_pair(data: PairData, number: int, how: np.ndarray) -> np.ndarray:
    """The target of a record, by another route: TensorFlow's own parser and resize on the original file."""
    files = sorted((SAMPLE_FOLDER / "train").glob("*.jpg"))
    picture = tf.io.decode_jpeg(files[number].read_bytes(), dct_method="INTEGER_ACCURATE")[:, 256:]
    large = tf.image.resize(picture, (70, 70), antialias=True).numpy()
    crop = large[how[0] : how[0] + 64, how[1] : how[1] + 64]
    return (crop[:, ::-1] if how[2] else crop) / 127.5 - 1


def test_an_epoch_reads_every_record_once(small_data: PairData) -> None:
    numbers = [number for step in range(20) for number in small_data.batch_records(step).tolist()]
    assert sorted(numbers) == list(range(40))


def test_shapes_are_static(small_data: PairData) -> None:
    spec = small_data.training_batches(0, 1).element_spec
    assert spec["input"].shape == spec["target"].shape == (2, 64, 64, 3)
    assert spec["index"].shape == (2,)


def test_evaluation_keeps_the_stored_order_and_the_last_few(small_data: PairData) -> None:
    test = small_data.split("test")
    sizes = [batch["input"].shape[0] for batch in small_data.batches_of(test, range(test.examples), 4)]
    places = [int(index) for batch in small_data.batches_of(test, range(test.examples), 4) for index in batch["index"]]
    assert sizes == [4, 4, 4, 3]
    assert places == list(range(15))


def test_batch_larger_than_the_data_is_refused(sample_folder: Path) -> None:
    with pytest.raises(DataError, match=r"train\.batch_size: got 41, allowed: up to the 40 training pairs"):
        PairData(sample_folder, small_config("train.batch_size=41")).check_training()


@pytest.fixture
def own_copy(sample_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample_folder, tmp_path / "data"))


def test_flipped_byte_names_shard_and_record(own_copy: Path) -> None:
    damaged = flip_in_record(own_copy, "train", 33)
    data = PairData(own_copy, small_config())
    error = data.train.find_damage(range(40))
    assert str(error).startswith(f"{damaged}: the record's checksum does not match")
    with pytest.raises(tf.errors.OpError):
        list(elements(data.training_batches(0, 40)))


def test_undecodable_image_names_shard_and_record(own_copy: Path) -> None:
    """The frame is sound, the JPEG in it is not: the shard is written again with zeros in one picture."""
    manifest = records.read_manifest(own_copy)
    shard = manifest.splits["train"][0]
    stored = list(tf.data.TFRecordDataset(str(own_copy / shard.file)).as_numpy_iterator())
    start = stored[4].index(b"\xff\xd8\xff") + 2
    stored[4] = stored[4][:start] + bytes(600) + stored[4][start + 600 :]
    new = records.write_shard(own_copy / shard.file, stored)
    splits = manifest.splits | {"train": [new, manifest.splits["train"][1]]}
    records.write_manifest(own_copy, manifest.model_copy(update={"splits": splits}))
    data = PairData(own_copy, small_config())
    line = str(data.train.find_damage(range(40)))
    assert line.startswith(f"{own_copy / shard.file}, record 4: ")
    assert "{{" not in line
    assert "\n" not in line


def test_sound_records_are_not_accused(small_data: PairData) -> None:
    assert small_data.train.find_damage(range(40)) is None


def test_sample_is_the_same_bytes_each_time(sample_folder: Path, tmp_path: Path) -> None:
    again = ensure_sample(tmp_path / "again")
    names = sorted(path.name for path in sample_folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((sample_folder / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_half_made_sample_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00002.tfrecord").write_bytes(b"torn")
    assert records.read_manifest(ensure_sample(tmp_path / "data")).examples("train") == 40
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def places_of(worker: int, workers: int, batch: int = 4) -> range:
    return range(worker * batch // workers, (worker + 1) * batch // workers)


@pytest.fixture
def data_of_four(sample_folder: Path) -> PairData:
    return PairData(sample_folder, small_config("train.batch_size=4"))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_forms_the_same_global_batches(workers: int, data_of_four: PairData) -> None:
    """Four workers are more than the sample has shards."""
    together = list(data_of_four.training_batches(3, 15))
    parts = [list(data_of_four.training_batches(3, 15, places=places_of(worker, workers))) for worker in range(workers)]
    for whole, *pieces in zip(together, *parts, strict=True):
        for name in ("input", "target", "index"):
            np.testing.assert_array_equal(whole[name], np.concatenate([piece[name] for piece in pieces]))


@pytest.mark.parametrize("replicas", [2, 4])
def test_replicas_of_a_worker_take_their_places_in_turn(replicas: int, data_of_four: PairData) -> None:
    elements_of_replicas = list(data_of_four.training_batches(0, 3, replicas=replicas))
    assert len(elements_of_replicas) == 3 * replicas
    places = [place for element in elements_of_replicas for place in element["index"].numpy().tolist()]
    assert places == [0, 1, 2, 3] * 3


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_read_disjoint_bytes_and_together_each_once(
    workers: int, sample_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every read of the system is noted, over one epoch of each worker's own process state."""
    read = [bytes_read(sample_folder, monkeypatch, places_of(worker, workers), (0, 10)) for worker in range(workers)]
    once = [part for parts in read for part in parts]
    assert len(once) == len(set(once))
    shards = records.read_manifest(sample_folder).splits["train"]
    assert sum(length for _, _, length in once) == sum(shard.bytes for shard in shards)


def bytes_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, places: range, steps: tuple[int, int]
) -> list[tuple[str, int, int]]:
    """(file, offset, length) of every read while the batches of some steps are formed."""
    found, whole = [], os.pread

    def noting(descriptor: int, length: int, offset: int) -> bytes:
        found.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), offset, length))
        return whole(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", noting)
    data = PairData(folder, small_config("train.batch_size=4"))
    list(data.training_batches(*steps, places=places))
    monkeypatch.undo()
    return found


def test_going_on_at_nine_tenths_of_an_epoch_reads_the_last_tenth(sample_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_of_it = bytes_read(sample_folder, monkeypatch, range(4), (0, 10))
    rest = bytes_read(sample_folder, monkeypatch, range(4), (9, 10))
    assert len(rest) * 10 == len(all_of_it)
    assert set(rest) < set(all_of_it)


def test_batches_without_end_are_known_to_have_none(small_data: PairData) -> None:
    dataset = small_data.training_batches(0)
    assert int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY
    assert all(spec.shape.is_fully_defined() for spec in dataset.element_spec.values())
