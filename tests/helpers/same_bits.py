"""Whether a run that is forked from the warm parent is, bit for bit, a run that a new interpreter makes.

    python -m tests.helpers.same_bits [COUNT]

makes one cold run and COUNT forked ones (20 by default), and says how many of these are equal to it.
"""

import sys
import tempfile
from pathlib import Path

from tests.helpers.processes import run_trainer
from tests.helpers.runs import contents, short


def bits_of(folder: Path, *, cold: bool) -> dict[str, bytes]:
    """What a short run in this folder leaves."""
    done = run_trainer(*short(folder), cold=cold)
    assert done.returncode == 0, done.stderr
    return contents(folder)


def count_equal(folder: Path, count: int) -> int:
    """How many of so many forked runs leave the same bits as a cold one."""
    cold = bits_of(folder / "cold", cold=True)
    return sum(bits_of(folder / f"forked-{number}", cold=False) == cold for number in range(count))


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        equal = count_equal(Path(folder), count)
    print(f"{equal} of {count} forked runs left the same bits as a cold one")
    return int(equal != count)


if __name__ == "__main__":
    sys.exit(main())
