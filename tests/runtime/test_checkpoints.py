import json
from pathlib import Path

import pytest
import tensorflow as tf

from trainer.errors import TrainerError, UserError
from trainer.runtime.checkpoints import Checkpoints


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Checkpoints, tf.Variable, tf.train.Checkpoint]:
    checkpoints, variable = Checkpoints(tmp_path / "checkpoints", keep=2), tf.Variable([1.0, 2.0])
    state = tf.train.Checkpoint(weights=variable)
    for step in (10, 20, 30):
        variable.assign([float(step), 0.5])
        checkpoints.save(state, step)
    return checkpoints, variable, state


def data_file(checkpoints: Checkpoints, step: int) -> Path:
    return next(checkpoints.folder.glob(f"step-{step:08d}-*.data*"))


def test_newest_is_restored(saved: tuple[Checkpoints, tf.Variable, tf.train.Checkpoint]) -> None:
    checkpoints, variable, state = saved
    variable.assign([0.0, 0.0])
    marker = checkpoints.newest_whole()
    assert marker is not None
    assert (marker.step, marker.pending) == (30, False)
    checkpoints.restore(state, marker)
    assert variable.numpy().tolist() == [30.0, 0.5]


def test_as_many_as_asked_are_kept(saved: tuple[Checkpoints, tf.Variable, tf.train.Checkpoint]) -> None:
    checkpoints = saved[0]
    assert [marker.step for marker in checkpoints.markers()] == [20, 30]
    assert list(checkpoints.folder.glob("step-00000010*")) == []


def test_best_is_kept_besides(saved: tuple[Checkpoints, tf.Variable, tf.train.Checkpoint]) -> None:
    checkpoints, _, state = saved
    checkpoints.mark_best(20, 9.5)
    for step in (40, 50):
        checkpoints.save(state, step)
    assert [marker.step for marker in checkpoints.markers()] == [20, 40, 50]
    assert json.loads((checkpoints.folder / "best.json").read_text()) == {"step": 20, "val_l1": 9.5}


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_newest_falls_back_and_says_so(
    saved: tuple[Checkpoints, tf.Variable, tf.train.Checkpoint], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
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


def test_without_a_marker_files_are_not_a_checkpoint(saved: tuple[Checkpoints, tf.Variable, tf.train.Checkpoint]) -> None:
    checkpoints = saved[0]
    (checkpoints.folder / "step-00000030.json").unlink()
    marker = checkpoints.newest_whole()
    assert marker is not None
    assert marker.step == 20
    checkpoints.clean()
    assert list(checkpoints.folder.glob("step-00000030*")) == []


def test_torn_marker_is_passed_over(saved: tuple[Checkpoints, tf.Variable, tf.train.Checkpoint]) -> None:
    checkpoints = saved[0]
    (checkpoints.folder / "step-00000030.json").write_text('{"step": 30, "fil')
    marker = checkpoints.newest_whole()
    assert marker is not None
    assert marker.step == 20


def test_all_damaged_is_an_error_not_a_fresh_start(saved: tuple[Checkpoints, tf.Variable, tf.train.Checkpoint]) -> None:
    checkpoints = saved[0]
    for step in (20, 30):
        data_file(checkpoints, step).unlink()
    with pytest.raises(UserError, match="no checkpoint in it is whole"):
        checkpoints.newest_whole()


def test_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", keep=1).newest_whole() is None


def test_other_networks_are_refused(saved: tuple[Checkpoints, tf.Variable, tf.train.Checkpoint]) -> None:
    checkpoints = saved[0]
    marker = checkpoints.newest_whole()
    assert marker is not None
    other = tf.train.Checkpoint(weights=tf.Variable([1.0, 2.0]), more=tf.Variable(3.0))
    with pytest.raises(UserError, match="not a checkpoint of these networks"):
        checkpoints.restore(other, marker)


def test_saving_a_step_again_replaces_it(saved: tuple[Checkpoints, tf.Variable, tf.train.Checkpoint]) -> None:
    checkpoints, variable, state = saved
    variable.assign([7.0, 7.0])
    checkpoints.save(state, 30, pending=True)
    marker = checkpoints.newest_whole()
    assert marker is not None
    assert marker.pending
    assert len(list(checkpoints.folder.glob("step-00000030-*.index"))) == 1
    checkpoints.restore(state, marker)
    assert variable.numpy().tolist() == [7.0, 7.0]


def test_failed_save_leaves_the_older_ones(saved: tuple[Checkpoints, tf.Variable, tf.train.Checkpoint]) -> None:
    """A folder stands where the new file must go."""
    checkpoints, _, state = saved
    (checkpoints.folder / "step-00000040-1.index" / "x").mkdir(parents=True)
    checkpoints._unused_prefix = lambda step: "step-00000040-1"  # type: ignore[method-assign]
    with pytest.raises(TrainerError, match="the checkpoint of step 40 could not be saved"):
        checkpoints.save(state, 40)
    marker = checkpoints.newest_whole()
    assert marker is not None
    assert marker.step == 30


def test_what_a_killed_save_left_is_removed(saved: tuple[Checkpoints, tf.Variable, tf.train.Checkpoint]) -> None:
    checkpoints = saved[0]
    (checkpoints.folder / "step-00000040-1_temp").mkdir()
    (checkpoints.folder / "step-00000040-1_temp" / "part-0").write_bytes(b"half")
    (checkpoints.folder / "step-00000040-1.index").write_bytes(b"half")
    checkpoints.clean()
    assert list(checkpoints.folder.glob("step-00000040*")) == []


def test_a_marker_that_a_running_job_removes_meanwhile_is_no_error(
    saved: tuple[Checkpoints, tf.Variable, tf.train.Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by one who evaluates a run while it goes on: listed, and gone when it is read."""
    checkpoints = saved[0]
    listed = sorted(checkpoints.folder.glob("step-*.json"))
    listed[0].unlink()
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter(listed))
    assert [marker.step for marker in checkpoints.markers()] == [30]
