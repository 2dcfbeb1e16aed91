"""Pictures and drawings in a bucket: the same names and bytes as on this machine, in any mixture."""

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.bucket.faults import Fault
from tests.helpers.bucket.runs import copy_up
from tests.helpers.bucket.service import BucketService
from tests.helpers.images import encode, label
from tests.helpers.processes import run_trainer
from trainer.errors import BucketAwayError, DataError, UserError
from trainer.export import export
from trainer.predict import find_jobs, predict
from trainer.runtime.bucket_folder import BucketFolder
from trainer.runtime.lease import release_all
from trainer.storage.bucket import parse
from trainer.storage.places import Place, place
from trainer.storage.service import Patience
from trainer.trained import TrainedRun, open_run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Pictures of several kinds, in folders, beside what is none."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for number in range(6):
        (folder / f"{number}.jpeg").write_bytes(encode(label(number, 40, 56), "jpeg"))
    (folder / "deep" / "six \u753b.png").write_bytes(encode(label(6), "png"))
    (folder / "deep" / "seven.tiff").write_bytes(encode(label(7)[..., :1], "tiff"))
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.md").write_text("no picture")
    return folder


def below(folder: Place) -> dict[str, bytes]:
    if isinstance(folder, Path):
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: (folder / name).read_bytes() for name in folder.listing()}


def test_every_mixture_gives_the_same_names_and_bytes(
    trained_run: TrainedRun, pictures: Path, bucket: str, tmp_path: Path
) -> None:
    copy_up(pictures, f"{bucket}/in")
    predict(trained_run, pictures, tmp_path / "expected")
    expected = below(tmp_path / "expected")
    assert set(expected) == {*(f"{number}.png" for number in range(6)), "deep/six \u753b.png", "deep/seven.png"}
    for given, to in ((f"{bucket}/in", str(tmp_path / "out")), (str(pictures), f"{bucket}/a"), (f"{bucket}/in/", f"{bucket}/b")):
        closing = predict(trained_run, place(given, "--input"), place(to, "--output"))
        assert closing.startswith(f"8 pictures in {to}, drawn with step 24")
        assert below(place(to, "--output")) == expected


def test_folder_glob_list_and_one_picture_name_what_they_name_here(pictures: Path, bucket: str) -> None:
    (pictures / "list.txt").write_text("deep/seven.tiff\n0.jpeg\n")
    copy_up(pictures, f"{bucket}/in")
    for tail in ("", "/*.jpeg", "/**/*.png", "/**", "/[0-2].*", "/d*/*", "/*/seven.tiff", "/list.txt", "/deep/seven.tiff"):
        here, there = find_jobs(f"{pictures}{tail}"), find_jobs(f"{bucket}/in{tail}")
        assert sorted(str(job.name) for job in there) == sorted(str(job.name) for job in here), tail
        assert {str(job.source).removeprefix(f"{bucket}/in") for job in there} == {
            str(job.source).removeprefix(str(pictures)) for job in here
        }
    assert len(find_jobs(f"{bucket}/in/**/*.jpeg")) == 6
    with pytest.raises(DataError, match="no pictures there"):
        find_jobs(f"{bucket}/nothing")
    with pytest.raises(DataError, match="no pictures there"):
        find_jobs(f"{bucket}/in/*.webp")


def test_a_list_of_addresses_of_several_places(trained_run: TrainedRun, pictures: Path, bucket: str, tmp_path: Path) -> None:
    copy_up(pictures, f"{bucket}/in")
    (tmp_path / "list.txt").write_text(f"{bucket}/in/deep/seven.tiff\nin/0.jpeg\n")
    assert predict(trained_run, tmp_path / "list.txt", parse(f"{bucket}/out")).startswith("2 pictures")
    assert set(parse(f"{bucket}/out").listing()) == {"in/deep/seven.png", "in/0.png"}


def test_damaged_and_missing_ones_are_named_by_address_and_the_others_drawn(
    trained_run: TrainedRun, pictures: Path, bucket: str
) -> None:
    (pictures / "2.jpeg").write_bytes((pictures / "2.jpeg").read_bytes()[:300])
    (pictures / "list.txt").write_text("0.jpeg\n2.jpeg\nnone.png\n")
    copy_up(pictures, f"{bucket}/in")
    with pytest.raises(DataError) as caught:
        predict(trained_run, parse(f"{bucket}/in/list.txt"), parse(f"{bucket}/out"))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{bucket}/in/2.jpeg: ")
    assert lines[1:] == [f"{bucket}/in/none.png: there is no such object", "2 of 3 pictures could not be drawn"]
    assert list(parse(f"{bucket}/out").listing()) == ["0.png"]


@pytest.mark.parametrize("line", ["../outside.png", "/etc/x.png", "a/../../x.png", "bell\x07.png", "gs://b/a/../../x.png"])
def test_unsafe_names_are_refused(line: str, bucket: str) -> None:
    (parse(bucket) / "list.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=r"would be unsafe|without \. and \.\."):
        find_jobs(f"{bucket}/list.txt")


def test_names_that_only_objects_can_have_stay_inside_the_output(trained_run: TrainedRun, bucket: str, tmp_path: Path) -> None:
    """Doubled slashes count as one; dots that would climb out are hidden as any name that begins with one."""
    picture, where = encode(label(0), "png"), parse(bucket)
    for key in ("in//a.png", "in/deep//b.png"):
        type(where)(where.bucket, key).write_bytes(picture)
    predict(trained_run, parse(f"{bucket}/in"), tmp_path / "out")
    assert set(below(tmp_path / "out")) == {"a.png", "deep/b.png"}
    type(where)(where.bucket, "in/../../c.png").write_bytes(picture)
    for given in ("in", "in/**/*.png", "in/**"):
        assert {str(job.name) for job in find_jobs(f"{bucket}/{given}")} == {"a.png", "deep/b.png"}


def test_originals_are_never_replaced_and_old_drawings_never_drawn_again(
    trained_run: TrainedRun, bucket: str, tmp_path: Path
) -> None:
    where = parse(f"{bucket}/in")
    (where / "a.png").write_bytes(encode(label(0), "png"))
    for given in (where, where / "a.png", where / "*.png"):
        with pytest.raises(DataError, match=rf"{bucket}/in/a\.png would be replaced by its drawing"):
            predict(trained_run, given, where)
    for _ in range(2):
        assert predict(trained_run, where, where / "out").startswith("1 pictures")
    assert set(where.listing()) == {"a.png", "out/a.png"}
    with pytest.raises(UserError, match="is a file; give a folder"):
        predict(trained_run, where, where / "a.png")


@pytest.mark.slow
def test_under_faults_the_same_and_away_is_said(
    trained_run: TrainedRun, pictures: Path, bucket_service: BucketService, bucket: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A fault of every kind, each at the first request for a picture or drawing of its own."""
    copy_up(pictures, f"{bucket}/in")
    predict(trained_run, pictures, tmp_path / "expected")
    rules = [
        Fault("status", "GET", r"in/0\.jpeg", status=503),
        Fault("reset", "GET", r"in/1\.jpeg"),
        Fault("truncate", "GET", r"in/2\.jpeg.*alt=media"),
        Fault("corrupt", "GET", r"in/3\.jpeg.*alt=media"),
        Fault("status", "POST", r"name=out/0\.png", status=429),
        Fault("reset", "POST", r"name=out/1\.png"),
        Fault("lost_reply", "POST", r"name=out/2\.png"),
        Fault("cut_upload", "POST", r"name=out/3\.png"),
    ]
    bucket_service.faults(*rules)
    predict(trained_run, parse(f"{bucket}/in"), parse(f"{bucket}/out"))
    met = sorted(request.fault for request in bucket_service.requests() if request.fault)
    assert met == sorted(rule.action for rule in rules)
    bucket_service.clear()
    assert below(parse(f"{bucket}/out")) == below(tmp_path / "expected")
    monkeypatch.setattr(Patience, "seconds", 1.0)
    bucket_service.away()
    with pytest.raises(BucketAwayError, match="run this again when the bucket answers"):
        predict(trained_run, pictures, parse(f"{bucket}/out"))


def run_in_bucket(run: TrainedRun, url: str) -> TrainedRun:
    """The same weights, config and notes in a run's folder in a bucket."""
    folder = BucketFolder(parse(url)).claim(job="a test")
    folder.write_config(run.config, run.folder.notes())
    folder.write_data(run.about)
    for entry in run.folder.metrics():
        folder.add_metrics(entry)
    folder.store(1).save(tf.train.Checkpoint(generator=run.generator(any_size=False)), run.marker.step)
    release_all()
    return open_run(parse(url))


@pytest.mark.slow
def test_a_run_in_a_bucket_is_drawn_with_and_exported_as_one_here(
    trained_run: TrainedRun, bucket_service: BucketService, bucket: str, tmp_path: Path
) -> None:
    run = run_in_bucket(trained_run, f"{bucket}/run")
    weights = [(request.method, request.path) for request in bucket_service.requests() if ".data-" in request.path]
    assert {method for method, _ in weights} == {"POST"}, "nothing of the weights was downloaded yet"
    (tmp_path / "a.png").write_bytes(encode(label(3, 50, 70), "png"))
    for folder, opened in (("here", trained_run), ("there", run)):
        closing = predict(opened, tmp_path / "a.png", tmp_path / folder)
        assert closing.endswith(f"drawn with step 24 of {opened.folder.path}")
        export(opened, tmp_path / f"export-{folder}", ["keras"])
    assert below(tmp_path / "there") == below(tmp_path / "here")
    here, there = (tmp_path / f"export-{folder}" for folder in ("here", "there"))
    assert (there / "README.md").read_text() == (here / "README.md").read_text()
    loaded = [keras.saving.load_model(folder / "keras" / "generator.keras").get_weights() for folder in (here, there)]
    for ours, theirs in zip(*loaded, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_command_takes_addresses_and_leaves_no_folder_named_so(trained_run: TrainedRun, pictures: Path, bucket: str) -> None:
    shutil.rmtree(pictures / "deep")
    copy_up(pictures, f"{bucket}/in")
    run = f"--model_dir={trained_run.folder.path}"
    done = run_trainer("predict", run, f"--input={bucket}/in/[01].jpeg", f"--output={bucket}/out")
    assert done.returncode == 0, done.stderr
    assert set(parse(f"{bucket}/out").listing()) == {"0.png", "1.png"}
    wrong = run_trainer("predict", run, f"--input={bucket}/in", "--output=s3://x/y")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
