"""Training with data and model in a bucket: the same bits, one writer, nothing lost when the bucket or the process goes away."""

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers.bucket.answers import Action, forbidden
from tests.helpers.bucket.faults import Fault, refuse
from tests.helpers.bucket.runs import arguments, assert_same, copy_up, listed
from tests.helpers.bucket.service import BucketService
from tests.helpers.clusters import vertex
from tests.helpers.events import scalars
from tests.helpers.processes import finish, run_trainer, start_trainer
from tests.helpers.runs import last_line, newest, newest_step, wait_for_step
from tests.helpers.waiting import wait_until
from trainer.runtime.checkpoints import Checkpoints
from trainer.storage.bucket import parse

SHORT = (
    "data.image_size=[32,32]", "train.steps=45", "train.checkpoint_every=10", "train.sample_every=20", "train.evaluate_every=20",
)  # fmt: skip


def given(model_dir: str, data_dir: str, *overrides: str) -> list[str]:
    """The flags of a run that saves at 10, 20, 30, 40 and 45 steps, and evaluates and draws at 20 and 40."""
    return arguments(model_dir, data_dir, *SHORT, *overrides)


def started_until(fault: Fault, service: BucketService, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A run that lives, and waits for the answer to a request."""
    service.faults(fault)
    process = start_trainer(*arguments, **environment)
    wait_until(service.held, process, what="the request")
    return process


def killed_at(fault: Fault, service: BucketService, *arguments: str) -> None:
    """Kill a run while it waits for the answer to a request."""
    process = started_until(fault, service, *arguments)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "it was alive"
    service.clear()


def saving(step: int, action: Action = "hold") -> Fault:
    """Holds the upload of a step's checkpoint."""
    return Fault(action, "POST", rf"checkpoints/step-{step:08d}-.*\.data-")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, sample_folder: Path) -> Path:
    """The run that all others must equal, with nothing in a bucket."""
    folder = tmp_path_factory.mktemp("local") / "run"
    done = run_trainer(*given(str(folder), str(sample_folder)))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def data(bucket: str, sample_folder: Path) -> str:
    copy_up(sample_folder, f"{bucket}/data")
    return f"{bucket}/data"


@pytest.mark.slow
def test_data_and_model_in_a_bucket_give_the_bits_of_a_local_run(
    bucket: str, data: str, local: Path, tmp_path: Path, bucket_service: BucketService
) -> None:
    bucket_service.clear()
    (temporary := tmp_path / "tmp").mkdir()
    done = run_trainer(*given(f"{bucket}/run", data), TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr
    assert f"pictures    {bucket}/run/samples" in done.stdout
    assert list(temporary.iterdir()) == [], "nothing of the run is left on this machine"
    assert_same(f"{bucket}/run", local, tmp_path / "copy")
    again = run_trainer(*given(f"{bucket}/run", data))
    assert again.returncode == 0
    assert "this run is finished" in again.stdout
    methods = {request.method for request in bucket_service.requests() if "data/" in request.path}
    assert methods == {"GET"}, "for the data an account that may only read is enough"
    left = {name.split("/")[0] for name in parse(f"{bucket}/run").listing()}
    assert left == {"checkpoints", "config.yaml", "data.json", "metrics.jsonl", "samples", "summaries"}


@pytest.mark.slow
def test_a_save_takes_at_most_seven_requests(bucket: str, sample_folder: Path, bucket_service: BucketService) -> None:
    """A plain CheckpointManager on TensorFlow's own client takes about 49."""
    done = run_trainer(*given(f"{bucket}/run", str(sample_folder), "train.steps=120"))
    assert done.returncode == 0, done.stderr
    sent = [request for request in bucket_service.requests() if "checkpoints" in request.path]
    assert len([one for one in sent if one.method == "POST" and "step-" in one.path]) == 2 * 12
    assert len(sent) / 12 <= 7, "two uploads, the list, two removals, and what the start and the best one take"


@pytest.mark.slow
def test_killed_in_uploads_and_in_an_evaluation_it_ends_with_the_same_bits(
    bucket: str, data: str, local: Path, tmp_path: Path, bucket_service: BucketService
) -> None:
    run, flags = f"{bucket}/run", given(f"{bucket}/run", data)
    killed_at(saving(10), bucket_service, *flags)
    assert newest_step(run) == 0
    killed_at(Fault("hold", "GET", r"data/val-.*alt=media"), bucket_service, *flags)
    assert newest_step(run) == 10, "the evaluation of step 20 comes before its checkpoint"
    killed_at(saving(40, "hold_reply"), bucket_service, *flags)
    assert newest_step(run) == 30
    done = run_trainer(*flags)
    assert done.returncode == 0, done.stderr
    assert "waiting to see whether it is alive" not in done.stderr, "the dead process was of this machine"
    assert "going on from the checkpoint of step 30" in done.stderr
    assert_same(run, local, tmp_path)


@pytest.mark.slow
def test_a_stop_saves_to_the_bucket_and_gives_the_lease_back(
    bucket: str, data: str, local: Path, tmp_path: Path, bucket_service: BucketService
) -> None:
    process = started_until(saving(20), bucket_service, *given(f"{bucket}/run", data))
    process.send_signal(signal.SIGTERM)
    bucket_service.release()
    done = finish(process)
    assert done.returncode == 143, done.stderr
    assert ".lease" not in parse(f"{bucket}/run").listing()
    saved = re.search(r"step (\d+) is saved in gs://", last_line(done))
    assert saved
    assert newest_step(f"{bucket}/run") == int(saved[1])
    assert 20 <= int(saved[1]) < 45
    assert run_trainer(*given(f"{bucket}/run", data)).returncode == 0
    assert_same(f"{bucket}/run", local, tmp_path)


@pytest.mark.slow
def test_a_second_job_stops_and_names_the_first(bucket: str, data: str) -> None:
    first = start_trainer(*given(f"{bucket}/run", data, "train.steps=100000"), TRAINER_JOB_UID="first-job")
    wait_for_step(first, f"{bucket}/run", 10)
    second = run_trainer(*given(f"{bucket}/run", data, "train.steps=100000"), TRAINER_JOB_UID="second-job")
    assert second.returncode == 2
    assert re.search(
        r"gs://.*/run: job first-job, process \d+ on \S+ is training in it; stop it or choose another --model_dir",
        last_line(second),
    )
    first.send_signal(signal.SIGTERM)
    assert finish(first).returncode == 143


@pytest.mark.slow
def test_a_paused_writer_that_wakes_up_cannot_overwrite_its_successor(
    bucket: str, data: str, local: Path, tmp_path: Path, bucket_service: BucketService
) -> None:
    """Both are tries of one job, as when a node is lost, the pod is made anew, and the node comes back."""
    paused = started_until(saving(30), bucket_service, *given(f"{bucket}/run", data), TRAINER_JOB_UID="the-job")
    paused.send_signal(signal.SIGSTOP)
    bucket_service.clear()
    done = run_trainer(*given(f"{bucket}/run", data), TRAINER_JOB_UID="the-job")
    assert done.returncode == 0, done.stderr
    before = listed(f"{bucket}/run")
    paused.send_signal(signal.SIGCONT)
    woken = finish(paused)
    assert woken.returncode == 1, woken.stderr
    assert "another process has taken this run over" in last_line(woken)
    assert listed(f"{bucket}/run") == before
    assert_same(f"{bucket}/run", local, tmp_path)


@pytest.mark.slow
def test_one_request_in_five_that_fails_changes_no_bit(
    bucket: str, data: str, local: Path, tmp_path: Path, bucket_service: BucketService
) -> None:
    bucket_service.random_faults(0.2, seed=6, stall_seconds=0.5)
    bucket_service.faults(Fault("lost_reply", "POST", r"checkpoints\.json"), Fault("lost_reply", "DELETE", "checkpoints/"))
    done = run_trainer(*given(f"{bucket}/run", data))
    hit = [(request.method, request.fault) for request in bucket_service.requests() if request.fault]
    bucket_service.clear()
    assert done.returncode == 0, done.stderr
    assert {method for method, _ in hit} == {"GET", "POST", "DELETE"}
    assert {fault for _, fault in hit} >= {"status", "reset", "stall", "lost_reply"}
    assert_same(f"{bucket}/run", local, tmp_path)


@pytest.mark.slow
def test_a_bucket_that_is_away_for_a_while_costs_nothing_but_time(
    bucket: str, data: str, local: Path, tmp_path: Path, bucket_service: BucketService
) -> None:
    """Until the trainer says so, which takes it five seconds or more."""
    process = started_until(saving(30), bucket_service, *given(f"{bucket}/run", data))
    bucket_service.away(True)
    bucket_service.release()
    assert process.stderr is not None
    while "the connection fails; trying again for up to 300 s" not in (line := process.stderr.readline()):
        assert line, "it ended without a word"
    bucket_service.away(False)
    done = finish(process)
    assert done.returncode == 0, done.stderr
    assert_same(f"{bucket}/run", local, tmp_path)


@pytest.mark.slow
def test_a_bucket_that_stays_away_ends_the_run_with_75_and_leaves_the_last_checkpoint(
    bucket: str, data: str, local: Path, tmp_path: Path, bucket_service: BucketService
) -> None:
    flags = given(f"{bucket}/run", data, "runtime.bucket_patience_seconds=2")
    process = started_until(saving(20), bucket_service, *flags)
    bucket_service.away(True)
    bucket_service.release()
    done = finish(process)
    assert done.returncode == 75, done.stderr
    assert re.search(r"gs://\S+: the connection fails \(tried for 2 s; run this again when the bucket answers\)", last_line(done))
    bucket_service.away(False)
    assert newest_step(f"{bucket}/run") == 10
    done = run_trainer(*given(f"{bucket}/run", data))
    assert "going on from the checkpoint of step 10" in done.stderr
    assert_same(f"{bucket}/run", local, tmp_path)


@pytest.mark.slow
def test_when_the_data_stay_away_what_was_done_is_saved_where_the_run_is(
    bucket: str, data: str, local: Path, tmp_path: Path, bucket_service: BucketService
) -> None:
    """Data in a bucket, the run on this machine: the steps since the last checkpoint are not lost."""
    folder = tmp_path / "run"
    settings = ("train.checkpoint_every=0", "train.evaluate_every=0", "train.sample_every=0", "train.steps=100000")
    flags = given(str(folder), data, *settings, "runtime.bucket_patience_seconds=2", "data.cache=none", "train.summary_every=1")
    process = start_trainer(*flags)
    wait_until(lambda: bool(list(folder.glob("summaries/train/events*"))), process)
    bucket_service.away(True)
    done = finish(process)
    assert done.returncode == 75, done.stderr
    (marker,) = Checkpoints(folder / "checkpoints", 2).markers()
    assert marker.step > 0
    bucket_service.away(False)
    last = run_trainer(*[flag.replace("train.steps=100000", f"train.steps={marker.step + 1}") for flag in flags])
    assert last.returncode == 0, last.stderr
    assert f"going on from the checkpoint of step {marker.step}" in last.stderr


@pytest.mark.slow
@pytest.mark.parametrize("waits_for", ["a batch", "an evaluation"])
def test_a_signal_while_the_data_are_away_is_answered_in_seconds_and_loses_nothing(
    waits_for: str, bucket: str, data: str, local: Path, tmp_path: Path, bucket_service: BucketService
) -> None:
    """The supervisor's grace is short; the patience with the bucket, five minutes, is not waited out."""
    folder, every = tmp_path / "run", 5 if waits_for == "an evaluation" else 0
    settings = ("train.checkpoint_every=0", f"train.evaluate_every={every}", "train.sample_every=0", "train.steps=100000")
    split = "val" if every else "train"
    flags = given(str(folder), data, *settings, "data.cache=none", "train.summary_every=1")
    bucket_service.faults(Fault("status", "GET", rf"{split}.*alt=media", times=None, skip=3))
    process = start_trainer(*flags)
    wait_until(lambda: len([one for one in bucket_service.requests() if one.fault]) > 5, process)
    process.send_signal(signal.SIGTERM)
    done = finish(process, 60)
    assert done.returncode == 143, done.stderr
    marker = Checkpoints(folder / "checkpoints", 2).markers()[-1]
    assert f"SIGTERM: stopped; step {marker.step} is saved in {folder}" in last_line(done)
    assert marker.step > 0
    bucket_service.faults()
    last = run_trainer(*[flag.replace("train.steps=100000", f"train.steps={marker.step + 1}") for flag in flags])
    assert last.returncode == 0, last.stderr
    losses = [step for step, tag, _ in scalars(folder) if tag == "loss/l1"]
    assert losses == list(range(1, marker.step + 2)), "none is missing and none is there twice"


@pytest.mark.slow
def test_a_permission_that_is_withdrawn_in_the_middle_is_one_line_and_permanent(
    bucket: str, data: str, bucket_service: BucketService
) -> None:
    bucket_service.faults(refuse(forbidden("storage.objects.create"), "POST", "checkpoints/step-00000020"))
    done = run_trainer(*given(f"{bucket}/run", data))
    assert done.returncode == 2, done.stderr
    assert newest_step(f"{bucket}/run") == 10
    assert re.search(
        r"trainer: gs://\S+: \S+@\S+ does not have storage\.objects\.create access.*; grant it storage\.objects\.create",
        last_line(done),
    )


@pytest.mark.slow
def test_summaries_that_cannot_be_written_never_stop_training(
    bucket: str, data: str, local: Path, bucket_service: BucketService, tmp_path: Path
) -> None:
    bucket_service.faults(refuse(forbidden("storage.objects.create"), "POST", "tfevents", times=4))
    done = run_trainer(*given(f"{bucket}/run", data))
    assert done.returncode == 0, done.stderr
    assert "training goes on; waiting to be sent" in done.stderr
    assert_same(f"{bucket}/run", local, tmp_path)


@pytest.mark.slow
def test_vertex_folders_hold_checkpoints_summaries_and_the_model(bucket: str, data: str, tmp_path: Path) -> None:
    flags = [argument for argument in given("", data) if not argument.startswith("--model_dir")]
    folders = {
        "AIP_MODEL_DIR": f"{bucket}/job/model/",
        "AIP_CHECKPOINT_DIR": f"{bucket}/job/checkpoints/",
        "AIP_TENSORBOARD_LOG_DIR": f"{bucket}/job/logs/",
    }
    done = run_trainer(*flags, **folders)
    assert done.returncode == 0, done.stderr
    names = set(parse(f"{bucket}/job").listing())
    assert {"config.yaml", "metrics.jsonl", "checkpoints/checkpoints.json", "model/saved_model.pb"} <= names
    assert any(name.startswith("logs/train/events") for name in names)
    assert "summaries" not in {name.split("/")[0] for name in names}
    measured = run_trainer("evaluate", f"--model_dir={bucket}/job", "--split=val", **folders)
    assert measured.returncode == 0, measured.stderr
    lines = [json.loads(line) for line in parse(f"{bucket}/job/metrics.jsonl").read_text().splitlines()]
    last = next(line["l1"] for line in reversed(lines) if line["split"] == "val")
    assert f"val L1 {last:.1f} of 255" in measured.stdout


@pytest.mark.slow
def test_a_folder_that_is_named_is_stronger_than_those_of_vertex(bucket: str, data: str) -> None:
    """But the model for serving goes where Vertex AI looks for it."""
    folders = {
        "AIP_MODEL_DIR": f"{bucket}/job/model/",
        "AIP_CHECKPOINT_DIR": f"{bucket}/job/checkpoints/",
        "AIP_TENSORBOARD_LOG_DIR": f"{bucket}/job/logs/",
    }
    done = run_trainer(*given(f"{bucket}/mine", data, "train.steps=20", "train.evaluate_every=0"), **folders)
    assert done.returncode == 0, done.stderr
    mine, job = parse(f"{bucket}/mine").listing(), parse(f"{bucket}/job").listing()
    assert {"config.yaml", "checkpoints/checkpoints.json"} <= set(mine)
    assert {name.split("/")[0] for name in mine} >= {"summaries", "samples"}
    assert {name.split("/")[0] for name in job} == {"model"}
    assert "model/saved_model.pb" in job


@pytest.mark.slow
def test_each_trial_of_a_tuning_job_is_a_job_of_its_own(bucket: str, data: str) -> None:
    """Trials of one job differ in their settings; none may take over from another."""
    flags = given(f"{bucket}/run", data, "train.steps=100000")
    cluster = {"workerpool0": ["localhost:2222"]}
    of_trial = {one: {"CLOUD_ML_JOB_ID": "7", **vertex(cluster, "workerpool0", trial=one)} for one in ("1", "2")}
    process = start_trainer(*flags, **of_trial["1"])
    wait_for_step(process, f"{bucket}/run", 10)
    assert json.loads(parse(f"{bucket}/run/.lease").read_text())["owner"]["job"] == "7/1"
    other = run_trainer(*flags, **of_trial["2"])
    assert other.returncode == 2
    assert re.search(r"job 7/1, process \d+ on \S+ is training in it", last_line(other))
    process.send_signal(signal.SIGTERM)
    assert finish(process).returncode == 143


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(
    bucket: str, data: str, local: Path, tmp_path: Path, bucket_service: BucketService
) -> None:
    killed_at(saving(40), bucket_service, *given(f"{bucket}/run", data))
    marker = newest(f"{bucket}/run")
    assert marker
    assert marker.step == 30
    shard = next(name for name in marker.files if ".data-" in name)
    (parse(f"{bucket}/run/checkpoints") / shard).write_bytes(b"not what was there")
    done = run_trainer(*given(f"{bucket}/run", data))
    assert done.returncode == 0, done.stderr
    assert f"checkpoint of step {marker.step} is damaged ({shard} has 18 bytes" in done.stderr
    assert_same(f"{bucket}/run", local, tmp_path)
