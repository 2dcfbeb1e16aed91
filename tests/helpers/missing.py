"""What a test needs beside this checkout: where it is not there, that is a failure in CI, and elsewhere a skip that says why."""

import os
from typing import NoReturn

import pytest


def is_ci() -> bool:
    """Whether every test must run here; GitHub's runners set CI=true, and so does whoever wants the same elsewhere."""
    return os.environ.get("CI", "").lower() in ("1", "true")


def missing(what: str) -> NoReturn:
    """Say in one line what is missing."""
    if is_ci():
        pytest.fail(f"{what}; CI=true asks for every test", pytrace=False)
    pytest.skip(what)
