"""The image as its users run it: real containers, without network, privileges or a root file system to write to."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.containers import (
    ENDLESS,
    GRACE_SECONDS,
    IMAGE,
    LONG,
    PYTHON,
    QUICK,
    Containers,
    copy_run,
    docker,
    ended,
    objects,
    stop,
    wait_for,
    wait_for_a_handler,
    wait_until_tensorflow_loads,
)
from tests.helpers.runs import assert_same_run
from trainer import __version__

pytestmark = pytest.mark.container

SAMPLE = Path(__file__).parents[2] / "trainer" / "sample"


@pytest.fixture
def containers() -> Iterator[Containers]:
    made = Containers()
    yield made
    made.remove()


@pytest.fixture(scope="module")
def image() -> dict[str, object]:
    return json.loads(docker("image", "inspect", IMAGE).stdout)[0]


@pytest.fixture(scope="module")
def labels(image: dict[str, dict[str, dict[str, str]]]) -> dict[str, str]:
    return {name.removeprefix("org.opencontainers.image."): text for name, text in image["Config"]["Labels"].items()}


# -- runs


def test_it_trains_locked_down_and_says_where_the_pictures_are(containers: Containers, tmp_path: Path) -> None:
    name, done = containers.run("--strategy=mirrored", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "strategy mirrored (asked for)" in done.stderr
    ours = ("strategy ", "training on ", "step ")
    assert [line for line in done.stderr.splitlines() if not line.startswith(ours)] == [], "TensorFlow's lines are kept back"
    assert re.search(r"^pictures +runs/sample/samples$", done.stdout, re.MULTILINE)
    run = copy_run(name, tmp_path / "run")
    assert list((run / "samples").glob("*.png"))
    assert docker("diff", name).stdout == "", "nothing is written beside the volumes"


def test_two_replicas_on_a_cpu(containers: Containers) -> None:
    _, done = containers.run("--strategy=mirrored", "--set=runtime.cpu_devices=2", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "2 replicas on CPUs" in done.stderr


def test_a_limit_of_cpu_is_a_limit_of_threads(containers: Containers) -> None:
    _, done = containers.run("--strategy=one_device", *QUICK, options=("--cpus=1",))
    assert done.returncode == 0, done.stderr
    assert "the CPU, 1 threads" in done.stderr


def test_any_user_may_run_it(containers: Containers, tmp_path: Path) -> None:
    name, done = containers.run(*QUICK, options=("--user=12345:12345",))
    assert done.returncode == 0, done.stderr
    assert (copy_run(name, tmp_path / "run") / "checkpoints").is_dir()


def test_your_own_pictures_and_a_folder_for_runs_are_mounted(containers: Containers, tmp_path: Path) -> None:
    me = f"{os.getuid()}:{os.getgid()}"
    for folder in ("data", "runs"):
        (tmp_path / folder).mkdir()
    source, data, runs = f"{SAMPLE}:/source:ro", f"{tmp_path / 'data'}:/data", f"{tmp_path / 'runs'}:/runs"
    _, prepared = containers.run(
        "prepare", "--source=/source", "--output=/data/pairs", options=(f"--user={me}", "--volume", source, "--volume", data)
    )
    assert prepared.returncode == 0, prepared.stderr
    options = (f"--user={me}", "--volume", f"{data}:ro", "--volume", runs)
    _, done = containers.run("--data_dir=/data/pairs", "--model_dir=/runs/mine", *QUICK, options=options)
    assert done.returncode == 0, done.stderr
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in (tmp_path / "runs").rglob("*")}
    assert owners == {(os.getuid(), os.getgid())}


def test_the_image_and_revision_that_ran_are_in_the_config(
    containers: Containers, labels: dict[str, str], tmp_path: Path
) -> None:
    name, done = containers.run(*QUICK, options=("-e", "TRAINER_IMAGE=trainer@sha256:abc"))
    assert done.returncode == 0, done.stderr
    lines = (copy_run(name, tmp_path / "run") / "config.yaml").read_text().splitlines()
    assert {"# image: trainer@sha256:abc", f"# revision: {labels['revision']}"} <= set(lines)


# -- stops


def test_docker_stop_saves_and_the_next_run_ends_with_the_same_bits(containers: Containers, tmp_path: Path) -> None:
    volume, other = containers.volume(), containers.volume()
    name = containers.start("--strategy=mirrored", *ENDLESS, options=("--volume", f"{volume}:/runs"))
    wait_for(name, "step 100: val L1")
    seconds = stop(name)
    stopped = ended(name)
    assert stopped.returncode == 143, stopped.stderr
    assert seconds < GRACE_SECONDS
    last = stopped.stderr.strip().splitlines()[-1]
    saved = re.fullmatch(
        r"trainer: SIGTERM: stopped; step (\d+) is saved in /?runs/sample; the same command goes on from there", last
    )
    assert saved, last
    assert int(saved[1]) >= 100
    on = ("--strategy=mirrored", *LONG, f"--set=train.steps={int(saved[1]) + 20}")
    second, done = containers.run(*on, options=("--volume", f"{volume}:/runs"))
    assert done.returncode == 0, done.stderr
    assert f"going on from the checkpoint of step {saved[1]}" in done.stderr
    undisturbed, done = containers.run(*on, options=("--volume", f"{other}:/runs"))
    assert done.returncode == 0, done.stderr
    assert_same_run(copy_run(second, tmp_path / "stopped"), copy_run(undisturbed, tmp_path / "undisturbed"))


def test_docker_stop_while_tensorflow_loads(containers: Containers) -> None:
    name = containers.start("--strategy=mirrored", *LONG)
    wait_until_tensorflow_loads(name)
    assert "training on" not in docker("logs", name).stderr
    seconds = stop(name)
    done = ended(name)
    assert done.returncode == 143, done.stderr
    assert seconds < GRACE_SECONDS
    assert done.stderr.strip().splitlines()[-1].startswith("trainer: SIGTERM: stopped; ")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_docker_stop_at_once(log_format: str, containers: Containers) -> None:
    name = containers.start("--strategy=mirrored", f"--log_format={log_format}", *LONG)
    wait_for_a_handler(name)
    seconds = stop(name)
    done = ended(name)
    assert (done.returncode, seconds < GRACE_SECONDS) == (143, True)
    last = (done.stdout + done.stderr).splitlines()[-1]
    if log_format == "json":
        assert objects(done)[-1]["severity"] == "WARNING"
        last = json.loads(last)["message"]
    assert last.startswith("trainer: SIGTERM: stopped; ")


# -- logs and errors


def test_every_line_is_an_object(containers: Containers) -> None:
    _, done = containers.run("--strategy=mirrored", "--log_format=json", *QUICK)
    assert done.returncode == 0, done.stdout
    assert {line["severity"] for line in objects(done)} == {"INFO"}


def test_every_line_is_an_object_when_it_is_stopped_too(containers: Containers) -> None:
    name = containers.start("--log_format=json", *ENDLESS)
    wait_for(name, "step 50: val L1")
    seconds = stop(name)
    done = ended(name)
    assert done.returncode == 143, done.stdout
    assert seconds < GRACE_SECONDS
    last = objects(done)[-1]
    assert (last["severity"], "trainer: SIGTERM: stopped; step " in str(last["message"])) == ("WARNING", True)


def test_too_little_memory_is_named_in_objects(containers: Containers) -> None:
    _, done = containers.run("--log_format=json", "--set=train.steps=5", options=("--memory=300m", "--memory-swap=300m"))
    assert done.returncode == 137
    assert "too little memory? raise the limit" in str(objects(done)[-1]["message"])


def test_a_place_that_may_not_be_written_is_code_2_with_advice(containers: Containers) -> None:
    _, done = containers.run("prepare", "--source=/source", "--output=/data/pairs", options=("--volume", f"{SAMPLE}:/source:ro"))
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"trainer: /data.*; let user 10001:10001 read and write there, or choose another place", last)


@pytest.mark.parametrize("mistake", ["--set=train.batch=3", "--data_dir=/nothing/here"])
def test_a_mistake_is_one_line_and_code_2(mistake: str, containers: Containers) -> None:
    _, done = containers.run(mistake)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"trainer: .+\n", done.stderr)


# -- the image itself


def test_it_runs_as_an_unprivileged_user(containers: Containers, image: dict[str, dict[str, object]]) -> None:
    assert image["Config"]["User"] == "10001:10001"
    name = containers.start("-c", "import os; print(os.getuid(), os.getgid(), os.getpid())", options=("--entrypoint", PYTHON))
    docker("wait", name)
    assert ended(name).stdout == "10001 10001 1\n"


def test_it_holds_no_cache_and_no_secret(containers: Containers) -> None:
    layers = docker("history", "--no-trunc", "--format={{.CreatedBy}}", IMAGE).stdout.lower().splitlines()
    first = next(number for number, layer in enumerate(layers) if "groupadd --gid 10001" in layer)
    ours = "\n".join(layers[: first + 1])  # the layers below are the base image's
    assert re.findall(r"token|secret|passw|credential|key=|https?://|index.url", ours) == []
    places = ("/opt", "/root", "/home", "/runs", "/tmp")  # /etc is the base image's
    names = ("(", "-name", ".cache", "-o", "-name", "pip.conf", "-o", "-name", ".netrc", ")")
    _, done = containers.run(*places, *names, options=("--user=0", "--cap-add=DAC_READ_SEARCH", "--entrypoint=find"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_is_labelled(labels: dict[str, str]) -> None:
    assert (labels["title"], labels["licenses"], labels["version"]) == ("pix2pix-trainer", "Apache-2.0", __version__)
    assert re.fullmatch(r"[0-9a-f]{7,40}", labels["revision"])


def test_the_package_in_it_is_this_one(containers: Containers) -> None:
    _, done = containers.run("--version")
    assert (done.returncode, done.stdout) == (0, f"pix2pix-trainer {__version__}\n")


def test_it_is_under_two_gigabytes(image: dict[str, int]) -> None:
    print(f"\n{IMAGE}: {image['Size'] / 1e9:.2f} GB")
    assert image["Size"] < 2.0e9
