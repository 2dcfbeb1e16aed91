"""The workers meet before TensorFlow is told of them, because TensorFlow waits for a missing peer in silence and for ever.

Over one TCP connection for each worker, on the port that the chief's TensorFlow will use a moment later, lines of JSON go to
and fro: a worker says who it is and what it trains; the chief, once all are there, says from which checkpoint the run goes on;
each worker looks for it in its own model folder; and when all have found it, they begin. Whatever is wrong with one of them is
told to all, so that all end with the same line and code.
"""

import json
import logging
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.cluster import Cluster
from trainer.errors import ExitCode, PeerLostError, StoppedError, TrainerError, UserError

log = logging.getLogger(__name__)

SAY_EVERY_SECONDS = 10.0
QUIET_SECONDS = 2.0  # so long nobody need be told who is missing
TELL_SECONDS = 60.0  # how long the chief stays to tell late workers what is wrong
REPLY_SECONDS = 60.0  # a worker looks for a checkpoint in its folder and says what it found
RETRY_SECONDS = 0.2
LONGEST_LINE = 1 << 20

Message = dict[str, Any]


class ToldError(TrainerError):
    """The failure of another worker, told here too."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = ExitCode(exit_code)


class Line:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self.hello: Message = {}
        self._connection = connection
        self._received = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message."""
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> Message:
        """Wait for one message.

        Raises:
            OSError: none came in time, or the other side went away.
            ValueError: what came is no message.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self._received:
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            part = self._connection.recv(1 << 16)
            if not part:
                raise ConnectionResetError("the other side closed the connection")
            self._received += part
            if len(self._received) > LONGEST_LINE:
                raise ValueError("a line without end")
        line, _, self._received = self._received.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("not a message")
        return message

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@dataclass(frozen=True)
class Rendezvous:
    """One meeting.

    Attributes:
        cluster: who is expected.
        trains: what must be the same on every worker, by name: settings, versions, data.
        seconds: how long to wait for all.
        mark: the fingerprint of what this worker trains and on which files, which the chief compares with a recorded failure's.
    """

    cluster: Cluster
    trains: Mapping[str, str]
    seconds: float
    mark: str = ""

    def as_chief(self, prepare: Callable[[], Message], look_at: Callable[[list[str]], None]) -> Message:
        """Wait for all workers, tell them what `prepare` returns, and return it when all agree.

        Args:
            prepare: called before the others come.
            look_at: given the marks of all the others.

        Raises:
            PeerLostError: the port is taken, or a worker did not come in time, or went away.
            TrainerError: what `prepare` or a worker found wrong; all have been told.
        """
        with _listen(self.cluster.workers[0]) as listener:
            lines: dict[int, Line] = {}
            failure: TrainerError | None = TrainerError("the chief failed while starting; its own lines say why")
            try:
                plan = prepare()
                self._gather(listener, lines)
                look_at([line.hello.get("mark", "") for line in lines.values()])
                _to_all(lines, {"plan": plan})
                self._check_answers(lines)
                _to_all(lines, {"go": True})
                failure = None
            except TrainerError as known:
                failure = known
                raise
            finally:
                if failure:
                    self._tell(failure, listener, lines)
                for line in lines.values():
                    line.close()
        return plan

    def _gather(self, listener: socket.socket, lines: dict[int, Line]) -> None:
        deadline, said = time.monotonic() + self.seconds, time.monotonic() - SAY_EVERY_SECONDS + QUIET_SECONDS
        while missing := self._missing(lines):
            now = time.monotonic()
            if now > deadline:
                raise PeerLostError(f"after {self.seconds:.0f} s these workers have not come: {missing}; run all workers again")
            if now - said >= SAY_EVERY_SECONDS:
                log.info("waiting for %s, at most %.0f s more", missing, deadline - now)
                said = now
            self._admit(listener, lines)

    def _missing(self, lines: Mapping[int, Line]) -> str:
        absent = [number for number in range(1, self.cluster.size) if number not in lines]
        return ", ".join(f"worker {number} ({self.cluster.workers[number]})" for number in absent)

    def _admit(self, listener: socket.socket, lines: dict[int, Line]) -> None:
        """Take one connection, if there is one; one that does not speak as a worker does is a probe, and is let go."""
        try:
            connection, address = listener.accept()
        except TimeoutError:
            return
        line = Line(connection)
        try:
            line.hello = line.receive(5.0)
            number = _worker_of(line.hello)
        except (OSError, ValueError, KeyError, TypeError):
            log.info("a connection from %s is not from a worker; it is let go", address[0])
            line.close()
            return
        if number in lines:  # it was started again while the others waited
            lines.pop(number).close()
        lines[number] = line
        self._check_hello(number, line.hello)

    def _check_hello(self, number: int, hello: Message) -> None:
        if not 0 < number < self.cluster.size:
            raise UserError(f"worker {number} has come, but the chief is told of {self.cluster.size} workers")
        if "error" in hello:
            raise ToldError(f"worker {number}: {hello['error']}", hello["exit_code"])
        if list(hello["workers"]) != list(self.cluster.workers):
            raise UserError(f"worker {number} is told of other workers than the chief: {', '.join(hello['workers'])}")
        other = [name for name in {**self.trains, **hello["trains"]} if self.trains.get(name) != hello["trains"].get(name)]
        if other:
            name = other[0]
            raise UserError(
                f"worker {number} runs with other settings than the chief: {name}: {hello['trains'].get(name)} there, "
                f"{self.trains.get(name)} here; start all workers with the same command"
            )

    def _check_answers(self, lines: Mapping[int, Line]) -> None:
        for number, line in lines.items():
            try:
                answer = line.receive(REPLY_SECONDS)
            except (OSError, ValueError) as error:
                raise PeerLostError(f"worker {number} went away while starting ({error}); run all workers again") from error
            if "error" in answer:
                raise ToldError(f"worker {number}: {answer['error']}", answer["exit_code"])

    def _tell(self, failure: TrainerError, listener: socket.socket, lines: dict[int, Line]) -> None:
        """Tell every worker that is there, and those who come in the next seconds."""
        message = {"error": str(failure), "exit_code": int(failure.exit_code)}
        stays = not isinstance(failure, PeerLostError | StoppedError)
        late = time.monotonic() + min(TELL_SECONDS, self.seconds)
        while stays and self._missing(lines) and time.monotonic() < late:
            try:
                self._admit(listener, lines)
            except TrainerError as another:
                log.info("%s", another)
        for number, line in lines.items():
            try:
                line.send(message)
            except OSError:
                log.info("worker %d has gone before it could be told", number)

    def as_worker(self, check: Callable[[Message], None], own_failure: TrainerError | None = None) -> Message:
        """Find the chief, tell it who is here, hear its plan, see whether it can be followed, and wait for the word.

        Args:
            check: given the plan; raises a TrainerError if this worker cannot follow it.
            own_failure: what is wrong here already; the chief is told, and it is raised.

        Raises:
            PeerLostError: the chief did not come in time, or went away.
            TrainerError: what any of the workers found wrong.
        """
        deadline = time.monotonic() + self.seconds
        own_failure = own_failure or _taken(self.cluster.workers[self.cluster.index])
        line = Line(self._reach_chief(deadline))
        try:
            line.send(self._hello(own_failure))
            if own_failure:
                raise own_failure
            plan: Message = _heard(line, deadline - time.monotonic() + REPLY_SECONDS)["plan"]
            try:
                check(plan)
            except TrainerError as failure:
                line.send({"error": str(failure), "exit_code": int(failure.exit_code)})
                raise
            line.send({"ready": True})
            _heard(line, REPLY_SECONDS * 2)
        except OSError as error:
            raise PeerLostError(f"the chief went away while starting ({error}); run all workers again") from error
        finally:
            line.close()
        return plan

    def _hello(self, failure: TrainerError | None) -> Message:
        hello: Message = {"worker": self.cluster.index, "workers": self.cluster.workers, "trains": dict(self.trains)}
        hello["mark"] = self.mark
        return hello | ({"error": str(failure), "exit_code": int(failure.exit_code)} if failure else {})

    def _reach_chief(self, deadline: float) -> socket.socket:
        """Connect, again and again: the chief's name may not even exist yet."""
        chief, said = self.cluster.workers[0], time.monotonic() - SAY_EVERY_SECONDS + QUIET_SECONDS
        host, _, port = chief.rpartition(":")
        while True:
            try:
                return socket.create_connection((host.strip("[]"), int(port)), timeout=5.0)
            except OSError as error:
                now, reason = time.monotonic(), error.strerror or str(error)
                if now > deadline:
                    line = f"after {self.seconds:.0f} s the chief ({chief}) cannot be reached: {reason}; run all workers again"
                    raise PeerLostError(line) from error
                if now - said >= SAY_EVERY_SECONDS:
                    log.info("waiting for the chief (%s: %s), at most %.0f s more", chief, reason, deadline - now)
                    said = now
            time.sleep(RETRY_SECONDS)


def _worker_of(hello: Message) -> int:
    """The number of the worker that says this.

    Raises:
        KeyError, TypeError, ValueError: no worker speaks so.
    """
    dict(hello["trains"]), list(hello["workers"])
    return int(hello["worker"])


def _to_all(lines: Mapping[int, Line], message: Message) -> None:
    for number, line in lines.items():
        try:
            line.send(message)
        except OSError as error:
            raise PeerLostError(f"worker {number} went away while starting ({error}); run all workers again") from error


def _heard(line: Line, seconds: float) -> Message:
    """The chief's next message, unless it tells of a failure."""
    message = line.receive(seconds)
    if "error" in message:
        raise ToldError(message["error"], message["exit_code"])
    return message


def _taken(address: str) -> TrainerError | None:
    """Whether this worker's own port is taken: TensorFlow would find out only after the meeting."""
    try:
        _listen(address).close()
    except PeerLostError as failure:
        return failure
    return None


def _listen(address: str) -> socket.socket:
    port = int(address.rpartition(":")[2])
    listener = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    try:
        listener.bind(("", port))
    except OSError as error:
        listener.close()
        raise PeerLostError(f"port {port}, where this worker is to listen, cannot be used: {error.strerror}") from error
    listener.listen(128)
    listener.settimeout(RETRY_SECONDS)
    return listener
