"""kill -9 anywhere, one worker or two, then the same command: the tree of an undisturbed run, byte for byte."""

from __future__ import annotations

import random
import time

import pytest
import storage_cases as cases
from kills import FIRST_HITS, ONCE, PER_SHARD, SHARDS, Kills, all_named
from power_loss import BATCH, small_plan
from torture_results import save

import storage.faults

SEED = 20261122


@pytest.fixture
def study(memory, workers) -> Kills:
    return Kills(memory, workers)


def test_every_named_point_is_in_the_list(memory, monkeypatch):
    monkeypatch.setenv(storage.faults.ENVIRONMENT_VARIABLE, "none:1")
    monkeypatch.setattr(storage.faults, "_hits", reached := storage.faults.Counter())
    cases.write_store(memory / "store", small_plan(SHARDS), **BATCH)
    assert set(reached) == {*ONCE, *PER_SHARD}


@pytest.mark.parametrize("together", [False, True], ids=["alone", "two workers"])
def test_killed_at_named_points(study, together):
    faults = random.Random(SEED).sample(FIRST_HITS, 8)
    all_named(study, faults, together=together)
    assert study.found.findings == []
    assert study.found.killed == 8 or together


def test_killed_before_any_call(study):
    for number in random.Random(SEED).sample(range(1, study.calls() + 1), 10):
        study.before_call(number)
    assert study.found.findings == []
    assert study.found.killed == 10


@pytest.mark.parametrize("together", [False, True], ids=["alone", "two workers"])
def test_killed_at_random_moments(study, together):
    rng = random.Random(SEED)
    for _ in range(6):
        study.at_random(rng, together=together)
    assert study.found.findings == []


@pytest.mark.torture
@pytest.mark.parametrize("together", [False, True], ids=["alone", "two workers"])
def test_all_named_points(study, together):
    started = time.perf_counter()
    all_named(study, FIRST_HITS, together=together)
    assert study.found.findings == []
    assert study.found.killed == len(FIRST_HITS) or together
    name = f"kill -9 at every named point, its first three hits, {'two workers' if together else 'one worker'}"
    save(name, started=started, runs=study.found.runs, killed=study.found.killed)


@pytest.mark.torture
def test_before_every_call(study):
    started = time.perf_counter()
    calls = study.calls()
    for number in range(1, calls + 1):
        study.before_call(number)
    assert study.found.findings == []
    assert study.found.killed == calls
    save("kill -9 before every call that changes a file", started=started, runs=calls, killed=study.found.killed)


@pytest.mark.torture
@pytest.mark.parametrize("together", [False, True], ids=["alone", "two workers"])
def test_a_hundred_kills_at_random_moments(study, together):
    started = time.perf_counter()
    rng = random.Random(SEED)
    while study.found.killed < 100:
        study.at_random(rng, together=together)
    assert study.found.findings == []
    name = f"kill -9 at random moments, {'two workers' if together else 'one worker'}"
    save(name, started=started, seed=SEED, runs=study.found.runs, killed=study.found.killed)
