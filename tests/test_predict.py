import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
import tensorflow as tf

from tests.helpers.damage import with_size
from tests.helpers.disks import small_disk
from tests.helpers.images import encode, label
from tests.helpers.processes import finish, run_trainer, start_program, start_trainer
from tests.helpers.users import ME, TRAINER_AS_NOBODY, folder_for_everybody
from tests.helpers.waiting import wait_until
from trainer.data import images
from trainer.data.pipeline import PairData
from trainer.errors import DataError, TrainerError
from trainer.predict import Predictor, find_jobs, pad, predict
from trainer.train.evaluate import Evaluator
from trainer.trained import TrainedRun, open_run


def pixels_of(path: Path) -> np.ndarray:
    encoded = path.read_bytes()
    return images.decode(encoded, images.inspect(encoded))


@pytest.mark.parametrize("size", [(64, 64), (200, 300), (5, 7), (1, 1), (513, 64), (63, 65)])
def test_pictures_of_any_size_keep_their_size(trained_run: TrainedRun, size: tuple[int, int]) -> None:
    drawn = Predictor(trained_run).draw(label(0, *size))
    assert (drawn.shape, drawn.dtype) == ((*size, 3), np.uint8)


def test_padding_reflects_and_repeats_the_edge_of_what_is_too_small() -> None:
    row = np.arange(1, 6, dtype=np.uint8)[None, :, None]
    wide, top, left = pad(np.repeat(row, 8, 0), 8)
    assert (wide.shape, top, left) == ((8, 8, 1), 0, 1)
    assert wide[0, :, 0].tolist() == [2, 1, 2, 3, 4, 5, 4, 3]
    small, top, left = pad(row[:, :2], 8)
    assert (small.shape, top, left) == ((8, 8, 1), 3, 3)
    assert small[0, :, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]


def test_predict_draws_what_evaluation_measures(trained_run: TrainedRun) -> None:
    data = PairData(trained_run.folder.sample_data, trained_run.config)
    evaluator = Evaluator(trained_run.generator(any_size=False), data, trained_run.config)
    columns = dict(evaluator.columns(data.split("test"), [3]))
    drawn = Predictor(trained_run).draw(columns["input"][0])
    assert np.abs(drawn.astype(int) - columns["output"][0]).max() <= 1


def test_a_result_does_not_depend_on_what_was_drawn_before(trained_run: TrainedRun) -> None:
    predictor = Predictor(trained_run)
    first = predictor.draw(label(1))
    predictor.draw(label(2, 100, 30))
    np.testing.assert_array_equal(predictor.draw(label(1)), first)


def test_seed_draws_another_mask_and_the_same_one_again(trained_run: TrainedRun) -> None:
    plain, seven = Predictor(trained_run).draw(label(0)), Predictor(trained_run, 7).draw(label(0))
    assert (plain != seven).any()
    np.testing.assert_array_equal(Predictor(trained_run, 7).draw(label(0)), seven)
    np.testing.assert_array_equal(Predictor(trained_run, trained_run.config.seed).draw(label(0)), plain)


def test_folders_names_and_orientation_are_kept(trained_run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00"
    (tmp_path / "in" / "a.jpeg").write_bytes(encode(label(0, 40, 60), "jpeg", exif=exif))
    (tmp_path / "in" / "deep" / "b.tiff").write_bytes(encode(label(1, 30, 20)[..., :1], "tiff"))
    closing = predict(trained_run, str(tmp_path / "in"), tmp_path / "out")
    assert closing.startswith(f"2 pictures in {tmp_path}/out")
    assert pixels_of(tmp_path / "out" / "a.png").shape == (60, 40, 3)
    assert pixels_of(tmp_path / "out" / "deep" / "b.png").shape == (30, 20, 3)


def names(jobs: str) -> list[str]:
    return [str(job.name) for job in find_jobs(jobs)]


def test_inputs_are_a_folder_a_glob_a_list_or_one_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "sub/c.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "list.txt").write_text("sub/c.png\na.png\n")
    assert names(str(tmp_path)) == ["a.png", "b.png", "sub/c.png"]
    assert names(f"{tmp_path}/*.jpg") == ["b.png"]
    assert names(f"{tmp_path}/**/*.png") == ["a.png", "sub/c.png"]
    assert names(f"{tmp_path}/list.txt") == ["sub/c.png", "a.png"]
    assert names(f"{tmp_path}/sub/c.png") == ["c.png"]


@pytest.mark.parametrize("line", ["../outside.png", "/etc/x.png", "a/../../x.png", "bell\x07.png"])
def test_unsafe_names_are_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(line + "\n")
    with pytest.raises(DataError, match="would be unsafe"):
        find_jobs(f"{tmp_path}/list.txt")


def test_two_outputs_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.png: its output would have the name of that of .*a\.jpg"):
        find_jobs(str(tmp_path))


def test_nothing_to_draw_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures there"):
        find_jobs(str(tmp_path / "nope"))


@pytest.mark.slow
def test_a_picture_leaves_nothing_in_memory_and_a_new_size_makes_no_new_graph(trained_run: TrainedRun) -> None:
    """Of 80 pictures that hold 36 MB together, fewer than 20 may stay."""
    predictor, process = Predictor(trained_run), psutil.Process()
    pictures = [label(0, 300 + 16 * number, 500 - 16 * number) for number in range(10)]
    used = []
    for number in range(120):
        predictor.draw(pictures[number % 10])
        used.append(process.memory_info().rss)
    assert np.median(used[-20:]) - np.median(used[20:40]) < 20 * pictures[0].nbytes
    assert predictor._draw.experimental_get_tracing_count() == 1


def test_the_command_draws_and_refuses_what_is_no_run(trained_run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(label(0, 50, 70), "png"))
    run = f"--model_dir={trained_run.folder.path}"
    done = run_trainer("predict", run, f"--input={tmp_path}/a.png", f"--output={tmp_path}/out", "--seed=3")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(pixels_of(tmp_path / "out" / "a.png"), Predictor(trained_run, 3).draw(label(0, 50, 70)))
    none = run_trainer("predict", f"--model_dir={tmp_path}", f"--input={tmp_path}/a.png", f"--output={tmp_path}/out")
    assert (none.returncode, none.stderr) == (2, f"trainer: --model_dir={tmp_path}: no run was trained in it\n")


def test_best_checkpoint_can_be_chosen(trained_run: TrainedRun) -> None:
    best = open_run(trained_run.folder.path, "best")
    assert best.marker.step == 20
    assert trained_run.marker.step == 24
    assert (Predictor(best).draw(label(0)) != Predictor(trained_run).draw(label(0))).any()
    assert tf.executing_eagerly()


def test_originals_are_never_replaced_and_old_drawings_never_drawn_again(trained_run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(label(0), "png"))
    before = (tmp_path / "a.png").read_bytes()
    for given in (tmp_path, tmp_path / "a.png", f"{tmp_path}/*.png"):
        with pytest.raises(DataError, match=r"a\.png would be replaced by its drawing"):
            predict(trained_run, str(given), tmp_path)
    assert (tmp_path / "a.png").read_bytes() == before
    for _ in range(2):
        assert predict(trained_run, str(tmp_path), tmp_path / "out").startswith("1 pictures")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["a.png"]


def test_names_of_other_scripts_are_drawn(trained_run: TrainedRun, tmp_path: Path) -> None:
    name = "Bildschirmfoto 2026-01-01 um 9.41\u202fPM \u3000\u753b\u50cf.png"
    (tmp_path / name).write_bytes(encode(label(0), "png"))
    predict(trained_run, str(tmp_path), tmp_path / "out")
    assert (tmp_path / "out" / name).is_file()


@pytest.mark.slow
def test_links_and_spaces_are_followed_and_kept(trained_run: TrainedRun, tmp_path: Path) -> None:
    """A picture that is a link is drawn under the link's own name; a linked folder is one as any other."""
    original = tmp_path / "elsewhere" / "o.png"
    original.parent.mkdir()
    original.write_bytes(encode(label(0), "png"))
    given = tmp_path / "in put" / "\u00fc \u753b"
    given.mkdir(parents=True)
    (given / "to it .png").symlink_to(original)
    (tmp_path / "linked").symlink_to(given.parent)
    for number, named in enumerate((given.parent, tmp_path / "linked", f"{tmp_path}/in put/*/*.png")):
        predict(trained_run, str(named), tmp_path / f"out {number}")
        (drawn,) = (tmp_path / f"out {number}").rglob("*.png")
        assert drawn.relative_to(tmp_path / f"out {number}").as_posix() == "\u00fc \u753b/to it .png"
        np.testing.assert_array_equal(pixels_of(drawn), Predictor(trained_run).draw(label(0)))
    with pytest.raises(DataError, match="would be replaced by its drawing"):
        predict(trained_run, str(original), tmp_path / "elsewhere")
    (tmp_path / "back").symlink_to(original.parent)
    with pytest.raises(DataError, match="would be replaced by its drawing"):
        predict(trained_run, str(original), tmp_path / "back")


def test_a_link_to_nothing_is_named_and_the_others_are_drawn(trained_run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encode(label(0), "png"))
    (tmp_path / "in" / "b.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "list.txt").write_text("in/a.png\nin/b.png\n")
    with pytest.raises(
        DataError, match=rf"^{tmp_path}/in/b\.png: No such file or directory\n1 of 2 pictures could not be drawn$"
    ):
        predict(trained_run, str(tmp_path / "list.txt"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*.png")] == ["a.png"]


def test_a_picture_of_more_than_100_million_pixels_is_named_and_the_others_drawn(trained_run: TrainedRun, tmp_path: Path) -> None:
    """By its header, before its pixels are made."""
    (tmp_path / "large.png").write_bytes(with_size(encode(label(0), "png"), 10_001))
    (tmp_path / "small.png").write_bytes(encode(label(0), "png"))
    with pytest.raises(
        DataError, match=r"large\.png: (10001x10001 is )?more than 100,000,000 pixels; make it smaller or cut it into tiles"
    ):
        predict(trained_run, str(tmp_path), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["small.png"]


@pytest.mark.slow
def test_two_at_the_same_time_write_whole_drawings_into_one_folder(trained_run: TrainedRun, tmp_path: Path) -> None:
    """Both are in the middle of their work: one image of each comes through a pipe, which the test fills late."""
    processes = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        os.mkfifo(folder / "late.png")
        for name in ("same.png", f"own{number}.png"):
            (folder / name).write_bytes(encode(label(5), "png"))
        (folder / "list.txt").write_text(f"late.png\nsame.png\nown{number}.png\n")
        run, given = f"--model_dir={trained_run.folder.path}", f"--input={folder}/list.txt"
        processes.append(start_trainer("predict", run, given, f"--output={tmp_path}/out"))
    pipes: list[int] = []
    for number, process in enumerate(processes):
        wait_until(lambda at=number: opened(tmp_path / str(at) / "late.png", pipes), process)
    for pipe in pipes:
        with os.fdopen(pipe, "wb") as writer:
            writer.write(encode(label(6), "png"))
    for process in processes:
        done = finish(process)
        assert (done.returncode, done.stderr) == (0, "")
    drawn = {path.name: pixels_of(path) for path in (tmp_path / "out").iterdir()}
    assert drawn.keys() == {"late.png", "same.png", "own0.png", "own1.png"}
    predictor = Predictor(trained_run)
    for name, pixels in drawn.items():
        np.testing.assert_array_equal(pixels, predictor.draw(label(6 if name == "late.png" else 5)))


def opened(pipe: Path, pipes: list[int]) -> bool:
    """Open a pipe for writing, if somebody reads from it."""
    try:
        pipes.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        assert error.errno == errno.ENXIO
        return False
    os.set_blocking(pipes[-1], True)
    return True


def test_a_user_who_may_not_write_there_is_told_so(trained_run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(label(0), "png"))
    with folder_for_everybody() as folder:
        shutil.copytree(trained_run.folder.path, folder / "run")
        folder.chmod(0o555)
        arguments = ["predict", f"--model_dir={folder}/run", f"--input={tmp_path}/a.png", f"--output={folder}/out"]
        done = finish(start_program(TRAINER_AS_NOBODY, *arguments))
        folder.chmod(0o755)
        assert [path.name for path in folder.iterdir()] == ["run"]
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    advice = rf"let user {ME}:\d+ read and write there, or choose another place"
    assert re.fullmatch(rf"trainer: {folder}/out: Permission denied; {advice}\n", done.stderr), done.stderr


def test_a_full_disk_is_named_and_leaves_no_part_of_a_drawing(trained_run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(label(0, 300, 300), "png"))
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        (disk.path / "out").mkdir()
        disk.fill(left=4096)
        done = run_trainer(
            "predict", f"--model_dir={trained_run.folder.path}", f"--input={tmp_path}/a.png", f"--output={disk.path}/out"
        )
        assert list((disk.path / "out").iterdir()) == []
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"trainer: .*disk/out.*: No space left on device\n", done.stderr), done.stderr


def test_a_checkpoint_that_went_away_meanwhile_is_named(trained_run: TrainedRun, tmp_path: Path) -> None:
    """Training goes on in the folder, and removes the old checkpoint after it was chosen."""
    run = open_run(Path(shutil.copytree(trained_run.folder.path, tmp_path / "run")))
    for path in (tmp_path / "run" / "checkpoints").glob(f"{run.marker.prefix}*"):
        path.unlink()
    with pytest.raises(
        TrainerError, match=rf"^{tmp_path}/run/checkpoints/step-00000024-1: cannot be read, or is gone .*; try again$"
    ):
        Predictor(run)
