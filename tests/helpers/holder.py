"""Another process that holds a run's folder, as one that trains in it does."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.helpers.processes import start_program

PROGRAM = """
import signal, sys
from pathlib import Path
from trainer.runtime.run_folder import RunFolder
claimed = RunFolder(Path(sys.argv[1])).claim()
print("claimed", claimed.token, flush=True)
signal.pause()
"""


class Holder(NamedTuple):
    """The process, and the token of its claim."""

    process: subprocess.Popen[str]
    token: str


@contextmanager
def held_by_another(folder: Path) -> Iterator[Holder]:
    """A process that has claimed a run's folder, until it is killed or the block ends."""
    process = start_program(PROGRAM, str(folder))
    try:
        assert process.stdout is not None
        word, token = process.stdout.readline().split()
        assert word == "claimed"
        yield Holder(process, token)
    finally:
        process.kill()
        process.communicate()
