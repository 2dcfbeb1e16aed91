"""Every test here runs in an empty folder, which must not hold a folder named `gs:` in the end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bucket.fixtures import bucket, bucket_service

__all__ = ["bucket", "bucket_service", "nothing_lands_beside_the_bucket"]


@pytest.fixture(autouse=True)
def nothing_lands_beside_the_bucket(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where a gs:// address is taken for a path, a local folder named `gs:` appears and nothing complains."""
    folder = tmp_path_factory.mktemp("working")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    yield
    assert [path.name for path in folder.rglob("gs*")] == []
