"""The Kubernetes manifests, rendered as a user renders them; no cluster is needed, and none has run them."""

import copy
import functools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.manifests import KUBERNETES, environment, problems, quantity, render, the_container, the_job, the_pod
from trainer.arguments import parse
from trainer.config import load_config

pytestmark = pytest.mark.container  # it needs kubectl, as the container tests need Docker

OVERLAYS = sorted(folder.name for folder in (KUBERNETES / "overlays").iterdir())
POD = ("spec", "template", "spec")
CONTAINER = (*POD, "containers", 0)
RULE = ("spec", "podFailurePolicy", "rules", 0)
REMOVED = object()


@functools.cache
def _rendered(overlay: str) -> list[dict[str, Any]]:
    return render(KUBERNETES / "overlays" / overlay)


def rendered(overlay: str) -> list[dict[str, Any]]:
    return copy.deepcopy(_rendered(overlay))


def edited(folder: Path, overlay: str, old: str, new: str) -> list[dict[str, Any]]:
    """What a user gets who edits the overlay's kustomization.yaml."""
    shutil.copytree(KUBERNETES, folder / "kubernetes")
    file = folder / "kubernetes" / "overlays" / overlay / "kustomization.yaml"
    text = file.read_text()
    assert re.search(old, text)
    file.write_text(re.sub(old, new, text))
    return render(file.parent)


def put(tree: Any, path: tuple[str | int, ...], value: object) -> None:
    for step in path[:-1]:
        tree = tree[step]
    if value is REMOVED:
        del tree[path[-1]]
    else:
        tree[path[-1]] = value


def test_the_overlays_are_those_of_the_manual() -> None:
    manual = (KUBERNETES.parents[1] / "docs" / "kubernetes.md").read_text()
    assert OVERLAYS == ["mirrored", "single"]
    assert [name for name in OVERLAYS if f"overlays/{name}" not in manual] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_has_no_problem(overlay: str) -> None:
    assert problems(rendered(overlay)) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_spot_goes_onto_an_overlay_and_shortens_both_grace_periods(overlay: str, tmp_path: Path) -> None:
    resources = edited(tmp_path, overlay, "# components:\n#   - ", "components:\n  - ")
    pod = the_pod(resources)
    assert problems(resources) == []
    assert pod["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert {toleration["key"] for toleration in pod["tolerations"]} == {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
    assert pod["terminationGracePeriodSeconds"] == 15


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_image_by_digest_is_what_the_trainer_is_told(overlay: str, tmp_path: Path) -> None:
    digest = "sha256:" + "0123456789abcdef" * 4
    resources = edited(tmp_path, overlay, r"newTag: \S+", f"digest: {digest}")
    assert problems(resources) == []
    assert environment(the_container(resources))["TRAINER_IMAGE"] == f"REGISTRY/trainer@{digest}"


@pytest.mark.parametrize("tag", ["1.2", "1234567", "0123abc"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_tag_that_looks_like_a_number_is_a_tag(overlay: str, tag: str, tmp_path: Path) -> None:
    resources = edited(tmp_path, overlay, r"(?<=newTag: .)VERSION(?:-gpu)?|(?<=newTag: )VERSION(?:-gpu)?", tag)
    assert problems(resources) == []
    assert environment(the_container(resources))["TRAINER_IMAGE"] == f"REGISTRY/trainer:{tag}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_trainer_understands_the_arguments(overlay: str) -> None:
    container = the_container(rendered(overlay))
    command, flags = parse(["trainer", *container["args"]])
    config = load_config(None, flags["set"].value)
    assert (command, flags["log_format"].value) == ("train", "json")
    assert flags["model_dir"].value.startswith("/runs/")
    assert flags["strategy"].value == {"single": "one_device", "mirrored": "mirrored"}[overlay]
    gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    if gpus:
        assert config.train.batch_size % gpus == 0
    else:
        assert config.runtime.threads == quantity(container["resources"]["limits"]["cpu"])


def test_a_job_of_one_pod_goes_on_after_stops_and_ends_after_failures() -> None:
    spec = the_job(rendered("single"))["spec"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (1, 1, 6)
    assert spec["ttlSecondsAfterFinished"] > 0


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((*POD, "restartPolicy"), "Always", "restartPolicy is Always"),
        ((*POD, "restartPolicy"), "OnFailure", "restartPolicy is OnFailure"),
        ((*POD, "restartPolicies"), "Never", "schema"),
        ((*CONTAINER, "imagePullPolicy"), "Sometimes", "imagePullPolicy is Sometimes"),
        (("spec", "podReplacementPolicy"), "TerminatingOrFailed", "podReplacementPolicy is"),
        ((*RULE, "action"), "Fail", "action Fail is none"),
        ((*RULE, "action"), "Ignore", "are not those of ExitCode"),
        ((*RULE, "onExitCodes", "operator"), "in", "operator in is not In"),
        ((*RULE, "onExitCodes", "values"), [2, 3], "are not those of ExitCode"),
        ((*RULE, "onExitCodes", "values"), [3, 2, 126, 127], "not ascending"),
        ((*RULE, "onExitCodes", "values"), [0, 2, 3, 126, 127], "not ascending"),
        ((*RULE, "onExitCodes", "containerName"), "main", "the policy's container main is none"),
        ((*RULE, "onPodConditions"), [{"type": "DisruptionTarget"}], "either exit codes or conditions"),
        (("spec", "podFailurePolicy", "rules", 2), REMOVED, "DisruptionTarget alone"),
        ((*CONTAINER, "resources", "requests", "memory"), "4GiB", "'4GiB' is no quantity"),
        ((*CONTAINER, "resources", "limits", "cpu"), "four", "'four' is no quantity"),
        ((*CONTAINER, "resources", "requests", "cpu"), "64", "more cpu is requested"),
        ((*CONTAINER, "resources", "limits", "ephemeral-storage"), REMOVED, "ephemeral-storage is not both"),
        ((*CONTAINER, "resources", "requests", "nvidia.com/gpu"), 2, "the GPUs requested"),
        ((*CONTAINER, "resources", "requests", "nvidia.com/gpu"), REMOVED, "the GPUs requested"),
        ((*CONTAINER, "volumeMounts", 1, "name"), "temp", "mount temp has no volume"),
        ((*CONTAINER, "volumeMounts", 1), REMOVED, "volume tmp is mounted nowhere"),
        ((*POD, "volumes", 0, "persistentVolumeClaim", "claimName"), "runs", "/runs is on no claim"),
        ((*POD, "volumes", 1, "emptyDir", "medium"), "Memory", "/tmp is no emptyDir of medium disk"),
        ((*POD, "volumes", 1, "emptyDir", "sizeLimit"), "512Mi", "the sizeLimit of /tmp"),
        ((*POD, "volumes", 1, "emptyDir", "sizeLimit"), "2 GB", "'2 GB' is no quantity"),
        ((*POD, "volumes", 2, "emptyDir", "medium"), "RAM", "medium is RAM"),
        ((*POD, "volumes", 2, "emptyDir", "sizeLimit"), REMOVED, "/dev/shm has no sizeLimit"),
        ((*POD, "securityContext", "runAsNonRoot"), REMOVED, "runAsNonRoot is None"),
        ((*POD, "securityContext", "runAsUser"), 0, "runAsUser is 0"),
        ((*POD, "securityContext", "seccompProfile", "type"), "Unconfined", "seccompProfile is"),
        ((*CONTAINER, "securityContext", "allowPrivilegeEscalation"), True, "allowPrivilegeEscalation is True"),
        ((*CONTAINER, "securityContext", "readOnlyRootFilesystem"), False, "readOnlyRootFilesystem is False"),
        ((*CONTAINER, "securityContext", "capabilities"), {"drop": ["NET_RAW"]}, "capabilities is"),
        ((*CONTAINER, "securityContext", "privileged"), True, "the container's own privileged"),
        ((*POD, "hostNetwork"), True, "hostNetwork is set"),
        ((*POD, "automountServiceAccountToken"), True, "automountServiceAccountToken is True"),
        ((*POD, "serviceAccountName"), "default", "the service account is none"),
        ((*POD, "terminationGracePeriodSeconds"), 30, "TRAINER_GRACE_SECONDS is not"),
        ((*CONTAINER, "image"), "REGISTRY/trainer:other", "TRAINER_IMAGE is not the image"),
        ((*CONTAINER, "env", 0), {"name": "API_KEY", "value": "x"}, "API_KEY looks like a secret"),
        ((*CONTAINER, "args", 0), "--base_url=https://me:word@example.com", "looks like a secret"),
        ((*CONTAINER, "terminationMessagePolicy"), 3, "schema"),
    ],
)
def test_a_mistake_is_found(path: tuple[str | int, ...], value: object, said: str) -> None:
    resources = rendered("mirrored")
    put(the_job(resources), path, value)
    assert [line for line in problems(resources) if said in line] != []


def test_a_secret_among_the_manifests_is_found() -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"key": "-----BEGIN KEY-----"}}
    found = problems([*rendered("single"), secret])
    assert [line[:24] for line in found] == ["a Secret is among the ma", "-----BEG... looks like a"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("4Gi", 4 * 2**30), (4, 4), ("500m", 0.5), ("1.5k", 1500), ("686M", 686e6), ("1e3", 1000), ("20Ki", 20480)],
)
def test_a_quantity_is_read(text: object, value: float) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize("text", ["", "Gi", "4GiB", "4K", "4 Gi", "-1", "four", "1.2.3"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no quantity"):
        quantity(text)
