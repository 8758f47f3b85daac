"""Tensor parallelism and FSDP2 with two and three gloo processes, against the unsharded float64 reference.

The three processes start once for all cases: see losses_worker.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import losses_worker
import pytest

WORLD = 3
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each process reports, by rank."""
    directory = tmp_path_factory.mktemp("gloo")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).parent / "losses_worker.py")]
    processes = [
        subprocess.Popen([*command, str(rank), str(WORLD), str(directory)], env=environment, stderr=subprocess.PIPE)
        for rank in range(WORLD)
    ]
    errors = []
    try:
        for process in processes:
            errors.append(process.communicate(timeout=240)[1].decode()[-2000:])
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    missing = [rank for rank in range(WORLD) if not (directory / f"{rank}.json").exists()]
    assert not missing, f"processes {missing} left no report: {errors}"
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("case", losses_worker.cases())
def test_equals_one_process(case: str, outcomes: list[dict[str, str | None]]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert case in outcome, f"rank {rank} stopped before this case"
        assert outcome[case] is None, f"rank {rank}: {outcome[case]}"
