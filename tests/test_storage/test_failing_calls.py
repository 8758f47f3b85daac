"""No space, input/output errors, failed syncs, read-only: the designed exit code, committed shards untouched."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import storage_cases as cases
from failing_calls import CODES, FailingCalls
from power_loss import BATCH, small_plan
from row_check import fingerprints, read_store
from torture_results import save

import storage.files.local
from storage.errors import StorageUnavailableError
from storage.tools.verify import verify

SEED = 20261122
HERE = Path(__file__).parent


@pytest.fixture
def study(memory) -> FailingCalls:
    return FailingCalls(memory)


def test_errors_at_sampled_calls(study):
    rng = random.Random(SEED)
    calls = study.calls()
    assert set(calls) == {"mkdir", "open", "write", "fsync", "link", "unlink", "rename", "rmtree"}
    for function, count in calls.items():
        for code in (errno.ENOSPC, errno.EIO):
            for number in {1, count, *rng.sample(range(1, count + 1), min(count, 4))}:
                study.error_at(function, number, code, begun=False)
    assert study.findings == []
    assert study.failures > 60


def test_a_disk_that_fills_up(study):
    for room in random.Random(SEED).sample(range(12_000), 12):
        study.full_disk(room)
    assert study.findings == []
    assert study.failures > 8


def test_writes_that_take_only_a_part(study):
    study.short_writes()
    assert study.findings == []


def test_real_disks_that_are_too_small_or_read_only(memory):
    """Where the system allows no mounts in a namespace of one's own, the simulated disk has to do."""
    done = small_disks(memory, step=150)
    if done is None:
        study = FailingCalls(memory)
        for room in (4_000, 8_000):
            study.full_disk(room)
        done = {"findings": study.findings, "refused": study.failures}
    assert done["findings"] == []
    assert done["refused"] >= 2


def small_disks(folder: Path, *, step: int) -> dict[str, object] | None:
    """Run small_disk.py in a namespace of its own; None where the system does not allow one."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None:
        return None
    allowed = subprocess.run([*inside, "mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True, check=False)
    if allowed.returncode:
        return None
    done = subprocess.run(
        [*inside, sys.executable, str(HERE / "small_disk.py"), str(folder), str(step)],
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, object] = json.loads(done.stdout)
    return told


def test_errors_while_reading(memory, monkeypatch):
    """A device that fails while a store is read: error 5, or right rows; never others."""
    cases.write_store(memory / "store", small_plan(2), **BATCH)
    rows = fingerprints(memory / "store")
    calls = itertools.count()
    failing: int | None = None

    def failing_open(*arguments, **options):
        if next(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments, **options)

    real = storage.files.local.open_descriptor
    monkeypatch.setattr(storage.files.local, "open_descriptor", failing_open)
    assert read_store(memory / "store", rows).errors == {}
    total = next(calls)
    assert total > 40
    for number in random.Random(SEED).sample(range(total), 30):
        calls, failing = itertools.count(), number
        reading = read_store(memory / "store", rows)
        assert reading.wrong == []
        assert [error.exit_code for error in reading.errors.values()] == [5]
        calls, failing = itertools.count(), number % 40
        with pytest.raises(StorageUnavailableError, match="the device reports an error"):
            verify(memory / "store")


@pytest.mark.torture
@pytest.mark.parametrize("code", CODES, ids=[errno.errorcode[code] for code in CODES])
def test_errors_at_every_call(study, code):
    started = time.perf_counter()
    calls = study.calls()
    for function, count in calls.items():
        for number in range(1, count + 1):
            study.error_at(function, number, code, begun=False)
    assert study.findings == []
    name = f"{errno.errorcode[code]} at every call that changes a file"
    save(name, started=started, runs=study.runs, refused=study.failures)


@pytest.mark.torture
def test_every_size_of_disk(study, memory):
    started = time.perf_counter()
    for room in range(0, 24_000, 150):
        study.full_disk(room)
    assert study.findings == []
    save("a disk that fills up after any number of bytes (simulated)", started=started, runs=study.runs,
         refused=study.failures)  # fmt: skip
    started = time.perf_counter()
    (memory / "real").mkdir()
    done = small_disks(memory / "real", step=4)
    if done is None:
        save("a real tmpfs that is too small, or read-only", started=started, runs="none: no mounts allowed here")
        return
    assert done.pop("findings") == []
    save("a real tmpfs that is too small, or read-only", started=started, **done)
