"""Defects planted into the protocol are found by the studies: each of them, and by the study named here."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from damage_study import Damage
from failing_calls import FailingCalls
from kills import Kills
from late_process import late
from planted_bugs import BUGS, planted
from power_loss import PowerLoss, after_links, kill_then_crash, one_run, sleep_then_crash, small_plan
from repair_crashes import RepairCrashes
from torture_results import save
from workers import Workers

SEED = 20261122
Study = Callable[[str | None, Path, Workers], list[str]]


def power_loss(bug: str | None, folder: Path, workers: Workers) -> list[str]:
    study = PowerLoss(folder, small_plan(), seed=SEED, stop_at=1)
    with planted(bug):
        one_run(study)
    return study.found.findings


def kill_and_power_loss(bug: str | None, folder: Path, workers: Workers) -> list[str]:
    study = PowerLoss(folder, small_plan(), seed=SEED, stop_at=1)
    with planted(bug):
        kill_then_crash(study, after_links(study))
    return study.found.findings


def sleep_and_power_loss(bug: str | None, folder: Path, workers: Workers) -> list[str]:
    study = PowerLoss(folder, small_plan(), seed=SEED, stop_at=1)
    with planted(bug):
        sleep_then_crash(study, after_links(study, early=True), early=True)
    return study.found.findings


def kills(bug: str | None, folder: Path, workers: Workers) -> list[str]:
    study = Kills(folder, workers, bug=bug)
    with planted(bug):
        total = study.calls()
    for number in range(total - 11, total + 1):
        study.before_call(number)
    return study.found.findings


def late_process(bug: str | None, folder: Path, workers: Workers) -> list[str]:
    before_the_record = ("rename", 6) if bug else ("link", 5)
    return late(folder, workers, before_the_record, longest=9, bug=bug)


def failing_calls(bug: str | None, folder: Path, workers: Workers) -> list[str]:
    study = FailingCalls(folder)
    with planted(bug):
        study.short_writes()
        for number in (3, 10):
            study.error_at("write", number, errno.ENOSPC, begun=False)
            study.error_at("fsync", number, errno.EIO, begun=False)
    return study.findings


def repair_crashes(bug: str | None, folder: Path, workers: Workers) -> list[str]:
    study = RepairCrashes(folder)
    with planted(bug):
        study.study("object flipped")
        study.study("record and object flipped")
    return study.findings


def adoption(bug: str | None, folder: Path, workers: Workers) -> list[str]:
    study = RepairCrashes(folder)
    with planted(bug):
        study.study_adoption()
    return study.findings


def damage(bug: str | None, folder: Path, workers: Workers) -> list[str]:
    study = Damage(folder, shards=2, seed=SEED)
    with planted(bug):
        study.swaps(every=40, whole_every=1)
        study.foreign(sorted((study.path / "shards").iterdir())[:1])
    return study.found.findings


def damage_under_a_reader(bug: str | None, folder: Path, workers: Workers) -> list[str]:
    study = Damage(folder, shards=2, seed=SEED)
    with planted(bug):
        study.under_an_open_reader(40)
    return study.found.findings


CAUGHT_BY: dict[str, Study] = {
    "small files are not synced": power_loss,
    "the files of a shard are not synced": power_loss,
    "directories are not synced": power_loss,
    "links of a dead process are not synced": kill_and_power_loss,
    "links of a sleeping process are not synced": sleep_and_power_loss,
    "rename instead of link for the record": late_process,
    "the record is written in place": kills,
    "the record comes before the data": kills,
    "the seal comes before the last record": kills,
    "a failed sync is tried again": failing_calls,
    "a short write passes for a whole one": failing_calls,
    "a full disk is not told": failing_calls,
    "a directory that is there is trusted": repair_crashes,
    "a seal does not look for its shards": repair_crashes,
    "garbage collection looks for claims last": adoption,
    "what is put back is not synced": adoption,
    "the reader checks no hash": damage,
    "chunks are decoded unchecked": damage_under_a_reader,
    "foreign files are not looked for": damage,
}


def test_every_planted_bug_has_its_study():
    assert set(CAUGHT_BY) == set(BUGS)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(memory, workers, bug):
    findings = CAUGHT_BY[bug](bug, memory, workers)
    print(f"{bug}: {findings[:1]}")
    assert findings


@pytest.mark.parametrize("study", sorted(set(CAUGHT_BY.values()), key=lambda study: study.__name__))
def test_without_a_bug_these_studies_find_nothing(memory, workers, study):
    assert study(None, memory, workers) == []


@pytest.mark.torture
def test_all_planted_bugs(memory, workers):
    started = time.perf_counter()
    caught = {}
    for number, (bug, study) in enumerate(CAUGHT_BY.items()):
        folder = memory / str(number)
        folder.mkdir()
        assert study(bug, folder, workers), bug
        caught[bug] = study.__name__.replace("_", " ")
    save("bugs planted into the protocol", started=started, planted=len(BUGS), caught=len(caught), names=caught)
