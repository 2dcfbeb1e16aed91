"""The meeting over real sockets on loopback, every worker a thread of its own."""

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.workers import hold, taken
from trainer.cluster import Cluster
from trainer.errors import ExitCode, PeerLostError, TrainerError, UserError
from trainer.runtime.rendezvous import Message, Rendezvous, ToldError

PLAN: Message = {"prefix": "step-00000020-1", "token": "abc", "finished": False}


class Meeting:
    """Each side runs in a thread; what it returned or raised is kept by its number."""

    def __init__(self, workers: int, seconds: float = 20) -> None:
        self._holds = [hold() for _ in range(workers)]
        self.addresses = tuple(f"127.0.0.1:{one.getsockname()[1]}" for one in self._holds)
        self.seconds = seconds
        self.ends: dict[int, Any] = {}
        self._threads: list[threading.Thread] = []

    def side(self, index: int, **trains: str) -> Rendezvous:
        return Rendezvous(Cluster("TF_CONFIG", self.addresses, index), {"seed": "0"} | trains, self.seconds)

    def hello(self, index: int) -> bytes:
        return json.dumps({"worker": index, "workers": self.addresses, "trains": {"seed": "0"}}).encode() + b"\n"

    def go(self, index: int, act: Callable[[], Message]) -> None:
        def run() -> None:
            try:
                self.ends[index] = act()
            except TrainerError as error:
                self.ends[index] = error

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def finish(self) -> dict[int, Any]:
        for thread in self._threads:
            thread.join(60)
        for held in self._holds:
            held.close()
        return self.ends


def follow(plan: Message) -> None:
    assert plan == PLAN


def test_all_hear_the_chiefs_plan_whatever_the_order_of_their_coming() -> None:
    meeting = Meeting(4)
    for index in (3, 1):
        meeting.go(index, lambda index=index: meeting.side(index).as_worker(follow))  # type: ignore[misc]
    time.sleep(0.5)
    meeting.go(0, lambda: meeting.side(0).as_chief(lambda: PLAN, lambda marks: None))
    time.sleep(0.5)
    meeting.go(2, lambda: meeting.side(2).as_worker(follow))
    assert meeting.finish() == dict.fromkeys(range(4), PLAN)


def test_the_port_is_free_again_afterwards() -> None:
    meeting = Meeting(2)
    meeting.go(0, lambda: meeting.side(0).as_chief(lambda: PLAN, lambda marks: None))
    meeting.go(1, lambda: meeting.side(1).as_worker(follow))
    meeting.finish()
    with socket.socket() as next_user:
        next_user.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        next_user.bind(("127.0.0.1", int(meeting.addresses[0].rpartition(":")[2])))


@pytest.mark.parametrize(
    "noise", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"[]\n", b'{"worker": "x"}\n', b'{"worker": 1, "trains": 3}\n']
)
def test_a_probe_of_the_port_is_let_go(noise: bytes) -> None:
    meeting = Meeting(2)
    meeting.go(0, lambda: meeting.side(0).as_chief(lambda: PLAN, lambda marks: None))
    time.sleep(0.5)
    host, _, port = meeting.addresses[0].rpartition(":")
    with socket.create_connection((host, int(port))) as probe:
        probe.sendall(noise)
    meeting.go(1, lambda: meeting.side(1).as_worker(follow))
    assert meeting.finish() == {0: PLAN, 1: PLAN}


def test_a_worker_that_was_started_again_takes_its_own_place() -> None:
    meeting = Meeting(3)
    meeting.go(0, lambda: meeting.side(0).as_chief(lambda: PLAN, lambda marks: None))
    time.sleep(0.3)
    first = meeting.side(1)
    dead = first._reach_chief(time.monotonic() + 5)
    dead.sendall(
        b'{"worker": 1, "workers": %s, "trains": {"seed": "0"}}\n' % str(list(meeting.addresses)).replace("'", '"').encode()
    )
    time.sleep(0.5)
    dead.close()
    for index in (1, 2):
        meeting.go(index, lambda index=index: meeting.side(index).as_worker(follow))  # type: ignore[misc]
    assert meeting.finish() == dict.fromkeys(range(3), PLAN)


def test_what_the_chief_finds_wrong_is_told_to_all() -> None:
    def refuse() -> Message:
        raise UserError("the folder cannot be written")

    meeting = Meeting(3)
    meeting.go(0, lambda: meeting.side(0).as_chief(refuse, lambda marks: None))
    for index in (1, 2):
        meeting.go(index, lambda index=index: meeting.side(index).as_worker(follow))  # type: ignore[misc]
    ends = meeting.finish()
    assert {str(end) for end in ends.values()} == {"the folder cannot be written"}
    assert {end.exit_code for end in ends.values()} == {ExitCode.USER}


def test_a_worker_that_cannot_follow_ends_all() -> None:
    def refuse(plan: Message) -> None:
        raise UserError("no such checkpoint here")

    meeting = Meeting(3)
    meeting.go(0, lambda: meeting.side(0).as_chief(lambda: PLAN, lambda marks: None))
    meeting.go(1, lambda: meeting.side(1).as_worker(follow))
    meeting.go(2, lambda: meeting.side(2).as_worker(refuse))
    ends = meeting.finish()
    assert str(ends[2]) == "no such checkpoint here"
    assert str(ends[0]) == str(ends[1]) == "worker 2: no such checkpoint here"
    assert {end.exit_code for end in ends.values()} == {ExitCode.USER}
    assert isinstance(ends[1], ToldError)


def test_another_cluster_is_refused() -> None:
    meeting = Meeting(2)
    meeting.go(0, lambda: meeting.side(0).as_chief(lambda: PLAN, lambda marks: None))
    stranger = Rendezvous(Cluster("TF_CONFIG", (meeting.addresses[0], "127.0.0.1:9"), 1), {"seed": "0"}, 10)
    meeting.go(1, lambda: stranger.as_worker(follow))
    ends = meeting.finish()
    line = f"worker 1 is told of other workers than the chief: {meeting.addresses[0]}, 127.0.0.1:9"
    assert str(ends[0]) == str(ends[1]) == line


def test_a_worker_that_dies_while_it_looks_for_the_checkpoint_is_named() -> None:
    meeting = Meeting(2)
    meeting.go(0, lambda: meeting.side(0).as_chief(lambda: PLAN, lambda marks: None))
    time.sleep(0.3)
    line = meeting.side(1)._reach_chief(time.monotonic() + 5)
    line.sendall(
        b'{"worker": 1, "workers": %s, "trains": {"seed": "0"}}\n' % str(list(meeting.addresses)).replace("'", '"').encode()
    )
    line.recv(1000)
    line.close()
    end = meeting.finish()[0]
    assert isinstance(end, PeerLostError)
    assert str(end).startswith("worker 1 went away while starting (")


def test_a_chief_that_dies_while_the_others_wait_is_named() -> None:
    meeting = Meeting(2)
    with taken(int(meeting.addresses[0].rpartition(":")[2])) as chief:
        meeting.go(1, lambda: meeting.side(1).as_worker(follow))
        connection, _ = chief.accept()
        connection.recv(1000)
        connection.close()
    end = meeting.finish()[1]
    assert isinstance(end, PeerLostError)
    assert str(end).startswith("the chief went away while starting (")


def test_a_number_that_no_worker_has_is_refused() -> None:
    meeting = Meeting(2)
    meeting.go(0, lambda: meeting.side(0).as_chief(lambda: PLAN, lambda marks: None))
    time.sleep(0.3)
    line = meeting.side(1)._reach_chief(time.monotonic() + 5)
    line.sendall(meeting.hello(7))
    meeting.go(1, lambda: meeting.side(1).as_worker(follow))
    ends = meeting.finish()
    line.close()
    assert str(ends[0]) == str(ends[1]) == "worker 7 has come, but the chief is told of 2 workers"


def test_what_nobody_foresaw_on_the_chief_ends_the_others_too() -> None:
    def break_down() -> Message:
        raise RuntimeError("never thought of")

    def chief() -> Message:
        with pytest.raises(RuntimeError):
            meeting.side(0).as_chief(break_down, lambda marks: None)
        return PLAN

    meeting = Meeting(2)
    meeting.go(0, chief)
    meeting.go(1, lambda: meeting.side(1).as_worker(follow))
    end = meeting.finish()[1]
    assert (str(end), end.exit_code) == ("the chief failed while starting; its own lines say why", ExitCode.UNEXPECTED)


def test_the_chief_sees_the_marks_of_all() -> None:
    meeting, seen = Meeting(3), []
    meeting.go(0, lambda: meeting.side(0).as_chief(lambda: PLAN, seen.extend))
    for index in (1, 2):
        cluster = Cluster("TF_CONFIG", meeting.addresses, index)
        one = Rendezvous(cluster, {"seed": "0"}, 20, mark=f"mark {index}")
        meeting.go(index, lambda one=one: one.as_worker(follow))  # type: ignore[misc]
    meeting.finish()
    assert sorted(seen) == ["mark 1", "mark 2"]
