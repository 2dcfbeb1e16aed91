import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tensorflow as tf
from PIL import Image

from tests.helpers.clock import assert_within
from tests.helpers.disks import small_disk
from tests.helpers.images import as_kind, encode, label, photo, write_pairs
from tests.helpers.preparing import digests, options, spoil
from tests.helpers.processes import finish, run_trainer, start_trainer
from tests.helpers.settings import small_config
from tests.helpers.waiting import wait_until
from trainer.data import prepare as prepare_module
from trainer.data import records
from trainer.data.pairs import decode_record
from trainer.data.pipeline import PairData
from trainer.data.prepare import prepare
from trainer.data.split import Split
from trainer.data.verify import verify
from trainer.errors import DataError, UserError


def stored(folder: Path, split: str) -> list[tf.train.Example]:
    manifest = records.read_manifest(folder)
    whole = Split(folder, manifest, split)
    return [tf.train.Example.FromString(whole.read(number)) for number in range(whole.examples)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pairs(folder, 90, "jpeg")
    return folder


@pytest.mark.slow
def test_same_bytes_for_any_number_of_processes_and_several_shards(pictures: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        prepare(options(pictures, tmp_path / f"{processes}" / "data", shard_bytes=60_000), processes)
    one, two = (digests(tmp_path / f"{processes}" / "data") for processes in (1, 2))
    assert one == two
    assert len(one) > 4


def test_originals_are_kept_byte_for_byte_under_their_keys_in_order(pictures: Path, tmp_path: Path) -> None:
    prepare(options(pictures, tmp_path / "data", percent=(100, 0, 0)), 1)
    examples = stored(tmp_path / "data", "train")
    keys = [example.features.feature["key"].bytes_list.value[0].decode() for example in examples]
    assert keys == [f"p{number:03d}" for number in range(90)]
    for key, example in zip(keys, examples, strict=True):
        assert example.features.feature["pair/encoded"].bytes_list.value[0] == (pictures / f"{key}.jpeg").read_bytes()


def test_every_kind_of_file_gives_its_own_pixels(tmp_path: Path) -> None:
    """Two folders: labels as 8-bit grey, photographs as 16-bit colour, in every format that holds them."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    kinds = [("png", "tiff"), ("tiff", "png"), ("bmp", "png"), ("png", "png")]
    for number, (left, right) in enumerate(kinds):
        (tmp_path / "in" / f"{number}.{left}").write_bytes(encode(as_kind(label(number), 1, 8), left))
        (tmp_path / "out" / f"{number}.{right}").write_bytes(encode(as_kind(photo(number), 3, 16), right))
    chosen = options(f"{tmp_path}/in,{tmp_path}/out", tmp_path / "data", layout="folders", labels="input", percent=(100, 0, 0))
    prepare(chosen, 1)
    manifest = records.read_manifest(tmp_path / "data")
    assert (manifest.input.kind, manifest.input.channels, manifest.input.bit_depth) == ("labels", 1, 8)
    assert (manifest.target.kind, manifest.target.channels, manifest.target.bit_depth) == ("photo", 3, 16)
    split = Split(tmp_path / "data", manifest, "train")
    for number in range(len(kinds)):
        pair = decode_record(tf.constant(split.read(number)), manifest)
        np.testing.assert_array_equal(pair.input, as_kind(label(number), 1, 8))
        np.testing.assert_array_equal(pair.target, as_kind(photo(number), 3, 16))


def test_all_that_is_bad_is_named_in_one_report_and_nothing_is_written(pictures: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(pictures, tmp_path / "source"))
    expected = spoil(source)
    with pytest.raises(DataError) as caught:
        prepare(options(source, tmp_path / "data"), 1)
    *lines, advice = str(caught.value).splitlines()
    assert len(lines) == len(expected)
    assert [want for want in expected if sum(f"{source}/{want}" in line for line in lines) != 1] == []
    assert advice.startswith("5 problems in 95 pairs; nothing was written")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_skip_bad_leaves_them_out_counted_and_listed(pictures: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(pictures, tmp_path / "source"))
    expected = spoil(source)
    closing = prepare(options(source, tmp_path / "data"), 1, skip_bad=True)
    manifest = records.read_manifest(tmp_path / "data")
    assert sum(manifest.examples(split) for split in manifest.splits) == 90
    assert len(manifest.skipped) == 5
    assert all(any(want in line for line in manifest.skipped) for want in expected)
    assert "5 left out; dataset.json lists them" in closing


def test_mismatched_sizes_name_both_files(tmp_path: Path) -> None:
    for side, height in (("a", 64), ("b", 48)):
        (tmp_path / side).mkdir()
        (tmp_path / side / "1.png").write_bytes(encode(photo(0, height), "png"))
    with pytest.raises(DataError, match=r"a/1\.png: is 64x64, its partner .*b/1\.png is 64x48"):
        prepare(options(f"{tmp_path}/a,{tmp_path}/b", tmp_path / "data", layout="folders"), 1)


class Died(BaseException):
    """Stands for the power going."""


def test_interrupted_run_looks_unfinished_and_a_second_one_completes_it(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends after its third shard; the second run takes the finished ones as they are."""
    whole, chosen = tmp_path / "whole" / "data", options(pictures, tmp_path / "data", shard_bytes=60_000)
    prepare(options(pictures, whole, shard_bytes=60_000), 1)
    real, written = prepare_module.write_one, []

    def dies(*arguments: object) -> object:
        if len(written) == 3:
            raise Died
        written.append(arguments)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare_module, "write_one", dies)
    with pytest.raises(Died):
        prepare(chosen, 1)
    assert not (tmp_path / "data").exists()
    written.clear()
    monkeypatch.setattr(prepare_module, "write_one", lambda *arguments: (written.append(arguments), real(*arguments))[1])
    prepare(chosen, 1)
    shards = [shard for shards in records.read_manifest(whole).splits.values() for shard in shards]
    assert len(written) == len(shards) - 3
    assert digests(tmp_path / "data") == digests(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "whole"]


def test_prepared_again_is_done_at_once_and_other_pictures_are_refused(pictures: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(pictures, tmp_path / "source"))
    prepare(options(source, tmp_path / "data"), 1)
    before = digests(tmp_path / "data")
    assert "is prepared already" in prepare(options(source, tmp_path / "data"), 1)
    (source / "p000.jpeg").write_bytes((source / "p001.jpeg").read_bytes())
    with pytest.raises(UserError, match="holds another data set"):
        prepare(options(source, tmp_path / "data"), 1)
    assert digests(tmp_path / "data") == before


def test_a_folder_that_is_no_data_set_is_not_touched(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is there and is no data set"):
        prepare(options(pictures, tmp_path / "data"), 1)


def test_no_pictures_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures"):
        prepare(options(tmp_path, tmp_path / "data"), 1)


def test_the_command_teaches_prepares_and_refuses(pictures: Path, tmp_path: Path) -> None:
    taught = run_trainer("prepare", "--help")
    assert taught.returncode == 0
    assert taught.stdout.count("  trainer prepare ") >= 3
    done = run_trainer(
        "prepare", f"--source={pictures}", f"--output={tmp_path}/data", "--labels=input", "--split_percent=80,10,10",
        "--processes=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"next: trainer --data_dir={tmp_path}/data --model_dir=RUN" in done.stdout
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"")
    refused = run_trainer("prepare", f"--source={tmp_path}/bad", f"--output={tmp_path}/bad-data")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"trainer: {tmp_path}/bad/x.png: the file is empty\n")
    assert "Traceback" not in refused.stderr
    assert run_trainer("prepare", "--output=x").stderr.startswith("trainer: trainer prepare needs --source")


def test_a_folder_named_partial_that_is_somebodys_is_not_touched(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is in the way"):
        prepare(options(pictures, tmp_path / "data"), 1)
    assert (tmp_path / "data.partial" / "thesis.tex").read_text() == "mine"


def test_swapped_sides_of_equal_size_are_another_data_set(tmp_path: Path) -> None:
    for side, seed in (("a", 0), ("b", 1)):
        (tmp_path / side).mkdir()
        (tmp_path / side / "1.bmp").write_bytes(encode(photo(seed), "bmp"))
    prepare(options(f"{tmp_path}/a,{tmp_path}/b", tmp_path / "data", layout="folders"), 1)
    with pytest.raises(UserError, match="holds another data set"):
        prepare(options(f"{tmp_path}/b,{tmp_path}/a", tmp_path / "data", layout="folders"), 1)


@pytest.fixture
def stuck(tmp_path: Path) -> Path:
    """Forty pairs of which the last is a pipe: it gives its picture once, for the header, and keeps its second reader waiting."""
    write_pairs(tmp_path / "source", 40, "bmp", (128, 128))
    pipe = tmp_path / "source" / "p039.bmp"
    pipe.rename(tmp_path / "p039.bmp")
    os.mkfifo(pipe)
    content = (tmp_path / "p039.bmp").read_bytes()
    threading.Thread(target=lambda: pipe.write_bytes(content), daemon=True).start()
    return tmp_path / "source"


def ended_by(number: signal.Signals, processes: int, source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Start the command, send it a signal between two of its shards, and see that no process of its own lives on."""
    flags = ("--split_percent=100,0,0", "--shard_mb=1", f"--processes={processes}")
    process = start_trainer("prepare", f"--source={source}", f"--output={output}", *flags)
    wait_until(lambda: len(list(output.parent.glob("data.partial/*.tfrecord.json"))) >= 2, process, what="the second shard")
    family = psutil.Process(process.pid).children(recursive=True)
    assert (len(family) >= processes) == (processes > 1)
    process.send_signal(number)
    done = finish(process, 60)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    assert not output.exists()
    return done


@pytest.mark.parametrize(
    ("number", "processes"),
    [(signal.SIGTERM, 1), *(pytest.param(one, 2, marks=pytest.mark.slow) for one in (signal.SIGTERM, signal.SIGINT))],
)
def test_a_signal_ends_it_with_143_and_leaves_no_process(
    number: signal.Signals, processes: int, stuck: Path, tmp_path: Path
) -> None:
    done = ended_by(number, processes, stuck, tmp_path / "data")
    assert done.returncode == 143, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"trainer: {number.name}: stopped")


@pytest.mark.slow
def test_killed_it_leaves_no_process_and_the_next_one_goes_on(stuck: Path, tmp_path: Path) -> None:
    """SIGKILL of the parent while one of its processes reads: they end themselves. The shards that it finished are used.

    They were made by several processes, the others and those that they are compared with by one.
    """
    done = ended_by(signal.SIGKILL, 2, stuck, tmp_path / "data")
    assert done.returncode == -signal.SIGKILL
    (tmp_path / "p039.bmp").replace(stuck / "p039.bmp")
    finished = {
        path.name: path.stat().st_ino
        for path in tmp_path.glob("data.partial/*.tfrecord")
        if path.with_name(f"{path.name}.json").exists()
    }
    chosen = {"percent": (100, 0, 0), "shard_bytes": 1_000_000}
    prepare(options(stuck, tmp_path / "data", **chosen), 1)
    prepare(options(stuck, tmp_path / "whole" / "data", **chosen), 1)
    assert digests(tmp_path / "data") == digests(tmp_path / "whole" / "data")
    assert {name: (tmp_path / "data" / name).stat().st_ino for name in finished} == finished


def test_a_full_disk_is_named_and_the_same_command_goes_on_when_there_is_room(pictures: Path, tmp_path: Path) -> None:
    """A real one of 64 kB, which takes two shards of three."""
    whole, chosen = tmp_path / "whole" / "data", {"percent": (100, 0, 0), "shard_bytes": 60_000}
    prepare(options(pictures, whole, **chosen), 1)
    shards = sorted(whole.glob("*.tfrecord"))
    with small_disk(tmp_path / "disk", sum(path.stat().st_size for path in shards[:2]) + 40_000) as disk:
        wanted = options(pictures, disk.path / "data", **chosen)
        with pytest.raises(OSError, match="No space left on device") as caught:
            prepare(wanted, 1)
        assert caught.value.filename == str(disk.path / "data.partial" / shards[2].name)
        assert not (disk.path / "data").exists()
        finished = (disk.path / "data.partial" / shards[0].name).stat().st_ino
        disk.resize(10_000_000)
        prepare(wanted, 1)
        assert digests(disk.path / "data") == digests(whole)
        assert (disk.path / "data" / shards[0].name).stat().st_ino == finished


def test_links_spaces_and_other_alphabets_in_names_are_names_like_others(tmp_path: Path) -> None:
    """Pictures behind links, a data set behind one, and folders that a shell would cut in pieces."""
    write_pairs(tmp_path / "elsewhere", 3)
    source = tmp_path / "Größe 1; $HOME" / "写真 и\u0306"
    (source / "train").mkdir(parents=True)
    (source / "val").symlink_to(tmp_path / "elsewhere")
    for number, name in enumerate(("ñandú 'x'.png", "-rf.png", "a,b.png", "%41.png")):
        (source / "train" / name).symlink_to(tmp_path / "elsewhere" / f"p{number % 3:03d}.png")
    output = tmp_path / "prepared data" / "データ"
    done = run_trainer("prepare", f"--source={source}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    keys = [example.features.feature["key"].bytes_list.value[0].decode() for example in stored(output, "train")]
    assert keys == ["train/%41", "train/-rf", "train/a,b", "train/ñandú 'x'"]
    assert records.read_manifest(output).examples("val") == 3
    (tmp_path / "link to it").symlink_to(output)
    checked = run_trainer("check", f"--data_dir={tmp_path}/link to it")
    assert checked.returncode == 0, checked.stderr
    data = PairData(tmp_path / "link to it", small_config("train.batch_size=2"))
    assert len(list(data.training_batches(0, 2))) == 2


def test_grey_among_colour_counts_as_colour_whichever_comes_first(tmp_path: Path) -> None:
    for number, channels in enumerate((1, 3, 1)):
        for side, draw in (("a", label), ("b", photo)):
            (tmp_path / side).mkdir(exist_ok=True)
            pixels = as_kind(draw(number), channels if side == "a" else 1, 8)
            (tmp_path / side / f"{number}.png").write_bytes(encode(pixels, "png"))
    prepare(options(f"{tmp_path}/a,{tmp_path}/b", tmp_path / "data", layout="folders", percent=(100, 0, 0)), 1)
    manifest = records.read_manifest(tmp_path / "data")
    assert (manifest.input.channels, manifest.target.channels) == (3, 1)
    split = Split(tmp_path / "data", manifest, "train")
    for number, channels in enumerate((1, 3, 1)):
        pair = decode_record(tf.constant(split.read(number)), manifest)
        np.testing.assert_array_equal(pair.input, np.broadcast_to(as_kind(label(number), channels, 8), (64, 64, 3)))


@pytest.mark.parametrize(
    ("channels", "odd", "why"),
    [((3, 4, 3), 1, "has an alpha channel, most have none"), ((4, 4, 1), 2, "has no alpha channel, most have one")],
)
def test_alpha_is_of_all_pictures_or_of_none(channels: tuple[int, ...], odd: int, why: str, tmp_path: Path) -> None:
    """Dropped or invented it would change what is learnt, and nobody would see it."""
    (tmp_path / "in").mkdir()
    for number, one in enumerate(channels):
        (tmp_path / "in" / f"{number}.png").write_bytes(encode(as_kind(photo(number), one, 8), "png"))
    with pytest.raises(DataError) as caught:
        prepare(options(tmp_path / "in", tmp_path / "data"), 1)
    assert str(caught.value).splitlines()[0] == f"{tmp_path}/in/{odd}.png: {why}"
    assert len(str(caught.value).splitlines()) == 2


def test_a_picture_that_goes_away_after_its_header_was_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one, whose size decides where the last shard begins."""
    write_pairs(tmp_path / "in", 3)
    real = prepare_module.judge
    monkeypatch.setattr(prepare_module, "judge", lambda *given: (real(*given), (tmp_path / "in" / "p002.png").unlink())[0])
    with pytest.raises(DataError, match=r"in/p002\.png: cannot be read: No such file or directory"):
        prepare(options(tmp_path / "in", tmp_path / "data", percent=(100, 0, 0)), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.slow
def test_a_picture_of_100_megapixels_is_the_largest(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Of one bit each, so that it is a small file; decoded it is a hundred megabytes."""
    for name, height in (("whole", 10_000), ("more", 10_001)):
        (tmp_path / name).mkdir()
        Image.new("1", (10_000, height), 1).save(tmp_path / name / "1.png")
    prepare(options(tmp_path / "whole", tmp_path / "data"), 1)
    assert verify(tmp_path / "data", 1)[1] == []
    with pytest.raises(DataError, match=r"more/1\.png: 10000x10001 is more than 100,000,000 pixels; make it smaller"):
        prepare(options(tmp_path / "more", tmp_path / "more-data"), 1)
    assert list(recwarn) == []


def timed(source: Path, output: Path) -> tuple[float, float]:
    """Run the command; seconds, and the peak memory in bytes of the process and its children together."""
    began, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-m", "trainer", "prepare", f"--source={source}", f"--output={output}"])
    while process.poll() is None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        peak = max(peak, sum(memory(one) for one in family))
        time.sleep(0.1)
    assert process.returncode == 0
    return time.monotonic() - began, peak


def memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


@pytest.mark.clock
@pytest.mark.slow
def test_ten_thousand_pairs_in_a_minute_and_flat_memory(tmp_path: Path) -> None:
    """512x256 JPEG on two cores; four times the pictures take no more memory."""
    write_pairs(tmp_path / "some", 63, "jpeg", (256, 256))
    some = sorted((tmp_path / "some").iterdir())
    for name, count in (("few", 2_500), ("many", 10_000)):
        (tmp_path / name).mkdir()
        for number in range(count):
            os.link(some[number % 63], tmp_path / name / f"{number:05d}.jpeg")
    _, few = timed(tmp_path / "few", tmp_path / "few-data")
    seconds, many = timed(tmp_path / "many", tmp_path / "many-data")
    print(f"10,000 pairs in {seconds:.0f} s, peak memory {many / 1e9:.2f} GB; 2,500 pairs {few / 1e9:.2f} GB")
    assert many < few + 200e6
    assert_within(0, seconds, 60)
