"""An account with roles/storage.objectViewer alone: what it is enough for, and what is said where it is not."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.helpers.bucket.answers import forbidden
from tests.helpers.bucket.faults import refuse
from tests.helpers.bucket.runs import copy_up, keys
from tests.helpers.bucket.service import BucketService
from tests.helpers.images import encode, label
from tests.helpers.processes import run_trainer
from tests.helpers.runs import last_line
from trainer.predict import predict
from trainer.runtime.checkpoints import Checkpoints
from trainer.storage.bucket import parse
from trainer.trained import TrainedRun, open_run

PERMISSIONS = {"POST": "create", "PUT": "create", "PATCH": "update", "DELETE": "delete"}


@pytest.fixture
def run(bucket: str, trained_run: TrainedRun, bucket_service: BucketService) -> str:
    """A run in a bucket where whatever is written, changed or removed is refused from now on."""
    local = trained_run.folder.path
    assert isinstance(local, Path)
    copy_up(local, f"{bucket}/run")
    listed = [asdict(marker) for marker in Checkpoints(local / "checkpoints", 3).markers()]
    document = {"owner": "somebody", "checkpoints": listed, "best": {}}
    (parse(f"{bucket}/run/checkpoints") / "checkpoints.json").write_text(json.dumps(document))
    bucket_service.clear()
    bucket_service.faults(*(refuse(forbidden(f"storage.objects.{what}"), method) for method, what in PERMISSIONS.items()))
    return f"{bucket}/run"


def methods(service: BucketService) -> set[str]:
    return {request.method for request in service.requests()}


def test_who_may_only_read_may_predict(run: str, trained_run: TrainedRun, bucket_service: BucketService, tmp_path: Path) -> None:
    """And draws, pixel for pixel, what a copy of the run on this machine draws."""
    (tmp_path / "in.png").write_bytes(encode(label(1, 64, 64), "png"))
    predict(open_run(parse(run)), tmp_path / "in.png", tmp_path / "out")
    predict(trained_run, tmp_path / "in.png", tmp_path / "expected")
    assert (tmp_path / "out" / "in.png").read_bytes() == (tmp_path / "expected" / "in.png").read_bytes()
    assert methods(bucket_service) == {"GET"}


@pytest.mark.slow
def test_who_may_only_read_may_export(run: str, bucket_service: BucketService, tmp_path: Path) -> None:
    done = run_trainer("export", f"--model_dir={run}", f"--output={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "saved_model" / "saved_model.pb").is_file()
    assert methods(bucket_service) == {"GET"}


@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_who_may_only_read_may_neither_evaluate_nor_train(
    command: str, run: str, bucket: str, bucket_service: BucketService
) -> None:
    before = keys(bucket)
    done = run_trainer(command, f"--model_dir={run}")
    assert done.returncode == 2, done.stderr
    assert last_line(done).startswith(f"trainer: {run}/.preflight-")
    assert last_line(done).endswith("grant it storage.objects.create, which roles/storage.objectAdmin has")
    assert keys(bucket) == before
    assert sum(request.method != "GET" for request in bucket_service.requests()) == 1, "it is asked once"
