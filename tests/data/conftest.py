"""A published data set, which several modules of this folder fetch. TensorFlow is not loaded here."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.helpers.mirror import Server


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from tests.helpers.mirror import facades

    return facades(tmp_path_factory.mktemp("archive"))


@pytest.fixture
def server(archive: bytes) -> "Iterator[Server]":
    from tests.helpers.mirror import serving

    with serving(archive) as served:
        yield served
