"""What is forked from the warm parent is a process like any other."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import (
    READ_AT_IMPORT,
    ROOT,
    Forked,
    children,
    finish,
    is_running,
    run_trainer,
    start_module,
    start_program,
)
from tests.helpers.same_bits import count_equal
from tests.helpers.waiting import wait_until

ABOUT_ITSELF = """
import json, os, sys
print(json.dumps({
    "parent": os.getppid(), "argv": sys.argv, "name": __name__, "folder": os.getcwd(), "stdin": sys.stdin.read(),
    "variables": dict(os.environ), "tensorflow": "tensorflow" in sys.modules,
    "open": sorted(int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")),
}))
print("to stderr", file=sys.stderr)
"""


def about(*arguments: str, cold: bool = False, **environment: str) -> dict[str, object]:
    done = finish(start_program(ABOUT_ITSELF, *arguments, cold=cold, **environment))
    assert (done.returncode, done.stderr) == (0, "to stderr\n")
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_forked_process_differs_from_a_cold_one_in_nothing_but_what_is_loaded() -> None:
    forked, cold = (about("--one", "two words", cold=cold, SOME="thing") for cold in (False, True))
    assert (forked.pop("tensorflow"), cold.pop("tensorflow")) == (True, False)
    assert forked == cold
    assert forked["parent"] == os.getpid()
    assert forked["argv"] == ["-c", "--one", "two words"]
    assert forked["folder"] == str(Path.cwd())
    assert forked["stdin"] == ""
    assert isinstance(forked["open"], list)
    assert set(forked["open"]) <= {0, 1, 2, 3}, "3 is the folder that it lists"


def test_its_variables_are_those_of_its_start_and_not_of_the_warm_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMES_LATER", "1")
    found = about(GIVEN="2")["variables"]
    monkeypatch.delenv("COMES_LATER")
    later = about()["variables"]
    assert isinstance(found, dict)
    assert isinstance(later, dict)
    assert (found["COMES_LATER"], found["GIVEN"]) == ("1", "2")
    assert {"COMES_LATER", "GIVEN"} & later.keys() == set()


def test_it_starts_where_its_parent_is_at_that_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert about()["folder"] == str(tmp_path)


@pytest.mark.parametrize("cold", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("pass", 0),
        ("import sys; sys.exit()", 0),
        ("import sys; sys.exit(7)", 7),
        ("import sys; sys.exit('a message')", 1),
        ("raise ValueError('nobody foresaw this')", 1),
        ("import os; os._exit(5)", 5),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os; os.abort()", -signal.SIGABRT),
    ],
)
def test_its_exit_code_is_the_interpreters(text: str, code: int, cold: bool) -> None:
    process = start_program(text, cold=cold)
    assert isinstance(process, Forked) is not cold
    done = finish(process)
    assert done.returncode == code
    assert ("nobody foresaw this" in done.stderr) == ("nobody foresaw this" in text)


def test_what_it_prints_without_a_line_end_arrives() -> None:
    done = finish(start_program("import sys; print('out', end=''); print('err', end='', file=sys.stderr)"))
    assert (done.stdout, done.stderr) == ("out", "err")
    merged = finish(start_program("import sys; print('err', file=sys.stderr); print('out')", merged=True))
    assert (merged.stdout, merged.stderr) == ("err\nout\n", None)


WAITS = "import time; print('here', flush=True); time.sleep(600)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signals_reach_it_and_nobody_else(number: signal.Signals) -> None:
    process, other = start_program(WAITS), start_program(WAITS)
    for one in (process, other):
        assert one.stdout is not None
        assert one.stdout.readline() == "here\n"
    process.send_signal(number)
    done = finish(process)
    assert done.returncode == (1 if number == signal.SIGINT else -number), "KeyboardInterrupt ends with a traceback here"
    assert other.poll() is None
    other.kill()
    assert finish(other).returncode == -signal.SIGKILL


def test_a_signal_that_its_parent_ignores_it_ignores_too() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = finish(start_program("import os, signal; os.kill(os.getpid(), signal.SIGINT); print('still here')"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stdout) == (0, "still here\n")


def test_no_zombie_and_no_orphan_is_left() -> None:
    finish(start_program("pass"))  # the warm parent itself is a child, and stays
    before = children()
    running = [start_program(WAITS) for _ in range(3)]
    assert children() == before | {one.pid for one in running}
    for one in running:
        one.kill()
        finish(one)
    assert children() == before


GRANDCHILD = """
import os, time
if os.fork():
    os._exit(0)
print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_an_orphan_of_a_forked_process_is_not_ours() -> None:
    """This process takes orphans in only while a fork is made; else those of the trainer would never show."""
    process = start_program(GRANDCHILD)
    assert process.stdout is not None
    orphan = int(process.stdout.readline())
    assert process.wait(30) == 0
    assert orphan not in children()
    os.kill(orphan, signal.SIGKILL)
    finish(process)


TESTS_THAT_ARE_KILLED = """
import os, signal
from tests.helpers.processes import children, finish, start_program
finish(start_program("pass"))
print(*children(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_the_warm_parent_ends_with_its_tests() -> None:
    """Even where they are killed."""
    process = subprocess.Popen([sys.executable, "-c", TESTS_THAT_ARE_KILLED], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    (warm,) = map(int, process.stdout.readline().split())
    finish(process)
    wait_until(lambda: not is_running(warm))


@pytest.mark.parametrize("variable", ["PYTHONWARNINGS", "TF_CPP_MIN_LOG_LEVEL", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"])
def test_a_variable_that_is_read_at_import_makes_it_cold(variable: str) -> None:
    assert variable.startswith(READ_AT_IMPORT)
    process = start_program("import sys; print('tensorflow' in sys.modules)", **{variable: "1"})
    assert not isinstance(process, Forked)
    assert finish(process).stdout == "False\n"


def test_modules_are_run_from_their_beginning() -> None:
    """Though the warm parent has imported them."""
    for _ in range(2):
        done = run_trainer("--model_dir=/nowhere", "--set=train.steps=none")
        assert done.returncode == 2
        assert done.stderr.startswith("trainer: --set train.steps=none: ")
    assert isinstance(process := start_module("trainer", "--help"), Forked)
    assert finish(process).stdout.startswith("usage") or process.returncode == 0


@pytest.mark.slow
def test_a_forked_run_leaves_the_bits_of_a_cold_one(tmp_path: Path) -> None:
    assert count_equal(tmp_path, 1) == 1
