"""kill -9 at every named point, then the same command: the tree of an uninterrupted run, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import storage_cases as cases

from storage.faults import ENVIRONMENT_VARIABLE
from storage.verify import verify

HERE = Path(__file__).parent
ONCE = ("plan-link", "plan-linked", "seal-link", "seal-linked")
PER_SHARD = ("encode", "encoded", "shard-rename", "shard-renamed", "record-write", "record-link", "record-linked")
POINTS = [
    *(f"{name}:1" for name in ONCE),
    *(f"{name}:{number}" for name in PER_SHARD for number in (1, 3)),
    *(f"shard-write:{number}" for number in (1, 20, 90)),
]


def run(path: Path, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
    if fault is not None:
        environment[ENVIRONMENT_VARIABLE] = fault
    command = [sys.executable, str(HERE / "write_store_process.py"), str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("fault", POINTS)
def test_kill_and_run_again(tmp_path, sealed, fault):
    path = tmp_path / "store"
    killed = run(path, fault)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert f"fault point {fault} reached" in killed.stderr
    if (path / "plan.json").exists():
        assert verify(path).problems == []
    cases.write_store(path)
    assert cases.tree(path) == cases.tree(sealed)
    assert verify(path).problems == []
