"""Tensor parallelism, placements and FSDP2 with two to four gloo processes, against the unsharded float64 reference.

The processes start once for all cases: see losses_worker.py.
"""

from __future__ import annotations

import json

import losses_worker
import pytest
from warm_process import WarmProcess, wait_for_all

WORLD = 4


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each process reports, by rank."""
    directory = tmp_path_factory.mktemp("gloo")
    told = wait_for_all([WarmProcess(losses_worker.main, rank, WORLD, directory) for rank in range(WORLD)])
    errors = [one.stderr[-2000:] for one in told]
    missing = [rank for rank in range(WORLD) if not (directory / f"{rank}.json").exists()]
    assert not missing, f"processes {missing} left no report: {errors}"
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("case", losses_worker.cases())
def test_equals_one_process(case: str, outcomes: list[dict[str, str | None]]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert case in outcome, f"rank {rank} stopped before this case"
        assert outcome[case] is None, f"rank {rank}: {outcome[case]}"
