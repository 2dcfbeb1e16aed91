"""Fixtures for tests that need a bucket: the service for the session, and a fresh bucket for every test."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.bucket.service import BucketService


@pytest.fixture(scope="session")
def bucket_service() -> Iterator[BucketService]:
    """The service, and the environment that leads google-cloud-storage to it, in this process and in its children."""
    with BucketService() as service, pytest.MonkeyPatch.context() as patch:
        for name, value in service.environment.items():
            patch.setenv(name, value)
        yield service


@pytest.fixture
def empty_working_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in that ends without a folder named `gs:`: there one appears where an address is taken for a path."""
    folder = tmp_path_factory.mktemp("working")
    monkeypatch.chdir(folder)
    yield folder
    assert [path.name for path in folder.rglob("gs*")] == []


@pytest.fixture
def bucket(bucket_service: BucketService, empty_working_folder: Path) -> Iterator[str]:
    """The URL of an empty bucket; whatever the test orders of the service ends with it."""
    bucket_service.clear()
    url = bucket_service.bucket(f"b-{uuid.uuid4()}")
    yield url
    bucket_service.clear()
    bucket_service.drop(url)
