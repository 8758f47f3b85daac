"""Fixtures of the storage tests. Test modules import `storage_cases`, so its folder goes on the path here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import storage_cases as cases


@pytest.fixture(scope="session")
def sealed(tmp_path_factory) -> Path:
    """A sealed store of hybrid rows. Read only: copy it before changing anything."""
    path = tmp_path_factory.mktemp("sealed") / "store"
    cases.write_store(path)
    return path
