"""Runs that several modules of this folder compare with."""

from pathlib import Path

import pytest

from tests.conftest import Shared
from tests.helpers.topologies import Topologies


@pytest.fixture(scope="session")
def topologies(tmp_path_factory: pytest.TempPathFactory, sample_folder: Path) -> Topologies:
    return Topologies(tmp_path_factory.mktemp("topologies"), sample_folder)


@pytest.fixture(scope="session")
def run_of_two(shared: Shared, sample_folder: Path) -> Path:
    """What two workers leave that nothing disturbs; leave it as it is."""

    def make(folder: Path) -> None:
        from tests.helpers.runs import short
        from tests.helpers.workers import Workers

        workers = Workers(folder.with_name("logs of two"), *short(folder), f"--data_dir={sample_folder}")
        assert workers.codes() == {0: 0, 1: 0}, workers.log(0)

    return shared("run of two", make)
