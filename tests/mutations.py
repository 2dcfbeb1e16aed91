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
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

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
SECONDS = 600
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
    """What became of a mutant: killed, survived, or not tried."""

    mutant: Mutant
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


def run_tests(folder: Path, tests: list[str]) -> tuple[int, str]:
    """Run some tests in a copy of the project: pytest's exit code, and the end of what it printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:rerunfailures", "-m", MARKS]
    command += [f"--basetemp={folder}/tmp", *tests]
    variables = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return FAILED, f"no end in {SECONDS} s"
    return done.returncode, (done.stdout + done.stderr)[-4000:]


def try_mutant(mutant: Mutant) -> Verdict:
    """Make the mistake in a copy and see whether a test fails."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy_project(Path(folder))
        file = Path(folder) / mutant.file
        file.write_text(file.read_text().replace(mutant.old, mutant.new))
        code, output = run_tests(Path(folder), mutant.tests)
    word = {PASSED: "SURVIVED", FAILED: "killed"}.get(code, "NOT TRIED")
    return Verdict(mutant, word, time.monotonic() - began, output)


def check_baseline(mutants: list[Mutant]) -> bool:
    """Whether all the tests pass where nothing is wrong; else their failures would say nothing."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    with tempfile.TemporaryDirectory(prefix="baseline-") as folder:
        copy_project(Path(folder))
        code, output = run_tests(Path(folder), tests)
    if code != PASSED:
        print(output)
    return code == PASSED


def report(verdicts: list[Verdict]) -> bool:
    """Print the result; whether all were killed."""
    missed = [verdict for verdict in verdicts if verdict.word != "killed"]
    for verdict in missed:
        print(f"\n{verdict.word}: {verdict.mutant.name}\n{verdict.output}")
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
    if options.baseline and not check_baseline(chosen):
        print("the tests fail without a mistake too")
        return 1
    verdicts = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for verdict in pool.map(try_mutant, chosen):
            print(f"{verdict.word:9} {verdict.seconds:6.1f} s  {verdict.mutant.name}", flush=True)
            verdicts.append(verdict)
    return 0 if report(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
