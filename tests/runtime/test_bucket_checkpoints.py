"""SIGKILL while a checkpoint is on its way to the bucket: what the list names is always whole."""

import random
import signal
import time

import numpy as np
import pytest

from tests.helpers.bucket.saver import state_of
from tests.helpers.bucket.service import BucketService
from tests.helpers.processes import start_module
from tests.helpers.waiting import wait_until
from trainer.runtime.bucket_checkpoints import BucketCheckpoints
from trainer.storage.bucket import BucketPath, parse

BYTES = 4_000_000
SECONDS_OF_A_SAVE = 1.0


def killed_in(folder: BucketPath, service: BucketService, after: float) -> None:
    """Start saving on a slow line, kill that long after the first upload has begun."""
    service.clear()
    service.throttle(0.02, BYTES / SECONDS_OF_A_SAVE)
    process = start_module("tests.helpers.bucket.saver", str(folder), str(BYTES))
    wait_until(lambda: any(".index" in request.path for request in service.requests()), process)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    service.throttle(0, 0)


def check_newest(folder: BucketPath) -> int:
    """Restore the newest checkpoint; its step. Every number in it must be of that step."""
    reader = BucketCheckpoints(folder / "checkpoints", 2)
    marker = reader.newest_whole()
    if marker is None:
        return 0
    state = state_of(-1, BYTES // 4)
    reader.restore(state, marker)
    assert int(state.step) == marker.step
    np.testing.assert_array_equal(state.weights.numpy(), np.full(BYTES // 4, marker.step, np.float32))
    return marker.step


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_20_random_moments_a_whole_checkpoint_is_found_every_time(bucket: str, bucket_service: BucketService) -> None:
    folder, moments = parse(f"{bucket}/run"), random.Random(20161121)
    reached, interrupted = 0, 0
    for _ in range(20):
        killed_in(folder, bucket_service, moments.uniform(0, 2 * SECONDS_OF_A_SAVE))
        sent = [one for one in bucket_service.requests() if one.method in ("POST", "PUT") and "step-" in one.path]
        cut = [one for one in sent if one.status != 200]
        step = check_newest(folder)
        there = {name for name in (folder / "checkpoints").listing() if name.startswith("step-")}
        named = {name for marker in BucketCheckpoints(folder / "checkpoints", 2).markers() for name in marker.files}
        interrupted += bool(cut or there - named)
        assert step >= reached, "nothing that was listed is lost"
        reached = step
    assert interrupted >= 10, "most of the kills fell into an upload"
    assert reached >= 5
