"""A checkpoint counts only once whole, whatever happens to the process, the disk or the machine while it is saved."""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow as tf

from tests.helpers.disks import SmallDisk, small_disk
from tests.helpers.journal import Journal, fail_rename
from trainer.errors import TrainerError, UserError
from trainer.runtime.checkpoints import Checkpoints

Saved = tuple[Checkpoints, tf.Variable, tf.train.Checkpoint]


def save_three(folder: Path, size: int = 2) -> Saved:
    """Checkpoints of steps 10, 20 and 30, of which two are kept; in each the first number is the step."""
    checkpoints, variable = Checkpoints(folder, keep=2), tf.Variable(tf.fill([size], 0.5))
    state = tf.train.Checkpoint(weights=variable)
    for step in (10, 20, 30):
        variable[0].assign(float(step))
        checkpoints.save(state, step)
    return checkpoints, variable, state


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    save_three(folder)
    return folder


@pytest.fixture
def saved(three: Path, tmp_path: Path) -> Saved:
    """A copy for one test alone."""
    shutil.copytree(three, tmp_path / "checkpoints")
    variable = tf.Variable([30.0, 0.5])
    return Checkpoints(tmp_path / "checkpoints", keep=2), variable, tf.train.Checkpoint(weights=variable)


def steps(checkpoints: Checkpoints) -> list[int]:
    return [marker.step for marker in checkpoints.markers()]


def restored(checkpoints: Checkpoints, variable: tf.Variable, state: tf.train.Checkpoint) -> float:
    """The first number of the newest whole checkpoint."""
    marker = checkpoints.newest_whole()
    assert marker is not None
    variable.assign(tf.zeros_like(variable))
    checkpoints.restore(state, marker)
    assert variable.numpy()[1:].tolist() == [0.5] * (variable.shape[0] - 1)
    return float(variable.numpy()[0])


def data_file(checkpoints: Checkpoints, step: int) -> Path:
    return next(checkpoints.folder.glob(f"step-{step:08d}-*.data*"))


def test_newest_is_restored(saved: Saved) -> None:
    checkpoints, variable, state = saved
    variable.assign([0.0, 0.0])
    marker = checkpoints.newest_whole()
    assert marker is not None
    assert (marker.step, marker.pending) == (30, False)
    checkpoints.restore(state, marker)
    assert variable.numpy().tolist() == [30.0, 0.5]


def test_as_many_as_asked_are_kept(saved: Saved) -> None:
    checkpoints = saved[0]
    assert [marker.step for marker in checkpoints.markers()] == [20, 30]
    assert list(checkpoints.folder.glob("step-00000010*")) == []


def test_best_is_kept_besides(saved: Saved) -> None:
    checkpoints, _, state = saved
    checkpoints.mark_best(20, 9.5)
    for step in (40, 50):
        checkpoints.save(state, step)
    assert [marker.step for marker in checkpoints.markers()] == [20, 40, 50]
    assert json.loads((checkpoints.folder / "best.json").read_text()) == {"step": 20, "val_l1": 9.5}


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_newest_falls_back_and_says_so(saved: Saved, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints, variable, state = saved
    path = data_file(checkpoints, 30)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-1])
    marker = checkpoints.newest_whole()
    assert marker is not None
    checkpoints.restore(state, marker)
    assert variable.numpy().tolist() == [20.0, 0.5]
    assert "checkpoint of step 30 is damaged" in caplog.text


def test_without_a_marker_files_are_not_a_checkpoint(saved: Saved) -> None:
    checkpoints = saved[0]
    (checkpoints.folder / "step-00000030.json").unlink()
    marker = checkpoints.newest_whole()
    assert marker is not None
    assert marker.step == 20
    checkpoints.clean()
    assert list(checkpoints.folder.glob("step-00000030*")) == []


def test_torn_marker_is_passed_over(saved: Saved) -> None:
    checkpoints = saved[0]
    (checkpoints.folder / "step-00000030.json").write_text('{"step": 30, "fil')
    marker = checkpoints.newest_whole()
    assert marker is not None
    assert marker.step == 20


def test_all_damaged_is_an_error_not_a_fresh_start(saved: Saved) -> None:
    checkpoints = saved[0]
    for step in (20, 30):
        data_file(checkpoints, step).unlink()
    with pytest.raises(UserError, match="no checkpoint in it is whole"):
        checkpoints.newest_whole()


def test_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", keep=1).newest_whole() is None


def test_other_networks_are_refused(saved: Saved) -> None:
    checkpoints = saved[0]
    marker = checkpoints.newest_whole()
    assert marker is not None
    other = tf.train.Checkpoint(weights=tf.Variable([1.0, 2.0]), more=tf.Variable(3.0))
    with pytest.raises(UserError, match="not a checkpoint of these networks"):
        checkpoints.restore(other, marker)


def test_saving_a_step_again_replaces_it(saved: Saved) -> None:
    checkpoints, variable, state = saved
    variable.assign([7.0, 7.0])
    checkpoints.save(state, 30, pending=True)
    marker = checkpoints.newest_whole()
    assert marker is not None
    assert marker.pending
    assert len(list(checkpoints.folder.glob("step-00000030-*.index"))) == 1
    checkpoints.restore(state, marker)
    assert variable.numpy().tolist() == [7.0, 7.0]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Room for some checkpoints of 400 kB."""
    with small_disk(tmp_path / "disk", 4 << 20) as made:
        yield made


@pytest.mark.parametrize("reached", ["nothing", "half the weights", "the weights", "all but the marker"])
def test_a_full_disk_leaves_the_older_checkpoints_and_the_next_save_works(reached: str, disk: SmallDisk) -> None:
    saved = checkpoints, variable, state = save_three(disk.path / "checkpoints", 100_000)
    index, weights = (path.stat().st_blocks * 512 for path in sorted(checkpoints.folder.glob("step-00000030-*"), reverse=True))
    assert index < weights
    room = {"nothing": 0, "half the weights": weights // 2, "the weights": weights, "all but the marker": weights + index}
    disk.fill(left=room[reached])
    variable[0].assign(40.0)
    with pytest.raises(TrainerError, match=r"the checkpoint of step 40 could not be saved: no space left there .* train.keep"):
        checkpoints.save(state, 40)
    assert (checkpoints.folder / "step-00000040-1.index").is_file() == (reached == "all but the marker")
    assert steps(checkpoints) == [20, 30]
    assert restored(*saved) == 30.0
    disk.free()
    variable[0].assign(40.0)
    checkpoints.save(state, 40)
    assert restored(*saved) == 40.0
    names = {path.name.partition("-1")[0].removesuffix(".json") for path in checkpoints.folder.iterdir()}
    assert {name.partition("-2")[0] for name in names} == {"step-00000030", "step-00000040"}, "nothing is left of the failed save"


def test_a_marker_is_written_when_all_it_names_is_on_disk(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the older checkpoints go after the new one's name is on disk too: a power cut leaves one of them whole."""
    checkpoints, _, state = saved
    journal = Journal(monkeypatch)
    checkpoints.save(state, 40)
    marker, data = checkpoints.folder / "step-00000040.json", sorted(checkpoints.folder.glob("step-00000040-*"))
    renamed = journal.rename_of(marker)
    assert len(data) == 2
    for path in data:
        assert [journal.acts[number].size for number in journal.syncs(path) if number < renamed] == [path.stat().st_size]
    source = journal.acts[renamed].source
    assert source is not None
    assert [journal.acts[number].size for number in journal.syncs(source) if number < renamed] == [marker.stat().st_size]
    (named,) = journal.syncs(checkpoints.folder)
    removed = [n for n, act in enumerate(journal.acts) if act.kind == "remove" and act.path.name.startswith("step-00000020")]
    assert len(removed) == 3, "its marker and its two files"
    assert renamed < named < min(removed)


def test_the_marker_of_a_checkpoint_goes_before_its_files(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, _, state = saved
    journal = Journal(monkeypatch)
    checkpoints.save(state, 40)
    gone = [act.path.suffix for act in journal.acts if act.kind == "remove" and act.path.name.startswith("step-00000020")]
    assert gone[0] == ".json"


@pytest.mark.parametrize("done", [False, True], ids=["not renamed", "renamed"])
@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_failed_rename_of_a_marker_leaves_whole_checkpoints(
    code: int, done: bool, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system: the error may come although the server has renamed it."""
    checkpoints, variable, state = saved
    variable[0].assign(40.0)
    with monkeypatch.context() as patch:
        renames = fail_rename(patch, 1, code, done=done)
        with pytest.raises(TrainerError, match=r"of step 40 could not be saved: (Stale file handle|Input/output error)"):
            checkpoints.save(state, 40)
        assert renames() == 1, "the marker's is the only rename that is ours"
    again = Checkpoints(checkpoints.folder, keep=2)
    assert restored(again, variable, state) == (40.0 if done else 30.0)
    again.clean()
    assert steps(again) == ([30, 40] if done else [20, 30])
    assert list(again.folder.glob(".*")) == []
    variable[0].assign(41.0)
    again.save(state, 40)
    assert restored(again, variable, state) == 41.0


def test_checkpoints_may_lie_on_another_disk(disk: SmallDisk, tmp_path: Path) -> None:
    (disk.path / "schöne Gewichte").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(disk.path / "schöne Gewichte")
    saved = save_three(tmp_path / "run" / "checkpoints")
    assert restored(*saved) == 30.0
    assert (tmp_path / "run" / "checkpoints").is_symlink()
    assert len(list((disk.path / "schöne Gewichte").glob("*.json"))) == 2


def test_newest_and_best_are_chosen_by_name(saved: Saved) -> None:
    checkpoints, _, state = saved
    assert (checkpoints.choose("newest").step, checkpoints.choose("best").step) == (30, 30), "without an evaluation"
    checkpoints.mark_best(20, 9.5)
    checkpoints.save(state, 40)
    assert (checkpoints.choose("newest").step, checkpoints.choose("best").step) == (40, 20)


def test_the_newest_of_an_empty_folder_is_asked_for_in_vain(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none: no checkpoint in it yet; train first"):
        Checkpoints(tmp_path / "none", keep=1).choose("newest")


@pytest.mark.parametrize(("damage", "said"), [("flip", "does not match its checksum"), ("marker", "it is not there")])
def test_a_best_checkpoint_that_is_damaged_is_refused_and_no_other_taken(damage: str, said: str, saved: Saved) -> None:
    checkpoints = saved[0]
    checkpoints.mark_best(20, 9.5)
    if damage == "flip":
        path = data_file(checkpoints, 20)
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    else:
        (checkpoints.folder / "step-00000020.json").unlink()
    with pytest.raises(UserError, match=f"the best checkpoint, of step 20, cannot be used: .*{said}"):
        checkpoints.choose("best")


def test_later_checkpoints_are_forgotten_with_their_files(saved: Saved) -> None:
    checkpoints = saved[0]
    checkpoints.forget_after(20)
    checkpoints.clean()
    assert steps(checkpoints) == [20]
    assert list(checkpoints.folder.glob("step-00000030*")) == []


def test_what_a_killed_save_left_is_removed(saved: Saved) -> None:
    checkpoints = saved[0]
    (checkpoints.folder / "step-00000040-1_temp").mkdir()
    (checkpoints.folder / "step-00000040-1_temp" / "part-0").write_bytes(b"half")
    (checkpoints.folder / "step-00000040-1.index").write_bytes(b"half")
    checkpoints.clean()
    assert list(checkpoints.folder.glob("step-00000040*")) == []


def test_a_marker_that_a_running_job_removes_meanwhile_is_no_error(saved: Saved) -> None:
    """Seen by one who evaluates a run while it goes on: listed, and gone when it is read, as a link that leads nowhere is."""
    checkpoints = saved[0]
    marker = checkpoints.folder / "step-00000020.json"
    marker.unlink()
    marker.symlink_to(checkpoints.folder / "removed")
    assert marker in list(checkpoints.folder.glob("step-*.json"))
    assert steps(checkpoints) == [30]
