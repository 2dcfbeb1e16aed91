"""What can be known to fail is told before TensorFlow is loaded, with the right exit code."""

import re
from pathlib import Path

import pytest

from tests.helpers.bucket.answers import UNAVAILABLE, forbidden, retained
from tests.helpers.bucket.faults import refuse
from tests.helpers.bucket.runs import copy_up, keys
from tests.helpers.bucket.service import BucketService
from tests.helpers.clusters import vertex
from tests.helpers.damage import flip_in_record
from tests.helpers.images import write_pairs
from tests.helpers.processes import run_trainer
from tests.helpers.settings import SMALL, flags
from trainer.storage.bucket import parse


def told(done: object) -> list[str]:
    return str(done.stderr).strip().splitlines()  # type: ignore[attr-defined]


@pytest.fixture
def data(bucket: str, sample_folder: Path) -> str:
    copy_up(sample_folder, f"{bucket}/data")
    return f"{bucket}/data"


@pytest.mark.parametrize("flag", ["--data_dir", "--model_dir", "--config"])
def test_a_bucket_that_is_not_there_is_named_at_once(flag: str, bucket: str, bucket_service: BucketService) -> None:
    done = run_trainer(f"{flag}=gs://no-such-bucket/x")
    assert done.returncode == 2
    assert told(done) == ["trainer: gs://no-such-bucket: there is no bucket of this name; make it, or mend the name"]
    assert bucket_service.count() <= 2, "nothing is tried again"


def test_a_data_set_that_is_not_there_is_named(bucket: str) -> None:
    done = run_trainer(f"--data_dir={bucket}/none", f"--model_dir={bucket}/run")
    assert done.returncode == 2
    assert told(done) == [f"trainer: {bucket}/none: no such data folder; --data_dir names a prepared data set"]
    assert keys(bucket) == []


@pytest.mark.parametrize(("method", "permission"), [("GET", "list"), ("POST", "create"), ("DELETE", "delete")])
def test_a_missing_permission_on_the_models_place_is_one_line(
    method: str, permission: str, bucket: str, bucket_service: BucketService
) -> None:
    bucket_service.faults(refuse(forbidden(f"storage.objects.{permission}"), method))
    done = run_trainer(f"--model_dir={bucket}/run")
    assert done.returncode == 2
    (line,) = told(done)
    assert line.startswith(f"trainer: {bucket}/run")
    assert "trainer@project.iam.gserviceaccount.com" in line
    role = "objectViewer" if permission in ("get", "list") else "objectAdmin"
    assert line.endswith(f"grant it storage.objects.{permission}, which roles/storage.{role} has")


def test_a_bucket_with_a_retention_policy_is_refused(bucket: str, bucket_service: BucketService) -> None:
    bucket_service.faults(refuse(retained(bucket.removeprefix("gs://"), "run/.preflight-1"), "DELETE"))
    done = run_trainer(f"--model_dir={bucket}/run")
    assert done.returncode == 2
    assert "needs a bucket without a retention policy" in told(done)[-1]
    assert len(told(done)) == 1


def test_nothing_is_left_where_it_looked(bucket: str, data: str) -> None:
    before = keys(bucket)
    done = run_trainer(f"--data_dir={data}", f"--model_dir={bucket}/run", "--set=train.batch_size=1000")
    assert done.returncode == 2
    assert "train.batch_size: got 1000" in told(done)[-1]
    assert keys(bucket) == before


def test_a_damaged_first_record_is_found_before_training(bucket: str, data: str) -> None:
    damaged = flip_in_record(parse(data), "train", 0)
    before = keys(bucket)
    done = run_trainer(*flags(f"{bucket}/run", *SMALL, data_dir=data))
    assert done.returncode == 2
    assert keys(bucket) == before
    assert re.match(rf"trainer: {damaged}: .*checksum", told(done)[-1])


def test_a_service_that_is_busy_is_waited_for_and_then_left_with_75(bucket: str, bucket_service: BucketService) -> None:
    bucket_service.faults(refuse(UNAVAILABLE))
    done = run_trainer(f"--model_dir={bucket}/run", "--set=runtime.bucket_patience_seconds=1")
    assert done.returncode == 75
    assert "the service answers 503" in told(done)[0]
    assert "tried for 1 s; run this again when the bucket answers" in told(done)[-1]


def test_credentials_that_are_not_there_are_waited_for_and_explained(bucket: str) -> None:
    """Workload identity may give them some seconds after a pod has begun; on a laptop the line says what to do."""
    done = run_trainer(
        f"--model_dir={bucket}/run", "--set=runtime.bucket_patience_seconds=1",
        STORAGE_EMULATOR_HOST="", NO_GCE_CHECK="true", GOOGLE_APPLICATION_CREDENTIALS="", CLOUDSDK_CONFIG="/nonexistent",
    )  # fmt: skip
    assert done.returncode == 75
    assert "no credentials found; run `gcloud auth application-default login`" in told(done)[0]
    assert "tried for 1 s" in told(done)[-1]


def test_a_key_file_that_is_not_there_is_named(bucket: str) -> None:
    """A login would not help: the variable goes before it."""
    done = run_trainer(
        f"--model_dir={bucket}/run", "--set=runtime.bucket_patience_seconds=1",
        STORAGE_EMULATOR_HOST="", NO_GCE_CHECK="true", GOOGLE_APPLICATION_CREDENTIALS="/nonexistent/key.json",
    )  # fmt: skip
    assert done.returncode == 75
    assert "the credentials do not work: File /nonexistent/key.json was not found" in told(done)[-1]


@pytest.mark.parametrize("inside", ["", "/run"])
def test_a_run_in_the_folder_of_vertex_s_model_is_refused(inside: str, bucket: str, data: str) -> None:
    """The exported model replaces all that is in it: the finished run would be gone."""
    model = f"{bucket}/job/model"
    settings = flags(f"{model}{inside}", *SMALL, "train.steps=1", data_dir=data)
    done = run_trainer(*settings, AIP_MODEL_DIR=f"{model}/")
    assert done.returncode == 2
    assert told(done) == [
        f"trainer: AIP_MODEL_DIR={model}: the exported model replaces all in it, and {model}{inside} is in it; name another"
    ]
    assert parse(model).listing() == {}


@pytest.mark.slow
def test_files_of_somebody_in_the_folder_of_vertex_s_model_are_not_replaced(bucket: str, data: str) -> None:
    model = parse(f"{bucket}/job/model")
    (model / "saved_model.pb").write_bytes(b"an earlier one")
    (model / "variables" / "variables.index").write_bytes(b"too")
    given = (*flags(f"{bucket}/run", *SMALL, data_dir=data), "--dry_run")
    assert run_trainer(*given, AIP_MODEL_DIR=str(model)).returncode == 0
    (model / ".preflight-0123").write_bytes(b"of another worker, at this moment, or of a killed one")
    assert run_trainer(*given, AIP_MODEL_DIR=str(model)).returncode == 0
    (model / "notes.txt").write_bytes(b"mine")
    done = run_trainer(*given, AIP_MODEL_DIR=str(model))
    assert done.returncode == 2
    assert told(done)[-1].startswith(f"trainer: AIP_MODEL_DIR={model}: holds notes.txt, which the exported model would replace")


def test_what_a_killed_try_left_is_no_reason_to_refuse_the_next(bucket: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "some", 5, "jpeg")
    (parse(f"{bucket}/data") / ".preflight-0123").write_bytes(b"")
    done = run_trainer("prepare", f"--source={tmp_path}/some", f"--output={bucket}/data")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("inside", ["", "/run"])
def test_the_same_holds_on_a_disk(inside: str, data: str, tmp_path: Path) -> None:
    done = run_trainer(f"--data_dir={data}", f"--model_dir={tmp_path}{inside}", AIP_MODEL_DIR=f"{tmp_path}/")
    assert done.returncode == 2
    assert "the exported model replaces all in it" in told(done)[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_vertex_job_that_would_lose_its_run_is_refused(data: str) -> None:
    done = run_trainer(
        f"--data_dir={data}", CLUSTER_SPEC=vertex({"workerpool0": ["localhost:2222"]}, "workerpool0")["CLUSTER_SPEC"]
    )
    assert done.returncode == 2
    assert told(done)[-1].startswith("trainer: --model_dir: allowed on Vertex AI: a folder, or a job with baseOutputDirectory")


def test_a_config_is_read_from_a_bucket(bucket: str) -> None:
    (parse(bucket) / "mine.yaml").write_text("train: {steps: 0}")
    done = run_trainer(f"--config={bucket}/mine.yaml")
    assert done.returncode == 2
    assert told(done)[0].startswith(f"trainer: {bucket}/mine.yaml: train.steps: got 0")
    assert told(run_trainer(f"--config={bucket}/none.yaml")) == [f"trainer: {bucket}/none.yaml: no such config file"]
