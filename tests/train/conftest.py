"""Runs that several modules of this folder compare with."""

from pathlib import Path

import pytest

from tests.helpers.topologies import Topologies


@pytest.fixture(scope="session")
def topologies(tmp_path_factory: pytest.TempPathFactory, sample_folder: Path) -> Topologies:
    return Topologies(tmp_path_factory.mktemp("topologies"), sample_folder)
