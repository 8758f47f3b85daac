"""Power loss: every tree that a crash may leave at any moment of writing a store, and what becomes of it.

Data path: a recorded run -> the disk at every prefix -> trees that may survive -> reader, `verify`, the same run again
-> the tree of an undisturbed run. What a run has reported as committed before the crash must be there after it.
"""

from __future__ import annotations

import copy
import hashlib
import random
import shutil
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import storage_cases as cases
from disk_model import Disk, Operation, Recorder, Tree, exhaustive, read_tree, sampled, write_tree
from row_check import Fingerprints, fingerprints, read_store
from seam import Call, watched

from storage.commit.records import PLAN, SEAL, record_name
from storage.plan import HeldoutRule, Plan
from storage.tools.verify import verify
from storage.writer import StoreWriter

STORE = "store"
LIMIT = 200  # trees outside of tmp/ at one prefix; the protocol leaves a handful
BATCH = {"longest": 6}
SAMPLES_BEYOND = 20  # taken beyond that limit
Report = Callable[[str], None]
Hook = Callable[[int, Call, Callable[[], None]], None]


def small_plan(shards: int = 1) -> Plan:
    """A store of so many shards of three documents each, nothing held out."""
    return cases.make_plan(documents=3 * shards, documents_per_shard=3, heldout=HeldoutRule())


def open_and_report(path: Path, plan: Plan, report: Report) -> StoreWriter:
    """Create or open a store; name each file to `report` once the writer has returned from making it."""
    writer = cases.open_writer(path, plan)
    report(PLAN)
    return writer


def finish_and_report(writer: StoreWriter, plan: Plan, report: Report) -> None:
    """Write what is missing and seal."""
    for shard in writer.missing():
        writer.commit(shard, cases.make_batch(plan, shard, **BATCH))
        report(record_name(shard.index))
    if writer.seal():
        report(SEAL)


def key_of(tree: Tree, reported: Iterable[str] = ()) -> str:
    """Hash of a tree and of what had been reported."""
    found = hashlib.sha256(repr(sorted(reported)).encode())
    for name, content in sorted(tree.items()):
        found.update(repr((name, content)).encode())
    return found.hexdigest()


def outside_tmp(tree: Tree) -> Tree:
    """The part of a tree that is not temporary."""
    return {name: content for name, content in tree.items() if "tmp" not in name.split("/")}


@dataclass
class Findings:
    """What a study did and found.

    Attributes:
        states: distinct trees recovered from, `tmp/` included.
        outside: distinct trees outside of `tmp/`.
        complete: every tree outside of `tmp/` that the model allows was among them.
        findings: what was wrong; empty for a protocol that holds.
    """

    states: set[str] = field(default_factory=set)
    outside: set[str] = field(default_factory=set)
    complete: bool = True
    findings: list[str] = field(default_factory=list)


class PowerLoss:
    """The study of one plan.

    Args:
        folder: an empty directory to work in; best in memory, for everything is synced for real.
        plan: small.
        seed: of what is sampled.
        stop_at: end a study after so many findings (planted bugs have thousands).
    """

    def __init__(self, folder: Path, plan: Plan, *, seed: int, stop_at: int = 20) -> None:
        self.folder, self.plan, self.stop_at = folder, plan, stop_at
        self.rng = random.Random(seed)
        self.found = Findings()
        cases.write_store(folder / "reference", plan, **BATCH)
        self.reference = cases.tree(folder / "reference")
        self.rows: Fingerprints = fingerprints(folder / "reference")

    def fresh(self, tree: Tree) -> Path:
        """A base directory that holds a tree and nothing else."""
        base = self.folder / "base"
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir()
        write_tree(tree, base)
        return base

    def record(self, disk: Disk, *, hook: Hook | None = None, early: bool = False) -> list[Operation]:
        """Record a run that starts with what a living process sees on a disk.

        Args:
            disk: not changed.
            hook: `hook(calls so far, this call, another run)` is called before each call; it may raise Stopped.
            early: the other run has opened the store before this one does anything.
        """
        base = self.fresh(disk.alive())
        recorder = Recorder(base)
        calls = 0

        def opened() -> StoreWriter:
            return open_and_report(base / STORE, self.plan, recorder.report)

        def another() -> None:
            finish_and_report(other or opened(), self.plan, recorder.report)

        def watcher(call: Call) -> Any:
            nonlocal calls
            calls += 1
            if hook is not None:
                hook(calls, call, another)
            return recorder(call)

        with watched(recorder):
            other = opened() if early else None
        with watched(watcher), suppress(Stopped):
            finish_and_report(opened(), self.plan, recorder.report)
        after = copy.deepcopy(disk)
        for operation in recorder.log:
            after.apply(operation)
        if after.alive() != read_tree(base):
            raise AssertionError("the log does not explain the tree: a call goes past the seam")
        return recorder.log

    def crash(
        self, log: list[Operation], disk: Disk, *, samples: int = 0, at: Collection[int] | None = None
    ) -> list[Tree]:
        """Crash at every prefix of a log, and recover from every tree outside of tmp/ that may be left.

        Args:
            log: of a run.
            disk: before it; it is changed.
            samples: trees at random for each prefix besides, with what they have in tmp/.
            at: the prefixes to look at; by default all.

        Returns:
            The trees that were new outside of tmp/.
        """
        reported: list[str] = []
        new: list[Tree] = []
        for number, operation in enumerate([("start", "."), *log]):
            disk.apply(operation)
            label = f"prefix {number}, after {' '.join(map(str, operation[:2]))}"
            if operation[0] == "report":
                reported.append(operation[1])
            if at is not None and number not in at:
                continue
            for tree in self._left_outside(disk) if _shows_outside(operation) else []:
                key = key_of(outside_tmp(tree), reported)
                if key not in self.found.outside:
                    self.found.outside.add(key)
                    new.append(tree)
                    self._recover(tree, reported, label)
            for _ in range(samples):
                tree = sampled(disk, self.rng, random_tmp=True)
                self.found.outside.add(key_of(outside_tmp(tree), reported))
                self._recover(tree, reported, f"{label}, sampled")
            if len(self.found.findings) >= self.stop_at:
                break
        return new

    def _left_outside(self, disk: Disk) -> list[Tree]:
        trees, complete = exhaustive(disk, LIMIT)
        if complete:
            return trees
        self.found.complete = False
        return [*trees[:SAMPLES_BEYOND], *(sampled(disk, self.rng, random_tmp=False) for _ in range(SAMPLES_BEYOND))]

    def _recover(self, tree: Tree, reported: list[str], label: str) -> None:
        key = key_of(tree, reported)
        if key in self.found.states or len(self.found.findings) >= self.stop_at:
            return
        self.found.states.add(key)
        try:
            problems = self._check(self.fresh(tree) / STORE, reported)
        except Exception as error:  # a planted bug may do anything
            problems = [f"{type(error).__name__}: {error}"]
        self.found.findings += [f"{label}: {problem}" for problem in problems]

    def _check(self, path: Path, reported: list[str]) -> list[str]:
        """Everything that must hold for a tree found after a crash."""
        problems = [f"{name} was reported and is lost" for name in reported if not self._is_there(path, name)]
        if (path / PLAN).exists():
            problems += [f"verify: {problem.name}: {problem.message}" for problem in verify(path).problems]
            problems += [f"wrong rows in shard {n}" for n in read_store(path, self.rows, allow_partial=True).wrong]
        cases.write_store(path, self.plan, **BATCH)
        if cases.tree(path) != self.reference:
            problems.append("the same run again gives another tree")
        report = verify(path)
        if report.problems or not report.sealed:
            problems.append("verify is not content after the same run again")
        return problems

    def _is_there(self, path: Path, name: str) -> bool:
        """Whether a file, and of a record the whole shard, is what the reference has."""
        names = [name]
        if name.startswith("commits/"):
            shard = name.split("/")[1].removesuffix(".json")
            names += [other for other in self.reference if other.startswith(f"shards/{shard}-")]
        elif name == SEAL:
            names = list(self.reference)
        return all((path / one).is_file() and (path / one).read_bytes() == self.reference[one] for one in names)


class Stopped(BaseException):
    """The run ends here, as by kill -9: nothing after it reaches the disk, no cleaning up either."""


def _shows_outside(operation: Operation) -> bool:
    """Whether an operation can change what is left outside of tmp/."""
    return operation[0] in ("link", "rename") or "tmp" not in operation[1].split("/")[:-1]


def one_run(study: PowerLoss, *, samples: int = 0) -> list[Tree]:
    """A crash at every moment of a run. Returns the distinct trees outside of tmp/."""
    return study.crash(study.record(Disk()), Disk(), samples=samples)


def crash_twice(study: PowerLoss, trees: Iterable[Tree]) -> None:
    """From each tree that a crash left: the same run again, and a second crash at every moment of it."""
    for tree in trees:
        study.crash(study.record(Disk(tree)), Disk(tree))


def all_calls(study: PowerLoss, *, early: bool = False) -> list[str]:
    """The function of each call of a run; `early`: another one has opened the store before."""
    functions: list[str] = []
    study.record(Disk(), early=early, hook=lambda calls, call, another: functions.append(call.function))
    return functions


def after_links(study: PowerLoss, *, early: bool = False) -> list[int]:
    """Moments at which a name has just been made that is not synced yet: the calls after each link and rename."""
    functions = enumerate(all_calls(study, early=early))
    return [number + 2 for number, function in functions if function in ("link", "rename")]


def kill_then_crash(study: PowerLoss, moments: Iterable[int]) -> None:
    """A process is killed before its n-th call, another goes on, and the power goes at every moment of that.

    The unsynced work of the dead is the trap: the second process sees it, and must not build on it.
    """
    for moment in moments:

        def kill(calls: int, call: Call, another: Callable[[], None], moment: int = moment) -> None:
            if calls >= moment:
                raise Stopped

        disk = Disk()
        for operation in study.record(disk, hook=kill):
            disk.apply(operation)
        study.crash(study.record(disk), disk)


def sleep_then_crash(study: PowerLoss, moments: Iterable[int], *, early: bool) -> None:
    """A process sleeps before its n-th call while another does the rest, then wakes; the power goes at any moment.

    With `early`, the other one has opened the store at the beginning; else it opens it then.
    """
    for moment in moments:

        def sleep(calls: int, call: Call, another: Callable[[], None], moment: int = moment) -> None:
            if calls == moment:
                another()

        study.crash(study.record(Disk(), hook=sleep, early=early), Disk())
