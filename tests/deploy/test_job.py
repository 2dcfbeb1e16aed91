"""The Job of the overlay `single` as kubectl renders it, its pods run as local containers by a model of the Job controller.

KJOB names the model (default: ../shared/tools/kjob.py beside the checkout). It is no cluster: it schedules nothing and knows no
claims, service accounts or podFailurePolicy. So the claim is a folder here, and a killed pod counts against backoffLimit, as
exit code 137 does in a cluster.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.helpers.containers import DOCKER, FIELDS, IMAGE, LONG, docker
from tests.helpers.manifests import KUBERNETES, Tree, quantity, render, the_container, the_pod
from tests.helpers.missing import missing
from tests.helpers.runs import assert_same_run, wait_for_step

KJOB = Path(os.environ.get("KJOB", Path(__file__).parents[3] / "shared" / "tools" / "kjob.py"))
STEPS, FIRST_CHECKPOINT = 600, 35  # far apart: the kill comes some time after the checkpoint

pytestmark = [pytest.mark.container, pytest.mark.kjob]


def for_this_machine(resources: list[Tree], claim: Path) -> list[Tree]:
    """With a folder for the claim, no more cores than there are, and networks that train in seconds."""
    container = the_container(resources)
    container["args"] += (*LONG, f"--set=train.steps={STEPS}")
    limits, cores = container["resources"]["limits"], docker("info", "--format={{.NCPU}}").stdout.strip()
    limits["cpu"] = str(min(quantity(limits["cpu"]), quantity(cores)))
    (runs,) = [volume for volume in the_pod(resources)["volumes"] if "persistentVolumeClaim" in volume]
    runs["hostPath"] = {"path": str(claim)}
    del runs["persistentVolumeClaim"]
    return resources


class Job:
    """A Job under way, with a claim and a folder of logs of its own."""

    def __init__(self, folder: Path) -> None:
        claim, manifest, self.logs = folder / "claim", folder / "job.yaml", folder / "logs"
        self.claim, self.run = claim, claim / "run"
        claim.mkdir(parents=True)
        claim.chmod(0o777)  # the pod's user is not this one
        self.resources = for_this_machine(render(KUBERNETES / "overlays" / "single"), claim)
        manifest.write_text(yaml.safe_dump_all(self.resources))
        image = f"{the_container(self.resources)['image']}={IMAGE}"
        command = [sys.executable, str(KJOB), "--engine", DOCKER, "--image", image, "--logs", str(self.logs), str(manifest)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def kill_pod(self) -> dict[str, Any]:
        """Kill the one that runs; what the daemon knows of it."""
        (pod,) = docker("ps", "--quiet", "--filter", f"volume={self.claim}").stdout.split()
        docker("kill", pod)
        return json.loads(docker("inspect", pod).stdout)[0]

    def status(self) -> dict[str, Any]:
        """What became of it, once it has ended."""
        out, err = self.process.communicate(timeout=240)
        assert out, err
        return json.loads(out.splitlines()[-1])

    def lines(self, attempt: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.logs / f"trainer-0.{attempt}.log").read_text().splitlines()]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # it removes its containers and its network
            self.process.communicate(timeout=60)


class Story(NamedTuple):
    """A Job whose first pod was killed after its first checkpoint, and one that nothing disturbed."""

    killed: Job
    pod: dict[str, Any]
    status: dict[str, Any]
    undisturbed: Job
    undisturbed_status: dict[str, Any]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    if not KJOB.is_file():
        missing(f"{KJOB} is not here, and the variable KJOB names no other program that runs a Job's pods")
    folder = tmp_path_factory.mktemp("jobs")
    killed, undisturbed = Job(folder / "killed"), Job(folder / "undisturbed")
    try:
        wait_for_step(killed.process, killed.run, FIRST_CHECKPOINT)
        yield Story(killed, killed.kill_pod(), killed.status(), undisturbed, undisturbed.status())
    finally:
        killed.end()
        undisturbed.end()


def test_the_job_is_complete_after_a_kill_and_one_more_pod(story: Story) -> None:
    assert (story.status["complete"], story.status["failed"]) == (True, [[0, 137]])
    assert (story.undisturbed_status["complete"], story.undisturbed_status["failed"]) == (True, [])


def test_the_second_pod_goes_on_from_the_checkpoint_of_the_first(story: Story) -> None:
    said = "\n".join(line["message"] for line in story.killed.lines(2))
    went_on = re.search(r"going on from the checkpoint of step (\d+)", said)
    assert went_on, said
    assert FIRST_CHECKPOINT <= int(went_on[1]) < STEPS


def test_the_run_is_the_same_to_the_last_bit_as_without_the_kill(story: Story) -> None:
    assert_same_run(story.killed.run, story.undisturbed.run)


@pytest.mark.parametrize("attempt", [1, 2])
def test_each_pod_logs_objects_alone(attempt: int, story: Story) -> None:
    lines = story.killed.lines(attempt)
    assert lines
    assert [line for line in lines if set(line) != FIELDS] == []


def test_the_pod_could_write_to_the_mounts_of_the_manifest_and_nowhere_else(story: Story) -> None:
    host, mounts = story.pod["HostConfig"], {mount["Destination"]: mount["Source"] for mount in story.pod["Mounts"]}
    assert host["ReadonlyRootfs"]
    assert {*mounts, *host["Tmpfs"]} == {mount["mountPath"] for mount in the_container(story.killed.resources)["volumeMounts"]}
    assert mounts == {"/runs": str(story.killed.claim)}


def test_the_pod_had_the_limits_and_the_user_of_the_manifest(story: Story) -> None:
    limits, host = the_container(story.killed.resources)["resources"]["limits"], story.pod["HostConfig"]
    assert (host["Memory"], host["NanoCpus"]) == (quantity(limits["memory"]), quantity(limits["cpu"]) * 10**9)
    assert (story.pod["Config"]["User"], host["CapDrop"]) == ("10001:10001", ["ALL"])


def test_the_run_records_the_image_that_the_manifest_names(story: Story) -> None:
    image = the_container(story.killed.resources)["image"]
    assert f"# image: {image}" in (story.killed.run / "config.yaml").read_text().splitlines()
