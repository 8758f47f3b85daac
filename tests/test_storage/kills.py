"""kill -9 of real workers: at named points, before each call that changes a file, at random moments; alone or two.

After each kill the survivors are looked at, the same command runs again, and the store must be that of an undisturbed
run, byte for byte. Then no row is lost and none is there twice.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import storage_cases as cases
from power_loss import BATCH, small_plan
from row_check import fingerprints, read_store
from seam import Counter, watched
from workers import Workers

from storage.commit.records import PLAN
from storage.tools.verify import verify

SHARDS = 3
ONCE = ("plan-link", "plan-linked", "seal-link", "seal-linked")  # reached once in the life of a store
PER_SHARD = ("encode", "encoded", "shard-write", "shard-rename", "shard-renamed", "record-write", "record-link",
             "record-linked")  # fmt: skip
FIRST_HITS = [f"{name}:1" for name in ONCE] + [f"{name}:{hit}" for name in PER_SHARD for hit in (1, 2, 3)]


@dataclass
class Killed:
    """What a study did and found. `killed` counts the workers that did die of it."""

    runs: int = 0
    killed: int = 0
    findings: list[str] = field(default_factory=list)


class Kills:
    """The study.

    Args:
        folder: an empty directory, best in memory.
        workers: to kill.
        bug: planted into every worker; None for none.
    """

    def __init__(self, folder: Path, workers: Workers, *, bug: str | None = None) -> None:
        self.folder, self.workers, self.bug = folder, workers, bug
        self.path = folder / "store"
        self.found = Killed()
        reference = folder / "reference"
        started = time.perf_counter()
        ended = workers.run(reference, shards=SHARDS)
        self.seconds = time.perf_counter() - started
        assert ended.code == 0, ended.error
        self.reference, self.rows = cases.tree(reference), fingerprints(reference)

    def named(self, fault: str, *, together: bool) -> None:
        """Kill a worker at a named point. `together`: another one works on the store meanwhile, undisturbed."""
        self._begin()
        other = self._start() if together else None
        ended = self.workers.wait(self._start(fault=fault))
        # Beside another worker it may find everything done, and never come to the point.
        if ended.code != -9 and not (together and ended.code == 0):
            self.found.findings.append(f"{fault}: exit {ended.code} {ended.error}")
        self._end(fault, ended.code, other)

    def before_call(self, number: int) -> None:
        """Kill a worker before its n-th call that changes a file."""
        self._begin()
        ended = self.workers.wait(self._start(signal_at=[number, 9, None]))
        self._end(f"call {number}", ended.code, None)

    def at_random(self, rng: random.Random, *, together: bool) -> None:
        """Kill one worker, or two that work together, at random moments."""
        self._begin()
        moments = [rng.uniform(0.0, 1.2 * self.seconds) for _ in range(2 if together else 1)]
        children = [self._start() for _ in moments]
        codes = [self.workers.wait(child, kill_after=t).code for child, t in zip(children, moments, strict=True)]
        self.found.killed += codes.count(-9)
        self._end(f"{moments}", None, None)

    def calls(self) -> int:
        """Number of calls of a whole run that change a file."""
        counter = Counter()
        with watched(counter):
            cases.write_store(self.folder / "counted", small_plan(SHARDS), **BATCH)
        return len(counter.names)

    def _begin(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.found.runs += 1

    def _start(self, **options: object) -> int:
        return self.workers.start(self.path, shards=SHARDS, bug=self.bug, **options)

    def _end(self, label: str, code: int | None, other: int | None) -> None:
        """Look at what is left, run again, compare."""
        problems: list[str] = []
        self.found.killed += code == -9
        if other is not None:
            ended = self.workers.wait(other)
            if ended.code != 0:
                problems.append(f"the other worker: {ended.error}")
        if (self.path / PLAN).exists():
            problems += [f"verify: {problem.name}: {problem.message}" for problem in verify(self.path).problems]
            problems += [f"wrong rows: {n}" for n in read_store(self.path, self.rows, allow_partial=True).wrong]
        ended = self.workers.run(self.path, shards=SHARDS, bug=self.bug)
        if ended.code != 0:
            problems.append(f"the run after it: exit {ended.code} {ended.error}")
        elif cases.tree(self.path) != self.reference:
            problems.append("the run after it gives another tree")
        elif verify(self.path).problems:
            problems.append("verify is not content in the end")
        self.found.findings += [f"{label}: {problem}" for problem in problems]


def all_named(study: Kills, faults: Iterable[str], *, together: bool) -> None:
    """Kill at each of these points."""
    for fault in faults:
        study.named(fault, together=together)
