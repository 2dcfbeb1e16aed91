"""The meeting over real sockets on loopback, every worker a thread of its own."""

import json
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.ports import LOOPBACK, hold, taken
from tests.helpers.waiting import wait_until
from tests.helpers.workers import LISTENS, TALKS, sockets_at
from trainer.cluster import Cluster
from trainer.errors import ExitCode, PeerLostError, TrainerError, UserError
from trainer.runtime import rendezvous
from trainer.runtime.rendezvous import Message, Rendezvous, ToldError

PLAN: Message = {"prefix": "step-00000020-1", "token": "abc", "finished": False}


def follow(plan: Message) -> None:
    assert plan == PLAN


class Meeting:
    """Each side runs in a thread; what it returned or raised is kept by its number."""

    def __init__(self, workers: int, seconds: float = 20) -> None:
        self._holds = [hold() for _ in range(workers)]
        self.ports = [one.getsockname()[1] for one in self._holds]
        self.addresses = tuple(f"{LOOPBACK}:{port}" for port in self.ports)
        self.seconds = seconds
        self.ends: dict[int, Any] = {}
        self._threads: list[threading.Thread] = []

    def side(self, index: int, **trains: str) -> Rendezvous:
        return Rendezvous(Cluster("TF_CONFIG", self.addresses, index), {"seed": "0"} | trains, self.seconds, f"mark {index}")

    def go(self, index: int, act: Callable[[], Message]) -> None:
        def run() -> None:
            try:
                self.ends[index] = act()
            except TrainerError as error:
                self.ends[index] = error

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def chief(self, prepare: Callable[[], Message] = lambda: PLAN) -> None:
        self.go(0, lambda: self.side(0).as_chief(prepare, lambda marks: None))

    def workers(self, *indexes: int) -> None:
        for index in indexes:
            self.go(index, lambda index=index: self.side(index).as_worker(follow))  # type: ignore[misc]

    def connection(self) -> socket.socket:
        """A connection to the chief, once it listens; who connects later is admitted later."""
        wait_until(lambda: sockets_at(self.ports[0], LISTENS), what="the chief")
        return socket.create_connection((LOOPBACK, self.ports[0]))

    def hello(self, index: int) -> bytes:
        return json.dumps({"worker": index, "workers": self.addresses, "trains": {"seed": "0"}}).encode() + b"\n"

    def finish(self) -> dict[int, Any]:
        for thread in self._threads:
            thread.join(60)
        for held in self._holds:
            held.close()
        return self.ends


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Whoever waits says at once, and always, for whom."""
    monkeypatch.setattr(rendezvous, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(rendezvous, "SAY_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(logging.getLogger("trainer"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def test_workers_that_have_come_before_the_chief_looks_and_one_that_comes_last(talkative: pytest.LogCaptureFixture) -> None:
    meeting = Meeting(4)

    def prepare() -> Message:
        wait_until(lambda: sockets_at(meeting.ports[0], TALKS) == 2, what="two workers")
        return PLAN

    meeting.chief(prepare)
    meeting.workers(3, 1)
    last = f"waiting for worker 2 ({meeting.addresses[2]}),"
    wait_until(lambda: any(record.getMessage().startswith(last) for record in talkative.records))
    meeting.workers(2)
    assert meeting.finish() == dict.fromkeys(range(4), PLAN)


def test_a_worker_waits_for_a_chief_that_does_not_listen_yet(talkative: pytest.LogCaptureFixture) -> None:
    meeting = Meeting(2)
    meeting.workers(1)
    wait_until(lambda: f"waiting for the chief ({meeting.addresses[0]}: Connection refused), at most 20 s more" in talkative.text)
    meeting.chief()
    assert meeting.finish() == dict.fromkeys(range(2), PLAN)


def test_who_does_not_come_in_time_is_named_on_both_sides() -> None:
    meeting = Meeting(3, seconds=0.3)
    meeting.chief()
    end = meeting.finish()[0]
    absent = f"worker 1 ({meeting.addresses[1]}), worker 2 ({meeting.addresses[2]})"
    assert str(end) == f"after 0 s these workers have not come: {absent}; run all workers again"
    meeting = Meeting(2, seconds=0.3)
    meeting.workers(1)
    other = meeting.finish()[1]
    assert str(other).startswith(f"after 0 s the chief ({meeting.addresses[0]}) cannot be reached: Connection refused; run")
    assert end.exit_code == other.exit_code == ExitCode.AGAIN


def test_the_port_is_free_again_afterwards() -> None:
    meeting = Meeting(2)
    meeting.chief()
    meeting.workers(1)
    meeting.finish()
    with taken(meeting.ports[0]):
        pass


@pytest.mark.parametrize(
    "noise", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"[]\n", b'{"worker": "x"}\n', b'{"worker": 1, "trains": 3}\n']
)
def test_a_probe_of_the_port_is_let_go(noise: bytes) -> None:
    meeting = Meeting(2)
    meeting.chief()
    with meeting.connection() as probe:
        probe.sendall(noise)
    meeting.workers(1)
    assert meeting.finish() == {0: PLAN, 1: PLAN}


def test_a_line_without_end_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "LONGEST_LINE", 1000)
    meeting = Meeting(2)
    meeting.chief()
    with meeting.connection() as probe:
        probe.sendall(b"x" * 2000)
        meeting.workers(1)
        assert meeting.finish() == {0: PLAN, 1: PLAN}


def test_a_worker_that_was_started_again_takes_its_own_place() -> None:
    meeting = Meeting(3)
    meeting.chief()
    with meeting.connection() as dead:
        dead.sendall(meeting.hello(1))
    meeting.workers(1)
    wait_until(lambda: sockets_at(meeting.ports[0], TALKS) == 1, what="worker 1 once more")
    meeting.workers(2)  # the last to come, so the chief has met both that say they are worker 1
    assert meeting.finish() == dict.fromkeys(range(3), PLAN)


def test_what_the_chief_finds_wrong_is_told_to_all() -> None:
    def refuse() -> Message:
        raise UserError("the folder cannot be written")

    meeting = Meeting(3)
    meeting.chief(refuse)
    meeting.workers(1, 2)
    ends = meeting.finish()
    assert {str(end) for end in ends.values()} == {"the folder cannot be written"}
    assert {end.exit_code for end in ends.values()} == {ExitCode.USER}


def test_a_worker_that_cannot_follow_ends_all() -> None:
    def refuse(plan: Message) -> None:
        raise UserError("no such checkpoint here")

    meeting = Meeting(3)
    meeting.chief()
    meeting.workers(1)
    meeting.go(2, lambda: meeting.side(2).as_worker(refuse))
    ends = meeting.finish()
    assert str(ends[2]) == "no such checkpoint here"
    assert str(ends[0]) == str(ends[1]) == "worker 2: no such checkpoint here"
    assert {end.exit_code for end in ends.values()} == {ExitCode.USER}
    assert isinstance(ends[1], ToldError)


def test_what_a_worker_has_found_wrong_already_ends_all() -> None:
    meeting = Meeting(3)
    meeting.chief()
    meeting.workers(1)
    meeting.go(2, lambda: meeting.side(2).as_worker(follow, PeerLostError("no credentials here")))
    ends = meeting.finish()
    assert str(ends[2]) == "no credentials here"
    assert str(ends[0]) == str(ends[1]) == "worker 2: no credentials here"
    assert {end.exit_code for end in ends.values()} == {ExitCode.AGAIN}


@pytest.mark.parametrize(("chief", "worker"), [({}, {"data": "b"}), ({"data": "a"}, {}), ({"data": "a"}, {"data": "b"})])
def test_one_that_trains_something_else_is_named_to_all(chief: dict[str, str], worker: dict[str, str]) -> None:
    meeting = Meeting(2)
    meeting.go(0, lambda: meeting.side(0, **chief).as_chief(lambda: PLAN, lambda marks: None))
    meeting.go(1, lambda: meeting.side(1, **worker).as_worker(follow))
    ends = meeting.finish()
    line = f"data: {worker.get('data')} there, {chief.get('data')} here; start all workers with the same command"
    assert str(ends[0]) == str(ends[1]) == f"worker 1 runs with other settings than the chief: {line}"
    assert {end.exit_code for end in ends.values()} == {ExitCode.USER}


def test_another_cluster_is_refused() -> None:
    meeting = Meeting(2)
    meeting.chief()
    stranger = Rendezvous(Cluster("TF_CONFIG", (meeting.addresses[0], "127.0.0.1:9"), 1), {"seed": "0"}, 10)
    meeting.go(1, lambda: stranger.as_worker(follow))
    ends = meeting.finish()
    line = f"worker 1 is told of other workers than the chief: {meeting.addresses[0]}, 127.0.0.1:9"
    assert str(ends[0]) == str(ends[1]) == line


def test_a_number_that_no_worker_has_is_refused() -> None:
    meeting = Meeting(2)
    meeting.chief()
    with meeting.connection() as line:
        line.sendall(meeting.hello(7))
        meeting.workers(1)
        ends = meeting.finish()
    assert str(ends[0]) == str(ends[1]) == "worker 7 has come, but the chief is told of 2 workers"


def test_a_worker_that_dies_while_it_looks_for_the_checkpoint_is_named() -> None:
    meeting = Meeting(2)
    meeting.chief()
    with meeting.connection() as line:
        line.sendall(meeting.hello(1))
        assert json.loads(line.recv(1000)) == {"plan": PLAN}
    end = meeting.finish()[0]
    assert isinstance(end, PeerLostError)
    assert str(end).startswith("worker 1 went away while starting (")


def test_a_chief_that_dies_while_the_others_wait_is_named() -> None:
    meeting = Meeting(2)
    with taken(meeting.ports[0]) as chief:
        meeting.workers(1)
        connection, _ = chief.accept()
        assert json.loads(connection.recv(1000))["worker"] == 1
        connection.close()
    end = meeting.finish()[1]
    assert isinstance(end, PeerLostError)
    assert str(end).startswith("the chief went away while starting (")


def test_what_nobody_foresaw_on_the_chief_ends_the_others_too() -> None:
    def break_down() -> Message:
        raise RuntimeError("never thought of")

    def chief() -> Message:
        with pytest.raises(RuntimeError):
            meeting.side(0).as_chief(break_down, lambda marks: None)
        return PLAN

    meeting = Meeting(2)
    meeting.go(0, chief)
    meeting.workers(1)
    end = meeting.finish()[1]
    assert (str(end), end.exit_code) == ("the chief failed while starting; its own lines say why", ExitCode.UNEXPECTED)


def test_the_chief_sees_the_marks_of_all_and_may_refuse() -> None:
    meeting, seen = Meeting(3), []

    def look(marks: list[str]) -> None:
        seen.extend(marks)
        raise UserError("that has failed before")

    meeting.go(0, lambda: meeting.side(0).as_chief(lambda: PLAN, look))
    meeting.workers(1, 2)
    ends = meeting.finish()
    assert sorted(seen) == ["mark 1", "mark 2"]
    assert {str(end) for end in ends.values()} == {"that has failed before"}


def test_a_port_that_is_taken_is_named_on_both_sides() -> None:
    meeting = Meeting(2)
    with taken(meeting.ports[1]):
        meeting.chief()
        meeting.workers(1)
        ends = meeting.finish()
    line = f"port {meeting.ports[1]}, where this worker is to listen, cannot be used: Address already in use"
    assert (str(ends[1]), str(ends[0])) == (line, f"worker 1: {line}")
    assert {end.exit_code for end in ends.values()} == {ExitCode.AGAIN}
