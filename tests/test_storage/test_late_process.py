"""Processes that sleep through another one's work, and eight on one store."""

from __future__ import annotations

import time

import pytest
from late_process import STOPS, at_once, late
from torture_results import save


@pytest.mark.parametrize("longest", [6, 9], ids=["the same content", "other content"])
@pytest.mark.parametrize("stop", STOPS, ids=[f"{name} {number}" for name, number in STOPS])
def test_a_late_process_changes_nothing(memory, workers, stop, longest):
    assert late(memory, workers, stop, longest=longest) == []


@pytest.mark.parametrize("claims", [False, True], ids=["no claims", "claims"])
def test_eight_processes(memory, workers, claims):
    assert at_once(memory, workers, processes=8, shards=4, claims=claims) == []


@pytest.mark.torture
def test_eight_processes_many_times(memory, workers):
    started = time.perf_counter()
    for number in range(40):
        assert at_once(memory, workers, processes=8, shards=6, claims=number % 2 == 0) == []
    save("eight processes on one store, with and without claims", started=started, runs=40, shards=6)
    started = time.perf_counter()
    for number in range(5):
        for stop in STOPS:
            assert late(memory, workers, stop, longest=6 + number) == []
    save("a process stopped before a link or rename that wakes up late", started=started, runs=5 * len(STOPS))
