"""A repair that is cut off at any moment, then extraction, or repair and extraction: never a damaged commit."""

from __future__ import annotations

import time

import pytest
from repair_crashes import DAMAGES, RepairCrashes
from torture_results import save


@pytest.mark.parametrize("damage", ["object flipped", "record and object flipped", "remap flipped"])
def test_some_damages(memory, damage):
    study = RepairCrashes(memory)
    study.study(damage)
    assert study.findings == []
    assert len(study.states) > 2


def test_garbage(memory):
    study = RepairCrashes(memory)
    study.study_garbage()
    assert study.findings == []
    assert len(study.states) > 2


def test_garbage_that_is_committed_meanwhile(memory):
    study = RepairCrashes(memory)
    study.study_adoption()
    assert study.findings == []
    assert len(study.states) > 2


@pytest.mark.torture
def test_all_damages(memory):
    started = time.perf_counter()
    study = RepairCrashes(memory)
    for damage in DAMAGES:
        study.study(damage)
        print(f"{damage}: {len(study.states)} trees so far", flush=True)
    study.study_garbage()
    study.study_adoption()
    assert study.findings == []
    save(
        "power loss at every moment of a repair, and of a garbage collection",
        started=started,
        damages=len(DAMAGES),
        distinct_trees=len(study.states),
    )
