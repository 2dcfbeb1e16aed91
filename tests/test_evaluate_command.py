import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.helpers.damage import flip_in_record
from tests.helpers.images import photo
from tests.helpers.processes import run_trainer
from tests.helpers.scores import ms_ssim
from trainer.check import check
from trainer.data import records
from trainer.errors import DataError
from trainer.evaluate import Summary, evaluate, summarise, table
from trainer.train.evaluate import score
from trainer.trained import TrainedRun, open_run


def test_interval_is_that_of_the_mean() -> None:
    """For many values the bootstrap agrees with the normal interval, mean +- 1.96 s / sqrt(n)."""
    values = np.random.default_rng(0).exponential(5.0, 2000)
    summary = summarise(values)
    half = 1.96 * values.std() / 2000**0.5
    assert summary.mean == pytest.approx(values.mean())
    assert summary.median == pytest.approx(np.median(values))
    assert (values.mean() - summary.low, summary.high - values.mean()) == pytest.approx((half, half), rel=0.06)
    assert summarise(values) == summary


def test_one_image_has_an_interval_of_no_width() -> None:
    summary = summarise(np.array([3.0]))
    assert (summary.low, summary.mean, summary.high) == (3.0, 3.0, 3.0)


def test_ms_ssim_is_the_published_formula() -> None:
    a, b = photo(0, 256, 256)[..., :1].astype(float), photo(0, 256, 256)[..., :1].astype(float)
    b = np.clip(b + np.random.default_rng(0).normal(0, 20, b.shape), 0, 255)
    ours = float(score(tf.constant(a[None]), tf.constant(b[None]), multiscale=True)["ms_ssim"][0])
    assert ours == pytest.approx(ms_ssim(a, b), abs=1e-4)


def test_ms_ssim_is_left_out_where_the_image_is_too_small() -> None:
    small = tf.constant(photo(0, 160, 256)[None])
    assert list(score(small, small, multiscale=True)) == ["l1", "psnr", "ssim"]


@pytest.fixture(scope="module")
def reports(trained_run: TrainedRun) -> tuple[Path, str]:
    """Where an evaluation of the test split left its files, and what it said."""
    text = evaluate(trained_run, "", "test")
    return trained_run.folder.path / "evaluation" / "test-step-0000024-paper", text


def test_reports_agree_with_each_other_and_with_the_run(trained_run: TrainedRun, reports: tuple[Path, str]) -> None:
    folder, text = reports
    rows = list(csv.DictReader((folder / "per_image.csv").read_text().splitlines()))
    summary = json.loads((folder / "summary.json").read_text())
    assert len(rows) == summary["images"] == 15
    assert rows[0]["key"] == "2246874c8b5b"
    for name in ("l1", "psnr", "ssim"):
        values = np.array([float(row[name]) for row in rows])
        assert summary["scores"][name]["mean"] == pytest.approx(values.mean(), abs=1e-5)
        assert summary["scores"][name]["low"] < values.mean() < summary["scores"][name]["high"]
    logged = next(entry for entry in trained_run.folder.metrics() if entry["split"] == "test")
    assert summary["scores"]["l1"]["mean"] == pytest.approx(logged["l1"], abs=1e-5)
    assert text.splitlines()[-1] == f"test L1 {logged['l1']:.1f} of 255"


def test_picture_shows_best_median_and_worst(reports: tuple[Path, str]) -> None:
    folder, _ = reports
    sheet = np.asarray(Image.open(folder / "extremes.png"), float)
    l1 = sorted(float(row["l1"]) for row in csv.DictReader((folder / "per_image.csv").read_text().splitlines()))
    tops = [44 + 68 * row for row in range(3)]
    shown = [np.abs(sheet[top : top + 64, 68:132] - sheet[top : top + 64, 136:200]).mean() for top in tops]
    assert shown == pytest.approx([l1[0], l1[7], l1[14]], abs=0.01)


@pytest.mark.slow
def test_the_command_measures_the_frozen_generator_too(trained_run: TrainedRun) -> None:
    done = run_trainer(
        "evaluate", f"--model_dir={trained_run.folder.path}", "--split=val", "--inference=frozen", "--checkpoint=best"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("8 pairs of val, step 20, frozen inference\n")
    assert (trained_run.folder.path / "evaluation" / "val-step-0000020-frozen" / "summary.json").is_file()
    frozen = open_run(trained_run.folder.path, inference="frozen")
    assert frozen.config.model.inference == "frozen"


def test_missing_split_is_named(trained_run: TrainedRun, tmp_path: Path) -> None:
    manifest = records.read_manifest(trained_run.folder.sample_data)
    for path in trained_run.folder.sample_data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    splits = {"train": manifest.splits["train"], "val": manifest.splits["val"]}
    records.write_manifest(tmp_path, manifest.model_copy(update={"splits": splits}))
    with pytest.raises(DataError, match="no pairs in the split 'test'; it has train, val"):
        evaluate(trained_run, str(tmp_path), "test")


def test_table_has_a_row_for_each_score_and_a_column_for_each_number() -> None:
    lines = table({"l1": Summary(1.5, 1.25, 1.75, 9.0), "ms_ssim": Summary(0.5, 0.25, 0.75, 0.625)}).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "mean 95 % interval median",
        "L1 (of 255) 1.5000 1.2500 to 1.7500 9.0000",
        "MS-SSIM 0.5000 0.2500 to 0.7500 0.6250",
    ]
    assert {len(line) for line in lines} == {len(lines[0])}, "columns that stand below their names"


def test_data_of_another_kind_are_refused(trained_run: TrainedRun, tmp_path: Path) -> None:
    """Their pictures would go through the network, and their scores would mean nothing: photographs said to be label maps."""
    manifest = records.read_manifest(trained_run.folder.sample_data)
    for path in trained_run.folder.sample_data.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / records.MANIFEST_NAME).unlink()
    records.write_manifest(tmp_path, manifest.model_copy(update={"target": manifest.input}))
    with pytest.raises(
        DataError, match=r"its pictures differ from those that the run was trained on \(channels, bits, label maps\)"
    ):
        evaluate(trained_run, str(tmp_path), "val")
    assert not list(trained_run.folder.path.glob("evaluation/val-*-paper*"))


def test_check_counts_and_draws_a_contact_sheet(sample_folder: Path, tmp_path: Path) -> None:
    text = check(sample_folder, tmp_path / "sheet.png")
    assert "train         40 pairs in 2 shards" in text
    assert text.splitlines()[-1] == "every shard, record and picture is sound"
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (22 + 6 * 150, 4 * 260 - 4, 3)
    assert (sheet[22:150, :128] == [0, 0, 0]).all(-1).mean() > 0.2, "label maps are on the left"


def test_check_ends_with_2_and_names_what_is_bad(sample_folder: Path, tmp_path: Path) -> None:
    for path in sample_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert run_trainer("check", f"--data_dir={tmp_path}").returncode == 0
    shard = tmp_path / "test-00000-of-00001.tfrecord"
    flip_in_record(tmp_path, "test", 0)
    (tmp_path / "val-00000-of-00001.tfrecord").unlink()
    done = run_trainer("check", f"--data_dir={tmp_path}")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"trainer: {tmp_path}/val-00000-of-00001.tfrecord: this shard is missing")
    assert lines[1].startswith(f"trainer: {shard}, record 0: the record's checksum does not match")
    assert lines[-1] == f"trainer: {tmp_path}: 2 problems"
