"""Whole runs where disks are full, read-only, elsewhere or somebody else's, and where a folder has an unusual name."""

import errno
import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.disks import small_disk
from tests.helpers.holder import held_by_another
from tests.helpers.processes import finish, run_trainer, start_program
from tests.helpers.runs import assert_same_run, last_line, newest_step, tensors
from tests.helpers.settings import flags
from tests.helpers.users import ME, MY_GROUP, TRAINER_AS_NOBODY, folder_for_everybody

STEPS = 8
SETTINGS = (
    "data.image_size=[32,32]", "data.jitter=2", "model.generator.filters=4", "model.discriminator.filters=4",
    "model.discriminator.receptive_field=16", f"train.steps={STEPS}", "train.checkpoint_every=4", "train.summary_every=2",
    "train.sample_every=8", "train.evaluate_every=4", "train.keep=2",
)  # fmt: skip
MAIN = """
from trainer.__main__ import main
main()
"""
IMPATIENT = f"""
from trainer.train import begin
begin.LOCK_SECONDS = 0.05
{MAIN}"""
# The first rename that gives a name fails, before the server has done it or after.
FAILING = f"""
import os, sys
name, code, done = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1) == "done"
replace, failed = os.replace, []

def replacing(source, target, **where):
    fails = os.path.basename(target) == name and not failed
    if done or not fails:
        replace(source, target, **where)
    if fails:
        failed.append(target)
        raise OSError(code, os.strerror(code), str(source), None, str(target))

os.replace = replacing
{MAIN}"""


def train(folder: Path, data: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    return run_trainer(*flags(folder, *SETTINGS, *settings, data_dir=data))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, sample_folder: Path) -> Path:
    """The run that all others must equal."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = train(folder, sample_folder)
    assert done.returncode == 0, done.stderr
    return folder


# -- who may write where


def test_a_folder_that_the_user_may_not_write_in_is_one_line(sample_folder: Path) -> None:
    with folder_for_everybody() as folder:
        folder.chmod(0o555)
        done = finish(start_program(TRAINER_AS_NOBODY, *flags(folder / "run", *SETTINGS, data_dir=sample_folder)))
        assert list(folder.iterdir()) == []
    advice = f"let user {ME}:{MY_GROUP} write there, or choose another --model_dir"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"trainer: {folder / 'run'}: cannot write there (Permission denied); {advice}\n"


def test_a_file_of_somebody_else_in_the_folder_is_one_line(sample_folder: Path) -> None:
    with folder_for_everybody() as folder:
        run = folder / "run"
        run.mkdir()
        (run / ".lock").touch(0o444)
        run.chmod(0o555)
        done = finish(start_program(TRAINER_AS_NOBODY, *flags(run, *SETTINGS, data_dir=sample_folder)))
        run.chmod(0o755)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        rf"trainer: {run}: cannot write there \(Permission denied\); let user {ME}:{MY_GROUP} write .*\n", done.stderr
    )


def test_a_read_only_file_system_is_one_line(sample_folder: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        disk.make_read_only()
        done = train(disk.path / "run", sample_folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"trainer: {disk.path / 'run'}: cannot write there (Read-only file system); let user ")
    assert done.stderr.count("\n") == 1


class Strange(NamedTuple):
    """A run of user nobody: its data cannot be written, its folder is a link with an unusual name, its checkpoints elsewhere."""

    link: Path
    run: Path
    checkpoints: Path
    data: Path
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def strange(sample_folder: Path) -> Iterator[Strange]:
    with (
        folder_for_everybody() as folder,
        small_disk(folder / "Platte 2", 16 << 20) as disk,
        small_disk(folder / "données d'été", 16 << 20) as data,
    ):
        for file in sample_folder.iterdir():
            (data.path / file.name).write_bytes(file.read_bytes())
        data.make_read_only()
        link, run, checkpoints = folder / "mein Lauf 🦉", folder / "läuft überall 走", disk.path / "weights of the run"
        for made in (run, checkpoints):
            made.mkdir()
            os.chown(made, ME, MY_GROUP)
        link.symlink_to(run)
        (run / "checkpoints").symlink_to(checkpoints)
        done = finish(start_program(TRAINER_AS_NOBODY, *flags(link, *SETTINGS, data_dir=data.path)))
        assert done.returncode == 0, done.stderr
        yield Strange(link, run, checkpoints, data.path, done)


@pytest.mark.slow
def test_a_run_does_not_depend_on_where_its_folders_lie(strange: Strange, undisturbed: Path) -> None:
    assert_same_run(strange.link, undisturbed)


@pytest.mark.slow
def test_links_stay_links_and_checkpoints_lie_on_the_other_disk(strange: Strange) -> None:
    assert strange.link.is_symlink()
    assert (strange.run / "checkpoints").is_symlink()
    assert len(list(strange.checkpoints.glob("step-*.data-*"))) == 2


@pytest.mark.slow
def test_it_names_its_folder_as_the_user_does(strange: Strange) -> None:
    assert f"training on quickstart_nuclei ({strange.data}), 40 pairs, into {strange.link}" in strange.done.stderr
    assert f"pictures    {strange.link}/samples" in strange.done.stdout
    assert json.loads((strange.link / "data.json").read_text())["name"] == "quickstart_nuclei"


@pytest.mark.slow
def test_all_that_it_left_is_the_users(strange: Strange) -> None:
    left = [*strange.run.rglob("*"), *strange.checkpoints.rglob("*")]
    assert len(left) > 10
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in left if not path.is_symlink()} == {(ME, MY_GROUP)}


@pytest.mark.slow
def test_the_same_command_finds_it_again(strange: Strange) -> None:
    again = finish(start_program(TRAINER_AS_NOBODY, *flags(strange.link, *SETTINGS, data_dir=strange.data)))
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, "this run is finished; raise train.steps to go on")


# -- two processes in one folder


def test_a_second_run_in_one_folder_is_one_line_that_names_the_first(sample_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with held_by_another(run) as holder:
        done = finish(start_program(IMPATIENT, *flags(run, *SETTINGS, data_dir=sample_folder)))
    owner = f"process {holder.process.pid} on {socket.gethostname()}"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"trainer: {run}: {owner} is training in it; stop it or choose another --model_dir\n"
    assert [path.name for path in run.iterdir()] == [".lock"]


# -- a full disk, and a network file system that forgets


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_checkpoint_loses_nothing(undisturbed: Path, sample_folder: Path, tmp_path: Path) -> None:
    """It has room for one checkpoint and a half; then for all."""
    size = sum(path.stat().st_blocks * 512 for path in (undisturbed / "checkpoints").glob(f"step-{STEPS:08d}-*"))
    with small_disk(tmp_path / "disk", size * 3 // 2 + (64 << 10)) as disk:
        run = disk.path / "run"
        done = train(run, sample_folder)
        assert done.returncode == 1, done.stderr
        why = "no space left there (or in TMPDIR, for a bucket); free some, or lower train.keep, and give the same command again"
        assert last_line(done) == f"trainer: {run / 'checkpoints'}: the checkpoint of step {STEPS} could not be saved: {why}"
        assert "Traceback" not in done.stderr
        assert newest_step(run) == 4
        assert tensors(run / "checkpoints" / "step-00000004-1")["step/.ATTRIBUTES/VARIABLE_VALUE"] == 4
        disk.resize(16 << 20)
        again = train(run, sample_folder)
        assert again.returncode == 0, again.stderr
        assert "going on from the checkpoint of step 4" in again.stderr
        assert_same_run(run, undisturbed)
        assert not list(run.rglob(".writing-*"))


@pytest.mark.slow
def test_a_full_disk_below_any_part_of_a_run_is_one_line_and_loses_nothing(
    undisturbed: Path, sample_folder: Path, tmp_path: Path
) -> None:
    """Summaries, metrics and samples lie on full disks; they are freed one after the other, each time the run gets further."""
    run = tmp_path / "run"
    run.mkdir()
    with ExitStack() as stack:
        disks = [stack.enter_context(small_disk(tmp_path / name, 1 << 20)) for name in ("summaries", "metrics.jsonl", "samples")]
        for disk in disks:
            inside = disk.path / "inside"
            if "." not in disk.path.name:
                inside.mkdir()
            (run / disk.path.name).symlink_to(inside)
            disk.fill()
        for disk, file in zip(disks, ("summaries", "metrics.jsonl", f"samples/step-{STEPS:07d}.png"), strict=True):
            done = train(run, sample_folder)
            assert (done.returncode, last_line(done)) == (1, f"trainer: {run / file}: No space left on device")
            assert "Traceback" not in done.stderr
            disk.free()
        assert newest_step(run) == 4
        again = train(run, sample_folder)
        assert again.returncode == 0, again.stderr
        assert_same_run(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "done"),
    [
        ("data.json", errno.EIO, False),
        ("step-00000004.json", errno.ESTALE, False),
        ("best.json", errno.EIO, True),
    ],
)
def test_a_failed_rename_is_one_line_and_the_same_command_ends_with_the_same_bits(
    name: str, code: int, done: bool, undisturbed: Path, sample_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    given = flags(run, *SETTINGS, data_dir=sample_folder)
    failed = finish(start_program(FAILING, name, str(code), "done" if done else "not", *given))
    assert failed.returncode == 1, failed.stderr
    assert last_line(failed).endswith(os.strerror(code))
    assert "Traceback" not in failed.stderr
    assert list(run.rglob(".writing-*")) == []
    again = run_trainer(*given)
    assert again.returncode == 0, again.stderr
    assert_same_run(run, undisturbed)
