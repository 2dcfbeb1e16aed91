"""Render the Kubernetes manifests, and say what is wrong with them: the schema first, then what the schema lets through."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from tests.helpers.missing import missing
from trainer.errors import ExitCode

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
CHECKPOINT_BYTES = 686_000_000
# Job.podFailurePolicy is stable from 1.31 on.
VERSIONS = ("1.31", kubernetes_validate.latest_version())
SUFFIXES = {"": 1, "m": Decimal("0.001"), "k": 1000} | {
    letter + binary: (1024 if binary else 1000) ** power for power, letter in enumerate("KMGTPE", start=1) for binary in ("", "i")
}
del SUFFIXES["K"]  # a thousand is k
FINAL, REPEATED = {ExitCode.USER, ExitCode.DIVERGED}, {ExitCode.AGAIN, ExitCode.STOPPED}
SHELL_CODES = {126, 127}  # the command cannot be run, or is not there
SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSW|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"-----BEGIN|AKIA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35}|gh[pousr]_[0-9A-Za-z]{36}|xox[abp]-|eyJ[\w-]+\.eyJ|://[^/\s:]+:[^/\s@]+@"
)

Tree = dict[str, Any]
Found = Iterator[str]


def render(folder: Path) -> list[Tree]:
    """The resources that `kubectl kustomize` makes of a folder."""
    program = shutil.which("kubectl")
    if program is None:
        missing("kubectl is not on the path: these tests render with `kubectl kustomize` (no cluster is needed); install it")
    done = subprocess.run([program, "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return [resource for resource in yaml.safe_load_all(done.stdout) if resource]


def of_kind(resources: list[Tree], kind: str) -> list[Tree]:
    return [resource for resource in resources if resource["kind"] == kind]


def the_job(resources: list[Tree]) -> Tree:
    (job,) = of_kind(resources, "Job")
    return job


def the_pod(resources: list[Tree]) -> Tree:
    return the_job(resources)["spec"]["template"]["spec"]


def the_container(resources: list[Tree]) -> Tree:
    (container,) = the_pod(resources)["containers"]
    return container


def environment(container: Tree) -> dict[str, str | None]:
    return {entry["name"]: entry.get("value") for entry in container.get("env", [])}


def quantity(text: object) -> Decimal:
    """A Kubernetes quantity in its unit: cores, bytes, pieces.

    Raises:
        ValueError: it is none.
    """
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([eE][+-]?\d+)|([a-zA-Z]{0,2}))", str(text))
    if parts is None or (parts[3] or "") not in SUFFIXES:
        raise ValueError(f"{text!r} is no quantity")
    return Decimal(parts[1] + (parts[2] or "")) * SUFFIXES[parts[3] or ""]


def schema(resources: list[Tree]) -> Found:
    for resource in resources:
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(resource, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"schema {version}: {resource['kind']}: {error.message}"


def enums(resources: list[Tree]) -> Found:
    pod, spec = the_pod(resources), the_job(resources)["spec"]
    for where, value, allowed in [
        ("restartPolicy", pod.get("restartPolicy"), {"Never"}),  # podFailurePolicy refuses OnFailure
        ("podReplacementPolicy", spec.get("podReplacementPolicy"), {"Failed"}),
        ("imagePullPolicy", the_container(resources).get("imagePullPolicy"), {"Always", "IfNotPresent", "Never"}),
        *[("accessModes", m, {"ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"}) for m in _access_modes(resources)],
        *[("medium", v.get("emptyDir", {}).get("medium", ""), {"", "Memory"}) for v in pod["volumes"]],
        *[("toleration's operator", t.get("operator", "Equal"), {"Equal", "Exists"}) for t in pod.get("tolerations", [])],
        *[
            ("effect", t.get("effect", "NoSchedule"), {"NoSchedule", "PreferNoSchedule", "NoExecute"})
            for t in pod.get("tolerations", [])
        ],
    ]:
        if value not in allowed:
            yield f"{where} is {value}; allowed: {', '.join(sorted(allowed))}"


def _access_modes(resources: list[Tree]) -> list[str]:
    return [mode for claim in of_kind(resources, "PersistentVolumeClaim") for mode in claim["spec"]["accessModes"]]


def failure_policy(resources: list[Tree]) -> Found:
    containers = {container["name"] for container in the_pod(resources)["containers"]}
    codes: dict[str, set[int]] = {"FailJob": set(), "Ignore": set(), "Count": set(), "FailIndex": set()}
    conditions = []
    for rule in the_job(resources)["spec"]["podFailurePolicy"]["rules"]:
        if rule["action"] not in ("FailJob", "Ignore", "Count"):  # FailIndex is for Indexed Jobs
            yield f"action {rule['action']} is none"
            continue
        on_codes, on_conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
        if (on_codes is None) == (on_conditions is None):
            yield "a rule has either exit codes or conditions"
        if on_codes:
            yield from _exit_codes(on_codes, containers)
            codes[rule["action"]] |= set(on_codes["values"])
        conditions += [(rule["action"], c["type"], c.get("status", "True")) for c in on_conditions or []]
    if codes["FailJob"] != FINAL | SHELL_CODES or codes["Ignore"] != REPEATED:
        yield f"exit codes {codes} are not those of ExitCode"
    if conditions != [("Ignore", "DisruptionTarget", "True")]:
        yield f"conditions {conditions} are not DisruptionTarget alone"


def _exit_codes(rule: Tree, containers: set[str]) -> Found:
    if rule["operator"] != "In":  # NotIn exists; no rule here means it
        yield f"operator {rule['operator']} is not In"
    if rule.get("containerName") not in containers:
        yield f"the policy's container {rule.get('containerName')} is none"
    if rule["values"] != sorted(set(rule["values"])) or not all(0 < value < 256 for value in rule["values"]):
        yield f"exit codes {rule['values']} are not ascending numbers from 1 to 255"


def quantities(resources: list[Tree]) -> Found:
    for where, text in _all_quantities(resources):
        try:
            quantity(text)
        except ValueError as error:
            yield f"{where}: {error}"


def _all_quantities(resources: list[Tree]) -> Iterator[tuple[str, object]]:
    for group in ("requests", "limits"):
        yield from the_container(resources)["resources"].get(group, {}).items()
    for volume in the_pod(resources)["volumes"]:
        if "sizeLimit" in volume.get("emptyDir", {}):
            yield f"sizeLimit of {volume['name']}", volume["emptyDir"]["sizeLimit"]
    for claim in of_kind(resources, "PersistentVolumeClaim"):
        yield from claim["spec"]["resources"]["requests"].items()


def resource_limits(resources: list[Tree]) -> Found:
    requests, limits = (the_container(resources)["resources"].get(group, {}) for group in ("requests", "limits"))
    for name in ("cpu", "memory", "ephemeral-storage"):
        if name not in requests or name not in limits:
            yield f"{name} is not both requested and limited"
    if requests.get("nvidia.com/gpu") != limits.get("nvidia.com/gpu"):
        yield "the GPUs requested are not the GPUs limited"
    for name in requests.keys() & limits.keys():
        if _readable(requests[name], limits[name]) and quantity(requests[name]) > quantity(limits[name]):
            yield f"more {name} is requested than the limit"


def _readable(*texts: object) -> bool:
    try:
        return bool([quantity(text) for text in texts])
    except ValueError:
        return False


def volumes(resources: list[Tree]) -> Found:
    pod, mounts = the_pod(resources), the_container(resources)["volumeMounts"]
    known = {volume["name"]: volume for volume in pod["volumes"]}
    at = {mount["mountPath"]: known.get(mount["name"], {}) for mount in mounts}
    for mount in mounts:
        if mount["name"] not in known:
            yield f"mount {mount['name']} has no volume"
    for name in known.keys() - {mount["name"] for mount in mounts}:
        yield f"volume {name} is mounted nowhere"
    if len(known) < len(pod["volumes"]) or len(at) < len(mounts):
        yield "two volumes with one name, or two mounts at one place"
    claims = {claim["metadata"]["name"] for claim in of_kind(resources, "PersistentVolumeClaim")}
    if at.get("/runs", {}).get("persistentVolumeClaim", {}).get("claimName") not in claims:
        yield "/runs is on no claim of these manifests"
    yield from _temporary(at, the_container(resources)["resources"]["limits"])


def _temporary(at: dict[str, Tree], limits: Tree) -> Found:
    on_disk, in_memory = ("/tmp", None, CHECKPOINT_BYTES, "ephemeral-storage"), ("/dev/shm", "Memory", 1, "memory")
    for place, medium, least, budget in (on_disk, in_memory):
        folder = at.get(place, {}).get("emptyDir")
        if folder is None or folder.get("medium") != medium:
            yield f"{place} is no emptyDir of medium {medium or 'disk'}"
        elif not _readable(folder.get("sizeLimit"), limits.get(budget)):
            yield f"{place} has no sizeLimit within a limit of {budget}"
        elif not least < quantity(folder["sizeLimit"]) < quantity(limits[budget]):
            yield f"the sizeLimit of {place} is not between {least} bytes and the limit of {budget}"


def pod_security(resources: list[Tree]) -> Found:
    """The restricted Pod Security Standard, a read-only root, and the user of the image."""
    pod, container = the_pod(resources), the_container(resources)
    whole, own = pod.get("securityContext", {}), container.get("securityContext", {})
    wanted = {
        "runAsNonRoot": (whole.get("runAsNonRoot"), True),
        "runAsUser": (whole.get("runAsUser"), 10001),
        "runAsGroup": (whole.get("runAsGroup"), 10001),
        "fsGroup": (whole.get("fsGroup"), 10001),
        "seccompProfile": (whole.get("seccompProfile"), {"type": "RuntimeDefault"}),
        "allowPrivilegeEscalation": (own.get("allowPrivilegeEscalation"), False),
        "readOnlyRootFilesystem": (own.get("readOnlyRootFilesystem"), True),
        "capabilities": (own.get("capabilities"), {"drop": ["ALL"]}),
        "automountServiceAccountToken": (pod.get("automountServiceAccountToken"), False),
    }
    yield from (f"{name} is {value}, not {right}" for name, (value, right) in wanted.items() if value != right)
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"{name} is set"
    for name in own.keys() - {"allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"}:
        yield f"the container's own {name} overrides the pod's"
    for volume in pod["volumes"]:
        if "hostPath" in volume:
            yield f"volume {volume['name']} is a hostPath"
    if pod.get("serviceAccountName") not in {account["metadata"]["name"] for account in of_kind(resources, "ServiceAccount")}:
        yield "the service account is none of these manifests"


def told_to_the_trainer(resources: list[Tree]) -> Found:
    pod, container = the_pod(resources), the_container(resources)
    told = environment(container)
    if told.get("TRAINER_GRACE_SECONDS") != str(pod.get("terminationGracePeriodSeconds")):
        yield "TRAINER_GRACE_SECONDS is not terminationGracePeriodSeconds"
    if told.get("TRAINER_IMAGE") != container["image"]:
        yield "TRAINER_IMAGE is not the image"


def secrets(resources: list[Tree]) -> Found:
    yield from ("a Secret is among the manifests" for _ in of_kind(resources, "Secret"))
    for name, value in environment(the_container(resources)).items():
        if value and SECRET_NAME.search(name):
            yield f"the variable {name} looks like a secret"
    for text in _texts(resources):
        if SECRET_VALUE.search(text):
            yield f"{text[:8]}... looks like a secret"


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from _texts(branch)
    elif isinstance(tree, str):
        yield tree


CHECKS: list[Callable[[list[Tree]], Found]] = [
    schema,
    enums,
    failure_policy,
    quantities,
    resource_limits,
    volumes,
    pod_security,
    told_to_the_trainer,
    secrets,
]


def problems(resources: list[Tree]) -> list[str]:
    """One line for each thing that is wrong."""
    return [line for check in CHECKS for line in check(resources)]
