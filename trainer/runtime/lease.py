"""One writer for a run in a bucket: an object that says who trains there, renewed while that process lives.

A lease that is not renewed expires, by the service's clock. That alone would not keep out a writer that was asleep while its
lease expired. So every write that decides anything (the list of checkpoints, the metrics) is made under the condition that the
object is still of the generation that this writer left there, and taking a run over changes those generations.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from google.api_core.exceptions import PreconditionFailed

from trainer.errors import BucketAwayError, BucketRefusedError, TrainerError, UserError
from trainer.storage.bucket import PROBES, BucketPath, State
from trainer.storage.service import Patience

log = logging.getLogger(__name__)
EXPIRES_SECONDS = 60.0
BEAT_SECONDS = 10.0
LOOK_SECONDS = 3.0
_BOOT, _NUMBERS = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


class LostClaimError(TrainerError):
    """Another process has taken the run over; whatever this one still does there would be refused."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lease.

    Attributes:
        job: the scheduler's name for the job; another try of it may take over at once. Empty where there is no scheduler.
        host: this machine since it was started, and the space of process numbers in it: a container has its own.
        pid, started: the process, and when it began, in the kernel's ticks: a number alone may be given to another process.
    """

    job: str
    host: str
    pid: int
    started: str

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host.partition('/')[0]}"


def _started(pid: int) -> str:
    """When a process of this machine began, in ticks since the machine did (proc(5), field 22); empty if there is none alive."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):  # the second: it ended between opening and reading
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _answer_seconds() -> float:
    """How long one request about the lease is tried: until the next would be due, or as long as the config has patience."""
    return min(BEAT_SECONDS, Patience.seconds)


def this_process(job: str = "") -> Owner:
    """The owner that this process would be."""
    boot = _BOOT.read_text().strip() if _BOOT.is_file() else ""
    numbers = str(_NUMBERS.readlink()) if _NUMBERS.exists() else ""
    return Owner(job, f"{socket.gethostname()}/{boot}/{numbers}", os.getpid(), _started(os.getpid()))


class Lease:
    """The claim on one run's folder in a bucket."""

    def __init__(self, place: BucketPath, owner: Owner) -> None:
        self._place, self._owner = place, owner
        self.token = secrets.token_hex(8)
        self._beats = 0
        self._generation = 0
        self._lost = ""
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> "Lease":
        """Take the lease, when it is free, expired, or held by an earlier try of the same job.

        Raises:
            UserError: another process holds it and is alive.
        """
        seen: State | None = None
        while not self._try(seen := self._look(seen)):
            time.sleep(LOOK_SECONDS)
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        _HELD.append(self)
        return self

    def check(self) -> None:
        """Whether it is still ours, as far as is known.

        Raises:
            LostClaimError: somebody else has taken it.
        """
        if self._lost:
            raise LostClaimError(self._lost)

    def confirm(self) -> None:
        """Renew it now; for what is about to be written without a condition of its own.

        Raises:
            LostClaimError: somebody else has taken it.
            BucketAwayError: nobody can tell.
        """
        self.check()
        with self._lock:
            try:
                self._generation = self._place.write_bytes(self._content(), self._generation, _answer_seconds()).generation
            except PreconditionFailed as error:
                if not self._is_ours_still():
                    raise self.lose(self._place) from error

    def _is_ours_still(self) -> bool:
        """Whether the lease bears our token: then a renewal of ours was written whose answer never came."""
        content, generation = self._place.read_versioned(_answer_seconds())
        if self.token not in content.decode(errors="replace"):
            return False
        self._generation = generation
        return True

    def release(self) -> None:
        """Give it up, so that the next process need not wait."""
        self._done.set()
        if self._thread:
            self._thread.join(2 * BEAT_SECONDS)
        if self._lost or (self._thread and self._thread.is_alive()):
            return
        try:
            if self._is_ours_still():
                self._place.unlink_if(self._generation, _answer_seconds())
        except (PreconditionFailed, FileNotFoundError):
            log.warning("%s: was taken over while this process ended", self._place)
        except (BucketAwayError, BucketRefusedError) as error:
            log.warning("%s: could not be given back, and expires in %.0f s: %s", self._place, EXPIRES_SECONDS, error)

    def lose(self, place: BucketPath) -> LostClaimError:
        """Note that a write was refused because of somebody else's; the error to raise."""
        self._lost = (
            self._lost or f"{place}: another process has taken this run over; this one has written nothing since, and stops"
        )
        return LostClaimError(self._lost)

    # -- inside

    def _look(self, before: State | None) -> State | None:
        """The lease as it is; None if it may be taken.

        Raises:
            UserError: its holder is alive.
        """
        state = self._place.state()
        if state is None or self._is_over(state):
            self._generation = state.generation if state else 0
            return None
        if before is not None and state.generation != before.generation:
            raise UserError(f"{self._place.parent}: {self._holder()} is training in it; stop it or choose another --model_dir")
        if before is None:
            log.warning("%s: held by %s; waiting to see whether it is alive", self._place, self._holder())
        return state

    def _try(self, state: State | None) -> bool:
        """Write our name there, unless somebody else was faster."""
        if state is not None:
            return False
        try:
            self._generation = self._place.write_bytes(self._content(), self._generation).generation
        except PreconditionFailed:
            return False
        return True

    def _is_over(self, state: State) -> bool:
        holder = self._holder()
        if holder is None or (holder.job and holder.job == self._owner.job):
            return True
        if holder.host == self._owner.host and _started(holder.pid) != holder.started:
            return True
        return (self._service_time() - state.updated).total_seconds() > EXPIRES_SECONDS

    def _holder(self) -> Owner | None:
        try:
            document = json.loads(self._place.read_text())
            return Owner(**document["owner"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            log.warning("%s: cannot be read as a lease; it is taken", self._place)
            return None

    def _service_time(self) -> datetime:
        """What the service's clock says: an object that is written now bears it."""
        clock = self._place.with_name(f"{PROBES[1]}{self.token}")
        now = clock.write_bytes(b"").updated
        clock.unlink(missing_ok=True)
        return now

    def _content(self) -> bytes:
        self._beats += 1
        return json.dumps({"owner": asdict(self._owner), "token": self.token, "beat": self._beats}).encode()

    def _renew(self) -> None:
        """The thread: write it anew now and then; a bucket that is away is no reason to stop, the next writer is fenced off."""
        away = False
        while not self._done.wait(BEAT_SECONDS):
            try:
                self.confirm()
                away = False
            except LostClaimError as error:
                log.error("%s", error)
                return
            except TrainerError as error:
                if not away:
                    log.warning("%s: could not be renewed: %s; trying on", self._place, error)
                away = True


_HELD: list[Lease] = []


def release_all() -> None:
    """Give up what this process holds."""
    while _HELD:
        _HELD.pop().release()
