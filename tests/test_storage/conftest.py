"""Fixtures of the storage tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import storage_cases as cases
from workers import Workers

from storage.files.memory import MemoryFiles


@pytest.fixture(scope="session")
def sealed(tmp_path_factory) -> Path:
    """A sealed store of hybrid rows. Read only: copy it before changing anything."""
    path = tmp_path_factory.mktemp("sealed") / "store"
    cases.write_store(path)
    return path


@pytest.fixture(params=["on disk", "in memory"])
def store_at(request, tmp_path) -> Callable[[str], cases.Store]:
    """A function that returns a place for a store by its name: in a directory, or in memory."""
    return (lambda name: tmp_path / name) if request.param == "on disk" else MemoryFiles


@pytest.fixture
def fresh(store_at) -> cases.Store:
    """A place where no store is yet, in a directory or in memory."""
    return store_at("store")


@pytest.fixture
def memory(tmp_path) -> Iterator[Path]:
    """An empty directory, in memory where there is such a file system: studies sync everything a thousand times."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="topk-distill-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """A program that starts worker processes."""
    started = Workers()
    yield started
    started.close()
