"""The trainer, ended at a moment that is named and not timed: before the k-th call of one of its functions."""

import json
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.helpers.processes import finish, start_program

_PROGRAM = """
from trainer.startup import load_tensorflow
load_tensorflow()
import importlib, itertools, json, os, signal, threading
from trainer.runtime.preemption import StopSignal

moment = json.loads(os.environ["ENDS_AT"])
owner = importlib.import_module(moment["module"])
*path, name = moment["function"].split(".")
for part in path:
    owner = getattr(owner, part)
whole, calls, heard, note = getattr(owner, name), itertools.count(1), threading.Event(), StopSignal._note
if moment["number"] == signal.SIGHUP:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

def noting(self, name):
    note(self, name)
    heard.set()

def ending(*given, **named):
    if moment["word"] in " ".join(map(str, given)) and next(calls) == moment["call"]:
        os.kill(os.getpid(), moment["number"])
        assert heard.wait(60), "nobody heard the signal"
    return whole(*given, **named)

StopSignal._note = noting
setattr(owner, name, ending)
from trainer.__main__ import main
main()
"""


class Moment(NamedTuple):
    """When a process sends itself a signal.

    Attributes:
        module, function: what is waited for, such as `trainer.runtime.files`, `sync`.
        call: the how manieth call, from 1.
        word: calls count only if this stands in an argument.
        number: SIGKILL ends the process there; one that is answered has been heard before the call goes on.
    """

    module: str
    function: str
    call: int
    word: str = ""
    number: int = signal.SIGKILL


def end_at(moment: Moment, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `trainer ARGUMENTS` until that moment.

    Raises:
        AssertionError: it ended before, or otherwise.
    """
    done = finish(start_program(_PROGRAM, *arguments, ENDS_AT=json.dumps(moment._asdict())))
    asked = moment.number in (signal.SIGTERM, signal.SIGINT)
    assert done.returncode == (143 if asked else -moment.number), (moment, done.returncode, done.stderr)
    return done


_PHOTOGRAPHED = """
from trainer.startup import load_tensorflow
load_tensorflow()
import itertools, os, shutil, sys
from pathlib import Path

folder, states = Path(os.environ["FOLDER"]), Path(os.environ["STATES"])
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
numbers, busy = itertools.count(), False

def photograph():
    global busy
    busy = True
    shutil.copytree(folder, states / f"{next(numbers):04d}")
    busy = False

def before(event, given):
    if busy or not given or not str(given[0]).startswith(f"{folder}/"):
        return
    if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (event == "open" and given[2] & WRITING):
        photograph()

sync = os.fsync
os.fsync = lambda descriptor: (photograph() if not busy and folder.is_dir() else None, sync(descriptor))[1]
sys.addaudithook(before)
from trainer.__main__ import main
main()
"""


def states_of(folder: Path, states: Path, *arguments: str) -> list[Path]:
    """Run `trainer ARGUMENTS` to its end; copies of its folder as a kill before each change, and before each sync, leaves it.

    A killed process takes nothing back and finishes nothing, so what another process sees of its files at a moment is what a
    kill at that moment leaves. A copy that is as the one before is left out.
    """
    done = finish(start_program(_PHOTOGRAPHED, *arguments, FOLDER=str(folder), STATES=str(states)))
    assert done.returncode == 0, done.stderr
    distinct: dict[tuple[tuple[str, bytes], ...], Path] = {}
    for state in sorted(states.iterdir()):
        distinct.setdefault(files_of(state), state)
    return list(distinct.values())


def files_of(folder: Path) -> tuple[tuple[str, bytes], ...]:
    """Each file's path and bytes, but for the lock's."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return tuple((str(path.relative_to(folder)), path.read_bytes()) for path in files)


_RESTORED = """
from trainer.startup import load_tensorflow
load_tensorflow()
import sys
from pathlib import Path
from trainer.config import load_config
from trainer.runtime.preemption import StopSignal
from trainer.runtime.workers import Alone, Watchdog
from trainer.train.actions import Run
from trainer.train.begin import Order, begin
from trainer.train.loop import restore
from trainer.train.state import TrainState

settings, folders = [given[6:] for given in sys.argv[1:] if given.startswith("--set=")], sys.argv[1:]
config, state = load_config(None, settings), None
for folder in (given for given in folders if not given.startswith("--")):
    start = begin(Order(config, Path(folder)))
    strategy = start.build()
    state = state or TrainState(start.config, start.data.specs, strategy)
    stop, watchdog = StopSignal(), Watchdog(60.0, lambda: False)
    run = Run(start.config, start.folder, start.data, state, strategy, Alone(), stop, watchdog)
    if not start.finished:
        restore(run, start.newest)
    run.summaries.close()
"""


def restore_all(folders: list[Path], *settings: str) -> None:
    """Let the trainer take each of these folders up to where it would train on, and no further."""
    done = finish(start_program(_RESTORED, *map(str, folders), *(f"--set={setting}" for setting in settings)))
    assert done.returncode == 0, done.stderr
