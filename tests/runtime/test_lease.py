"""The lease, the list of checkpoints and the metrics: who may write, who is fenced off."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import tensorflow as tf

from tests.helpers.bucket.answers import UNAVAILABLE, forbidden
from tests.helpers.bucket.faults import Fault, refuse
from tests.helpers.bucket.runs import keys
from tests.helpers.bucket.service import BucketService
from tests.helpers.clock import assert_within
from tests.helpers.waiting import wait_until
from trainer.errors import BucketAwayError, BucketRefusedError, ExitCode, TrainerError, UserError
from trainer.runtime import lease as module
from trainer.runtime.bucket_checkpoints import BucketCheckpoints
from trainer.runtime.bucket_folder import BucketFolder
from trainer.runtime.lease import Lease, LostClaimError, Owner, release_all, this_process
from trainer.runtime.ledger import Marker, ObjectLedger
from trainer.storage.bucket import BucketPath, State, parse
from trainer.storage.service import Patience

ELSEWHERE = Owner("", "another-host/boot/pid:[1]", 1, "77")


@pytest.fixture
def folder(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketPath]:
    """A lease here is renewed at once and never expires, so that no test depends on how fast this machine is."""
    monkeypatch.setattr(Patience, "seconds", 3.0)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(module, "EXPIRES_SECONDS", 100_000.0)
    yield parse(f"{bucket}/run")
    release_all()


def saved(checkpoints: BucketCheckpoints, *steps: int) -> tf.train.Checkpoint:
    state = tf.train.Checkpoint(weights=tf.Variable([1.0, 2.0]))
    for step in steps:
        state.weights.assign([float(step), 0.5])
        checkpoints.save(state, step)
    return state


def left_by(folder: BucketPath, owner: Owner) -> State:
    """The lease of a process that renews it no more."""
    return (folder / ".lease").write_bytes(json.dumps({"owner": module.asdict(owner), "token": "x", "beat": 1}).encode())


def give_back(lease: Lease) -> None:
    """Release it when no renewal is on its way: one that takes long on a busy machine is not waited for by `release`."""
    assert lease._thread
    lease._done.set()
    lease._thread.join(60)
    lease.release()


def renewals(service: BucketService) -> list[int]:
    """The answers to the writes of leases, the first one's too."""
    return [one.status for one in service.requests() if one.method == "POST" and ".lease" in one.path and one.seconds]


def test_a_lease_is_renewed_and_given_back(folder: BucketPath) -> None:
    lease = Lease(folder / ".lease", this_process("job-1")).take()
    first = generation(folder)
    wait_until(lambda: generation(folder) > first)
    document = json.loads((folder / ".lease").read_text())
    assert document["owner"]["job"] == "job-1"
    assert document["beat"] > 1
    give_back(lease)
    assert keys(str(folder)) == []


def generation(folder: BucketPath) -> int:
    state = (folder / ".lease").state()
    assert state
    return state.generation


def test_a_live_holder_is_named(folder: BucketPath) -> None:
    """Its next sign of life is enough: here a lease does not expire."""
    Lease(folder / ".lease", replace(ELSEWHERE, job="night-run")).take()
    with pytest.raises(UserError, match=r"gs://.*/run: job night-run, process 1 on another-host is training in it"):
        Lease(folder / ".lease", this_process()).take()


@pytest.mark.parametrize("ahead", [0, 3600, -3600])
def test_the_lease_of_a_dead_process_of_another_machine_expires_by_the_services_clock(
    ahead: float, folder: BucketPath, bucket_service: BucketService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's may be an hour slow or fast: that counts for nothing."""
    monkeypatch.setattr(module, "EXPIRES_SECONDS", 0.6)
    bucket_service.clock(ahead)
    before = left_by(folder, ELSEWHERE)
    lease = Lease(folder / ".lease", this_process()).take()
    taken = json.loads((folder / ".lease").read_text())["owner"]
    after = (folder / ".lease").state()
    assert taken == module.asdict(this_process())
    assert after
    assert (after.updated - before.updated).total_seconds() > 0.6
    lease.release()


def test_a_dead_process_of_this_machine_and_the_same_job_are_not_waited_for(
    folder: BucketPath, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXPIRES_SECONDS", 2.0)
    me = this_process("job-1")
    for holder in (replace(me, job="", started="1"), replace(ELSEWHERE, job="job-1")):
        left_by(folder, holder)
        Lease(folder / ".lease", me).take().release()
    assert "waiting to see whether it is alive" not in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"owner": {"job": ""}}', b'{"owner": null}'])
def test_what_is_no_lease_is_taken(content: bytes, folder: BucketPath, caplog: pytest.LogCaptureFixture) -> None:
    (folder / ".lease").write_bytes(content)
    Lease(folder / ".lease", this_process()).take().release()
    assert "cannot be read as a lease; it is taken" in caplog.text


def test_a_process_of_this_machine_that_lives_is_not_taken_over(folder: BucketPath) -> None:
    Lease(folder / ".lease", this_process()).take()
    with pytest.raises(UserError, match="is training in it"):
        Lease(folder / ".lease", this_process()).take()


def test_a_renewal_that_was_written_while_the_bucket_seemed_away_is_still_ours(
    folder: BucketPath, bucket_service: BucketService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is refused, for the generation is not the one that is known; but the object bears our token."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 1000.0)
    monkeypatch.setattr(module, "_answer_seconds", lambda: 0.5)
    lease = Lease(folder / ".lease", this_process()).take()
    bucket_service.faults(Fault("lost_reply", "POST", r"\.lease", times=None))
    with pytest.raises(BucketAwayError):
        lease.confirm()
    bucket_service.faults()
    lease.confirm()
    lease.check()
    lease.release()
    assert keys(str(folder)) == []


def test_a_renewal_after_a_takeover_is_refused(folder: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 1000.0)
    old = Lease(folder / ".lease", replace(ELSEWHERE, job="job")).take()
    new = Lease(folder / ".lease", this_process("job")).take()
    with pytest.raises(LostClaimError, match="another process has taken this run over"):
        old.confirm()
    new.confirm()
    old.release()
    assert json.loads((folder / ".lease").read_text())["token"] == new.token, "the loser leaves it alone"


def test_of_many_that_find_a_lease_to_be_taken_one_takes_it(folder: BucketPath) -> None:
    """A dead process of this machine has left it; six that live are there at the same time."""
    left_by(folder, replace(this_process(), started="1"))
    taken: list[str] = []

    def contend(number: int) -> str:
        lease = Lease(folder / ".lease", this_process(f"job-{number}"))
        try:
            lease.take()
        except UserError as error:
            return str(error)
        taken.append(lease.token)
        return ""

    with ThreadPoolExecutor(6) as threads:
        said = list(threads.map(contend, range(6)))
    assert len(taken) == 1
    assert json.loads((folder / ".lease").read_text())["token"] == taken[0]
    assert sum("is training in it" in line for line in said) == 5


def test_a_holder_learns_that_it_was_replaced(folder: BucketPath) -> None:
    old = Lease(folder / ".lease", replace(ELSEWHERE, job="job")).take()
    Lease(folder / ".lease", this_process("job")).take()
    assert old._thread
    old._thread.join(60)
    with pytest.raises(LostClaimError, match="another process has taken this run over") as caught:
        old.check()
    assert caught.value.exit_code == ExitCode.UNEXPECTED


@pytest.mark.clock
def test_a_lease_that_cannot_be_given_back_costs_seconds_and_hides_no_error(
    folder: BucketPath, bucket_service: BucketService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Patience, "seconds", 1000.0)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.2)
    lease = Lease(folder / ".lease", this_process()).take()
    bucket_service.away(True)
    began = time.monotonic()
    lease.release()
    assert_within(0, time.monotonic() - began, 20)
    bucket_service.away(False)


def test_a_bucket_that_is_away_does_not_end_the_lease(folder: BucketPath, bucket_service: BucketService) -> None:
    lease = Lease(folder / ".lease", this_process()).take()
    bucket_service.away(True)
    wait_until(lambda: renewals(bucket_service).count(0) > 3)
    lease.check()
    bucket_service.away(False)
    first = generation(folder)
    wait_until(lambda: generation(folder) > first)
    lease.check()
    give_back(lease)
    assert keys(str(folder)) == []


def test_a_writer_that_slept_cannot_move_the_list_of_its_successor(folder: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tells it: its lease thread sleeps too. The list's generation alone keeps it out, and what it uploaded goes."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 1000.0)
    old = Lease(folder / ".lease", replace(ELSEWHERE, job="job")).take()
    sleeper = BucketCheckpoints(folder / "checkpoints", 2, old)
    state = saved(sleeper, 10, 20)
    successor = BucketCheckpoints(folder / "checkpoints", 2, Lease(folder / ".lease", this_process("job")).take())
    before = (folder / "checkpoints").listing()
    with pytest.raises(LostClaimError):
        sleeper.save(state, 30)
    with pytest.raises(LostClaimError):
        sleeper.mark_best(10, 1.0)
    assert (folder / "checkpoints").listing() == before
    assert [marker.step for marker in successor.markers()] == [10, 20]


def test_metrics_of_a_writer_that_slept_are_refused_even_before_the_first_line(
    folder: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 1000.0)
    old = BucketFolder(folder).claim(job="job")
    new = BucketFolder(folder).claim(job="job")
    with pytest.raises(LostClaimError):
        old.add_metrics({"step": 1, "split": "val"})
    new.add_metrics({"step": 2, "split": "val"})
    assert (folder / "metrics.jsonl").read_text() == '{"step": 2, "split": "val"}\n'
    assert BucketFolder(folder).metrics() == [{"step": 2, "split": "val"}]


def test_newest_and_best_are_kept_and_nothing_else_lies_there(folder: BucketPath) -> None:
    checkpoints = BucketCheckpoints(folder / "checkpoints", 2, Lease(folder / ".lease", this_process()).take())
    saved(checkpoints, 10, 20)
    checkpoints.mark_best(20, 9.5)
    state = saved(checkpoints, 30, 40, 40)
    assert [marker.step for marker in checkpoints.markers()] == [20, 30, 40]
    named = {name for marker in checkpoints.markers() for name in marker.files}
    assert set((folder / "checkpoints").listing()) == named | {"checkpoints.json"}
    reader = BucketCheckpoints(folder / "checkpoints", 2)
    assert (reader.best_step(), reader.choose("best").step, reader.choose("newest").step) == (20, 20, 40)
    state.weights.assign([0.0, 0.0])
    reader.restore(state, reader.choose("best"))
    assert state.weights.numpy().tolist() == [20.0, 0.5]


def test_what_a_killed_save_left_is_swept_by_the_next_writer(folder: BucketPath) -> None:
    first = Lease(folder / ".lease", this_process()).take()
    saved(BucketCheckpoints(folder / "checkpoints", 2, first), 10)
    (folder / "checkpoints" / "step-00000020-abc.data-00000-of-00001").write_bytes(b"half")
    first.release()
    assert BucketCheckpoints(folder / "checkpoints", 2).markers()[-1].step == 10
    BucketCheckpoints(folder / "checkpoints", 2, Lease(folder / ".lease", this_process()).take())
    assert not [name for name in (folder / "checkpoints").listing() if "20" in name]


def test_a_refused_save_leaves_the_older_ones(folder: BucketPath, bucket_service: BucketService) -> None:
    checkpoints = BucketCheckpoints(folder / "checkpoints", 2, Lease(folder / ".lease", this_process()).take())
    state = saved(checkpoints, 10)
    bucket_service.faults(refuse(forbidden(), "POST", r"\.data-"))
    with pytest.raises(BucketRefusedError, match=r"storage\.objects\.create"):
        checkpoints.save(state, 20)
    bucket_service.faults()
    assert BucketCheckpoints(folder / "checkpoints", 2).choose("newest").step == 10


def test_a_save_whose_last_answer_was_lost_counts_once(folder: BucketPath, bucket_service: BucketService) -> None:
    checkpoints = BucketCheckpoints(folder / "checkpoints", 2, Lease(folder / ".lease", this_process()).take())
    bucket_service.faults(Fault("lost_reply", "POST", r"checkpoints\.json"))
    state = saved(checkpoints, 10)
    checkpoints.save(state, 20)
    assert [marker.step for marker in BucketCheckpoints(folder / "checkpoints", 2).markers()] == [10, 20]


def test_checkpoints_without_their_list_are_no_fresh_start(folder: BucketPath) -> None:
    lease = Lease(folder / ".lease", this_process()).take()
    saved(BucketCheckpoints(folder / "checkpoints", 2, lease), 10)
    (folder / "checkpoints" / "checkpoints.json").unlink()
    before = (folder / "checkpoints").listing()
    with pytest.raises(UserError, match=r"checkpoints: holds checkpoints and no checkpoints\.json; bring that back"):
        BucketCheckpoints(folder / "checkpoints", 2, lease)
    assert (folder / "checkpoints").listing() == before


def test_a_list_that_is_written_while_it_is_taken_over_is_taken_over_with_that(
    folder: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier writer's last save falls between the successor's look at the list and its first write."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 1000.0)
    earlier = BucketCheckpoints(folder / "checkpoints", 2, Lease(folder / ".lease", replace(ELSEWHERE, job="job")).take())
    state, lease = saved(earlier, 10), Lease(folder / ".lease", this_process("job")).take()
    read = ObjectLedger._read

    def read_slowly(self: ObjectLedger) -> None:
        read(self)
        monkeypatch.setattr(ObjectLedger, "_read", read)
        earlier.save(state, 20)

    monkeypatch.setattr(ObjectLedger, "_read", read_slowly)
    successor = BucketCheckpoints(folder / "checkpoints", 2, lease)
    assert [marker.step for marker in successor.markers()] == [10, 20]
    with pytest.raises(LostClaimError):
        earlier.save(state, 30)


def test_a_list_whose_answer_never_came_is_known_again_as_ours(
    folder: BucketPath, bucket_service: BucketService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was written, then the bucket was away for longer than the patience; the next save must not call that a takeover."""
    lease = Lease(folder / ".lease", this_process()).take()
    checkpoints = BucketCheckpoints(folder / "checkpoints", 2, lease)
    state = saved(checkpoints, 10)
    lost, away = Fault("lost_reply", "POST", r"checkpoints\.json"), refuse(UNAVAILABLE, "", r"checkpoints\.json")
    monkeypatch.setattr(Patience, "seconds", 1.0)
    bucket_service.faults(lost, away)
    with pytest.raises(BucketAwayError):
        checkpoints.save(state, 20)
    bucket_service.faults()
    checkpoints.save(state, 30)
    assert [marker.step for marker in BucketCheckpoints(folder / "checkpoints", 2).markers()] == [10, 30]


def test_a_list_that_is_damaged_is_no_fresh_start(folder: BucketPath) -> None:
    (folder / "checkpoints" / "checkpoints.json").write_bytes(b'{"checkpoints": [{"step"')
    with pytest.raises(UserError, match="is no list of checkpoints"):
        BucketCheckpoints(folder / "checkpoints", 2)


def test_without_a_lease_nothing_is_written(folder: BucketPath, bucket_service: BucketService) -> None:
    reader = BucketCheckpoints(folder / "checkpoints", 2)
    with pytest.raises(RuntimeError, match="without a lease") as caught:
        reader.mark_best(3, 1.0)
    assert not isinstance(caught.value, TrainerError), "a mistake of the program, and no case for a line without a traceback"
    with pytest.raises(RuntimeError, match="without a lease"):
        ObjectLedger(folder / "checkpoints", None).change(Marker(1, False, "x", {}), ())
    assert folder.listing() == {}
    assert {request.method for request in bucket_service.requests()} == {"GET"}
