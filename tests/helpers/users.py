"""A user without rights, and a folder that he can reach."""

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534
# Who writes in `TRAINER_AS_NOBODY`, a program for `start_program`, and that user's group.
ME, MY_GROUP = (NOBODY, NOBODY) if os.getuid() == 0 else (os.getuid(), os.getgid())
TRAINER_AS_NOBODY = """
from tests.helpers.users import become_nobody
become_nobody()
from trainer.__main__ import main
main()
"""
_PR_SET_KEEPCAPS, _CAP_DAC_READ_SEARCH, _CAPABILITY_VERSION = 8, 2, 0x20080522


def become_nobody() -> None:
    """Let this process write only where user 65534 may. It reads everything, as Python itself may lie in somebody's home.

    Where the tests do not run as root there is nothing to give up.
    """
    if os.getuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    kept = 1 << _CAP_DAC_READ_SEARCH
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")


@contextmanager
def folder_for_everybody() -> Iterator[Path]:
    """A folder that every user can reach and read, as those that pytest gives cannot be."""
    with tempfile.TemporaryDirectory(prefix="trainer-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
