"""Power loss at any moment: whatever POSIX lets survive, nothing reported is lost and the same run mends the rest."""

from __future__ import annotations

import random
import time

import pytest
from disk_model import Disk, File, Folder, exhaustive
from power_loss import (
    PowerLoss,
    after_links,
    all_calls,
    crash_twice,
    kill_then_crash,
    one_run,
    sleep_then_crash,
    small_plan,
)
from torture_results import save

SEED = 20261122
STATES = 2500


@pytest.fixture
def study(memory) -> PowerLoss:
    return PowerLoss(memory, small_plan(), seed=SEED)


def test_the_model_of_a_file():
    file = File(b"abcd", 2)
    options = iter([0, 1, 2, 3, 1, 0, 3, 1, 1])
    survivors = [file.survivor(lambda count: next(options)) for _ in range(5)]
    assert survivors == [b"abcd", b"ab", b"ab\0\0", b"abc", b"abc\0"]
    assert File(b"abcd", 4).survivor(lambda count: pytest.fail("nothing is open")) == b"abcd"


def test_the_model_of_a_directory():
    disk = Disk({"a": b"1", "d": None})
    for operation in [("rename", "a", "d/b"), ("open", "c"), ("write", "c", b"x")]:
        disk.apply(operation)
    trees, complete = exhaustive(disk, 100)
    assert complete
    assert {frozenset(tree) - {"d"} for tree in trees} == {
        frozenset(names)
        for names in ([], ["a"], ["d/b"], ["a", "d/b"], ["c"], ["a", "c"], ["d/b", "c"], ["a", "d/b", "c"])
    }
    for path in (".", "d", "c"):
        disk.apply(("fsync", path))
    assert [set(tree) for tree in exhaustive(disk, 100)[0]] == [{"d", "d/b", "c"}]
    assert isinstance(disk.node("d"), Folder)


def test_every_tree_outside_of_tmp(study):
    one_run(study)
    assert study.found.findings == []
    assert study.found.complete
    assert len(study.found.outside) > 15


def test_trees_with_what_is_in_tmp(study):
    log = study.record(Disk())
    study.crash(log, Disk(), at=random.Random(SEED).sample(range(len(log)), 60), samples=2)
    assert study.found.findings == []
    assert len(study.found.states) > 60


def test_a_second_process_and_then_a_crash(study):
    """Right after each link, when one process has made what another builds on, and nobody has synced it."""
    kill_then_crash(study, after_links(study))
    sleep_then_crash(study, after_links(study), early=False)
    sleep_then_crash(study, after_links(study, early=True), early=True)
    assert study.found.findings == []


@pytest.mark.torture
def test_all_trees_of_one_run(study):
    started = time.perf_counter()
    trees = one_run(study)
    log = study.record(Disk())
    while len(study.found.states) < STATES:
        study.crash(log, Disk(), samples=2)
        print(f"{len(study.found.states)} trees", flush=True)
    assert study.found.findings == []
    assert study.found.complete
    states, outside = len(study.found.states), len(study.found.outside)
    save("power loss at every moment of writing one shard, plan and seal", started=started, seed=SEED,
         moments=len(log), distinct_trees=states, outside_of_tmp=outside, all_outside_of_tmp="yes")  # fmt: skip
    started = time.perf_counter()
    crash_twice(study, trees)
    assert study.found.findings == []
    save("power loss, the same run, power loss at every moment of that", started=started, first_trees=len(trees))


@pytest.mark.torture
@pytest.mark.parametrize("what", ["kill", "sleep", "sleep early"])
def test_all_moments_of_two_processes(study, what):
    started = time.perf_counter()
    moments = range(1, len(all_calls(study, early=what == "sleep early")) + 1)
    if what == "kill":
        kill_then_crash(study, moments)
        name = "kill -9 before any call, another process, power loss at every moment of that"
    else:
        sleep_then_crash(study, moments, early=what == "sleep early")
        opened = "has opened the store before" if what == "sleep early" else "opens the store then"
        name = f"a process sleeps before any call, another that {opened} does the rest, power loss at every moment"
    assert study.found.findings == []
    assert study.found.complete
    save(name, started=started, kills_or_sleeps=len(moments), distinct_trees=len(study.found.states))
