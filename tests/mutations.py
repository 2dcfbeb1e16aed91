"""Mistakes made on purpose, one at a time: for each, the tests that must notice.

    python -m tests.mutations [NAME ...] [--jobs=2] [--baseline]

`tests/mutants/*.yaml` lists them: a name, a file, the text that stands there once, what takes its place, and tests. Each is made
in a copy of the project, where its tests are run. One that they let pass is a survivor, and a hole in the tests.

    - name: adam_epsilon_of_keras
      file: trainer/train/optimizer.py
      old: "EPSILON = 1e-8"
      new: "EPSILON = 1e-7"
      tests: [tests/train/test_optimizer.py]
"""

import argparse
import contextlib
import gc
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MUTANTS = ROOT / "tests" / "mutants"
COPIED = (
    "trainer",
    "tests",
    "configs",
    "deploy",
    "docker",
    "docs",
    "benchmarks",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "Makefile",
)
MARKS = "not container"
SECONDS = 600.0
BASELINE_SECONDS = 3600.0
PASSED, FAILED = 0, 1  # pytest's exit codes; all others say that nothing was tried


class Mutant(NamedTuple):
    """One mistake.

    Attributes:
        name: unique, a few words that say what is wrong.
        file: below the project's folder.
        old: text that stands in the file exactly once.
        new: what takes its place.
        tests: what pytest is given; at least one of them must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: list[str]


class Verdict(NamedTuple):
    """What became of a mutant (None: of the project as it is): killed, survived, or not tried."""

    mutant: Mutant | None
    word: str
    seconds: float
    output: str


def read_mutants(folder: Path = MUTANTS) -> list[Mutant]:
    """Every mutant, in the order of the files.

    Raises:
        ValueError: a name stands twice, or the text of one does not stand in its file exactly once.
    """
    mutants = [Mutant(**entry) for file in sorted(folder.glob("*.yaml")) for entry in yaml.safe_load(file.read_text()) or []]
    names = [mutant.name for mutant in mutants]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"mutants of the same name: {', '.join(sorted(repeated))}")
    stale = [mutant.name for mutant in mutants if (ROOT / mutant.file).read_text().count(mutant.old) != 1]
    if stale:
        raise ValueError(f"the old text does not stand in the file exactly once: {', '.join(stale)}")
    return mutants


def copy_project(to: Path) -> None:
    """All that tests need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)


def import_libraries() -> None:
    """Import once what every copy's tests need and no mistake changes, so that children forked from here begin at once."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    for name in (
        "tensorflow",
        "keras",
        "numpy",
        "PIL.Image",
        "pydantic",
        "google.cloud.storage",
        "skimage.metrics",
        "scipy.stats",
    ):
        importlib.import_module(name)
    gc.freeze()


class Trial:
    """The tests of one copy of the project, in a process forked from this one."""

    def __init__(self, mutant: Mutant | None, tests: list[str], limit: float = SECONDS) -> None:
        self.mutant, self._limit, self._began = mutant, limit, time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="mutant-")
        folder = Path(self._folder.name)
        copy_project(folder)
        if mutant:
            file = folder / mutant.file
            file.write_text(file.read_text().replace(mutant.old, mutant.new))
        self._output = folder / "output.txt"
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            self._become(folder, tests)

    def _become(self, folder: Path, tests: list[str]) -> NoReturn:
        """Be pytest in that folder, whose modules go before all others."""
        os.setsid()
        output = os.open(self._output, os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "trainer")]:
            del sys.modules[name]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:rerunfailures", "-m", MARKS, f"--basetemp={folder}/tmp"]
        code = 70
        try:
            code = int(pytest.main([*options, *tests]))
        finally:
            sys.stdout.flush()
            os._exit(code)

    def verdict(self) -> Verdict | None:
        """How it ended; None while it runs."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        seconds = time.monotonic() - self._began
        if pid == 0 and seconds < self._limit:
            return None
        code = os.waitstatus_to_exitcode(status) if pid else FAILED
        with contextlib.suppress(ProcessLookupError):  # what it left running
            os.killpg(self._pid, signal.SIGKILL)
        if pid == 0:
            os.waitpid(self._pid, 0)
        output = self._output.read_text(errors="replace")[-4000:]
        self._folder.cleanup()
        word = {PASSED: "SURVIVED", FAILED: "killed"}.get(code, "NOT TRIED") if pid else "hung"
        return Verdict(self.mutant, word, seconds, output)


def try_all(mutants: list[Mutant], jobs: int) -> Iterator[Verdict]:
    """Make each mistake in a copy and see whether a test fails; so many at a time."""
    waiting, running = list(reversed(mutants)), []
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running.append(Trial(mutant, mutant.tests))
        time.sleep(0.05)
        for trial in list(running):
            if verdict := trial.verdict():
                running.remove(trial)
                yield verdict


def check_baseline(mutants: list[Mutant]) -> bool:
    """Whether all the tests pass where nothing is wrong; else their failures would say nothing."""
    trial = Trial(None, sorted({test for mutant in mutants for test in mutant.tests}), BASELINE_SECONDS)
    while not (verdict := trial.verdict()):
        time.sleep(0.05)
    if verdict.word != "SURVIVED":
        print(verdict.output)
    return verdict.word == "SURVIVED"


def report(verdicts: list[Verdict]) -> bool:
    """Print the result; whether all were killed."""
    missed = [verdict for verdict in verdicts if verdict.word != "killed"]
    for verdict in missed:
        print(f"\n{verdict.word}: {verdict.mutant}\n{verdict.output}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    day = datetime.now(UTC).date().isoformat()
    print(f"\n{day}, commit {commit.stdout.strip()}: {len(verdicts) - len(missed)} of {len(verdicts)} mutants killed")
    return not missed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutants; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="mutants that are tried at a time")
    parser.add_argument("--baseline", action="store_true", help="first run all their tests without a mistake")
    options = parser.parse_args()
    mutants = read_mutants()
    if unknown := set(options.names) - {mutant.name for mutant in mutants}:
        parser.error(f"no such mutants: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in mutants if not options.names or mutant.name in options.names]
    import_libraries()
    if options.baseline and not check_baseline(chosen):
        print("the tests fail without a mistake too")
        return 1
    verdicts = []
    for verdict in try_all(chosen, options.jobs):
        print(f"{verdict.word:9} {verdict.seconds:6.1f} s  {verdict.mutant.name}", flush=True)
        verdicts.append(verdict)
    return 0 if report(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
