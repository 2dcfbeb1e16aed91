"""An export in a bucket is that of this machine, and never half of one."""

from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.bucket.answers import forbidden
from tests.helpers.bucket.faults import Fault, refuse
from tests.helpers.bucket.runs import copy_down
from tests.helpers.bucket.service import BucketService
from tests.helpers.images import encode, label
from tests.helpers.processes import run_trainer
from trainer.errors import BucketRefusedError, UserError
from trainer.export import EXPORT_MARK, export
from trainer.predict import Predictor
from trainer.storage.bucket import parse
from trainer.trained import TrainedRun


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_it_loads_from_a_copy_and_draws_what_predict_draws(
    trained_run: TrainedRun, exported: Path, bucket_service: BucketService, bucket: str, tmp_path: Path
) -> None:
    done = run_trainer("export", f"--model_dir={trained_run.folder.path}", f"--output={bucket}/out")
    assert done.returncode == 0, done.stderr
    assert f"SavedModel  {bucket}/out/saved_model" in done.stdout
    writes = [request.path for request in bucket_service.requests() if request.method == "POST" and "/upload/" in request.path]
    model = [path for path in writes if "saved_model/" in path]
    assert model[-1].endswith("name=out/saved_model/saved_model.pb")
    copy = copy_down(f"{bucket}/out", tmp_path / "copy")
    assert files_of(copy) == files_of(exported)
    assert (copy / "README.md").read_text() == (exported / "README.md").read_text()
    served = tf.saved_model.load(str(copy / "saved_model"))
    files = tf.constant([encode(label(1, 50, 90), "png")])
    (png,) = served.signatures["encoded_seeded"](encoded=files, seed=tf.constant(7))["png"].numpy()
    np.testing.assert_array_equal(imagecodecs.png_decode(png), Predictor(trained_run, 7).draw(label(1, 50, 90)))


def test_it_replaces_an_export_and_nothing_else(trained_run: TrainedRun, bucket: str, tmp_path: Path) -> None:
    where = parse(f"{bucket}/out")
    for _ in range(2):
        export(trained_run, where, ["keras"])
        (where / "keras" / "old.bin").write_bytes(b"of an older version")
    export(trained_run, where, ["keras"])
    assert set(where.listing()) == {EXPORT_MARK, "README.md", "keras/generator.keras"}
    mine = parse(f"{bucket}/mine")
    (mine / "README.md").write_text("mine")
    with pytest.raises(UserError, match=rf"--output={bucket}/mine: is there and holds no export"):
        export(trained_run, mine, ["keras"])
    assert {name: state.size for name, state in mine.listing().items()} == {"README.md": 4}


@pytest.mark.slow
def test_a_cut_export_cannot_be_loaded_and_the_next_one_is_whole(
    trained_run: TrainedRun, exported: Path, bucket_service: BucketService, bucket: str
) -> None:
    where = parse(f"{bucket}/out")
    whole = files_of(exported) - {"keras/generator.keras"}
    for name in whole:
        (where / name).upload(exported / name)
    (where / "saved_model" / "variables" / "variables.index").write_bytes(b"of an older one")
    bucket_service.faults(refuse(forbidden(), "POST", "name=out/saved_model/variables"))
    with pytest.raises(BucketRefusedError) as caught:
        export(trained_run, where, ["saved_model"])
    assert len(str(caught.value).splitlines()) == 1
    for word in (bucket, "storage.objects.create", "trainer@project.iam.gserviceaccount.com"):
        assert word in str(caught.value)
    assert "saved_model/saved_model.pb" not in where.listing()
    bucket_service.faults(Fault("cut_upload", "POST", "variables"), Fault("lost_reply", "POST", "saved_model.pb"))
    export(trained_run, where, ["saved_model"])
    met = {request.fault for request in bucket_service.requests()}
    assert {"cut_upload", "lost_reply"} <= met
    assert set(where.listing()) == whole
