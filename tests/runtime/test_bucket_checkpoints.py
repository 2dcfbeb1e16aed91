"""SIGKILL while a checkpoint is on its way to the bucket: what the list names is always whole."""

import signal
from typing import NamedTuple

import numpy as np
import pytest

from tests.helpers.bucket.faults import Fault
from tests.helpers.bucket.saver import state_of
from tests.helpers.bucket.service import BucketService
from tests.helpers.processes import start_module
from tests.helpers.waiting import wait_until
from trainer.runtime.bucket_checkpoints import BucketCheckpoints
from trainer.runtime.lease import Lease, release_all, this_process
from trainer.storage.bucket import BucketPath, parse

BYTES = 400_000


class Moment(NamedTuple):
    """A request of the third save, the first one that removes an older checkpoint.

    Attributes:
        method, path: of the request; `skip` that fit come before it.
        listed: the newest step in the list if the process dies before the request is done, and after it.
    """

    method: str
    path: str
    skip: int
    listed: tuple[int, int]


MOMENTS = {
    "data": Moment("POST", r"step-.*\.data-", 2, (2, 2)),
    "index": Moment("POST", r"step-.*\.index", 2, (2, 2)),
    "list": Moment("POST", r"checkpoints\.json", 3, (2, 3)),  # the first is the takeover
    "removal of data": Moment("DELETE", r"step-.*\.data-", 0, (3, 3)),
    "removal of index": Moment("DELETE", r"step-.*\.index", 0, (3, 3)),
}


def killed(folder: BucketPath, service: BucketService, fault: Fault) -> None:
    """Save until a request is held, and kill the process there."""
    service.clear()
    service.faults(fault)
    process = start_module("tests.helpers.bucket.saver", str(folder), str(BYTES))
    wait_until(service.held, process, what="the request")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    service.release()
    wait_until(lambda: service.held() == 0)
    service.faults()


def check_newest(folder: BucketPath) -> int:
    """Restore the newest checkpoint; its step. Every number in it must be of that step."""
    reader = BucketCheckpoints(folder / "checkpoints", 2)
    marker = reader.newest_whole()
    assert marker
    assert marker == reader.markers()[-1]
    assert {reader.damage(one) for one in reader.markers()} == {None}, "all that is listed is whole"
    state = state_of(-1, BYTES // 4)
    reader.restore(state, marker)
    assert int(state.step) == marker.step
    np.testing.assert_array_equal(state.weights.numpy(), np.full(BYTES // 4, marker.step, np.float32))
    return marker.step


def check_next_start(folder: BucketPath, newest: int) -> None:
    """The next process of this machine takes over at once, removes what is not listed, and saves the next step."""
    checkpoints = BucketCheckpoints(folder / "checkpoints", 2, Lease(folder / ".lease", this_process()).take())
    checkpoints.clean()
    checkpoints.save(state_of(newest + 1, 10), newest + 1)
    assert [marker.step for marker in checkpoints.markers()] == [newest, newest + 1]
    named = {name for marker in checkpoints.markers() for name in marker.files}
    assert set((folder / "checkpoints").listing()) == named | {"checkpoints.json"}
    release_all()


@pytest.mark.parametrize(
    ("done", "request_of"),
    [
        ("before", "data"),
        ("after", "list"),
        *(
            pytest.param(done, name, marks=pytest.mark.slow)
            for done in ("before", "after")
            for name in MOMENTS
            if (done, name) not in (("before", "data"), ("after", "list"))
        ),
    ],
)
def test_killed_at_a_request_of_a_save_a_whole_checkpoint_is_found(
    done: str, request_of: str, bucket: str, bucket_service: BucketService
) -> None:
    """Before the service has done what is asked, and when it has and the answer is on its way."""
    folder, moment = parse(f"{bucket}/run"), MOMENTS[request_of]
    action = "hold" if done == "before" else "hold_reply"
    killed(folder, bucket_service, Fault(action, moment.method, moment.path, skip=moment.skip))  # type: ignore[arg-type]
    newest = check_newest(folder)
    assert newest == moment.listed[done == "after"]
    check_next_start(folder, newest)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_body_a_whole_checkpoint_is_found(bucket: str, bucket_service: BucketService) -> None:
    folder = parse(f"{bucket}/run")
    killed(folder, bucket_service, Fault("hold", "POST", r"step-.*\.data-", skip=2, bytes=BYTES // 2))
    assert check_newest(folder) == 2
    check_next_start(folder, 2)
