from pathlib import Path

import numpy as np
import psutil
import pytest
import tensorflow as tf

from tests.helpers.images import encode, label
from tests.helpers.processes import run_trainer
from trainer.data import images
from trainer.data.pipeline import PairData
from trainer.errors import DataError
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


def test_500_pictures_of_many_sizes_do_not_grow_the_memory(trained_run: TrainedRun) -> None:
    predictor, process = Predictor(trained_run), psutil.Process()
    sizes = [(40 + 8 * number, 40 + 6 * (number % 7)) for number in range(20)]
    used = []
    for number in range(500):
        predictor.draw(label(number % 5, *sizes[number % 20]))
        used.append(process.memory_info().rss)
    assert max(used[400:]) - max(used[50:150]) < 40e6


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
