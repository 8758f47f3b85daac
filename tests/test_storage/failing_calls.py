"""Errors of the operating system at every call that changes a file: the designed exit code, and nothing lost."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import storage_cases as cases
from power_loss import BATCH, small_plan
from seam import Call, Counter, FailAt, FullDisk, Watcher, watched

from storage.errors import DistillError

CODES = {errno.ENOSPC: 6, errno.EDQUOT: 6, errno.EFBIG: 6, errno.EIO: 5, errno.EROFS: 5, errno.EACCES: 5}
CLEANING = ("unlink", "rmtree")  # of what nothing refers to: an error there is no error


def short_writes(call: Call) -> Any:
    """A watcher: the system writes half of what it is given, as it may."""
    if call.function != "write":
        return call.proceed()
    descriptor, data = call.arguments
    return call.proceed(descriptor, data[: max(1, len(data) // 2)])


class FailingCalls:
    """The study: a store of two shards, the first of which is committed when the trouble begins.

    Attributes:
        runs, failures: runs made, and those that ended with an error.
        findings: what was wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.plan, self.path, self.begun = small_plan(2), folder / "store", folder / "begun"
        cases.write_store(folder / "reference", self.plan, **BATCH)
        cases.write_store(self.begun, self.plan, shards=[0], **BATCH)
        self.reference, self.committed = cases.tree(folder / "reference"), cases.tree(self.begun)
        self.runs = self.failures = 0
        self.findings: list[str] = []

    def calls(self) -> dict[str, int]:
        """How often a whole run, from nothing, makes each changing call."""
        shutil.rmtree(self.path, ignore_errors=True)
        counter = Counter()
        with watched(counter):
            cases.write_store(self.path, self.plan, **BATCH)
        functions = [function for function, _ in counter.names]
        return {function: functions.count(function) for function in sorted(set(functions))}

    def error_at(self, function: str, number: int, code: int, *, begun: bool) -> None:
        """Let the n-th call of a function fail; `begun` is after the first shard, else from nothing."""
        watcher = FailAt(function, number, code)
        label = f"{errno.errorcode[code]} at {function} {number}"
        problems = self._run(watcher, begun, CODES[code])
        if watcher.failed is None:
            self.findings.append(f"{label}: never reached")
        if watcher.synced_again:
            problems.append("a file whose sync failed was synced again")
        if not problems and not self._failed and not self._may_pass(watcher):
            problems.append("the error was not told")
        self.findings += [f"{label}: {problem}" for problem in problems]

    def full_disk(self, room: int) -> None:
        """Let the disk have room for so many bytes."""
        problems = self._run(FullDisk(room), True, 6)
        self.findings += [f"room for {room} bytes: {problem}" for problem in problems]

    def short_writes(self) -> None:
        """Let every write take half."""
        self.findings += [f"short writes: {problem}" for problem in self._run(short_writes, False, 0)]

    def _run(self, watcher: Watcher, begun: bool, code: int) -> list[str]:
        """Run into the trouble, look at what is left, run again."""
        shutil.rmtree(self.path, ignore_errors=True)
        if begun:
            shutil.copytree(self.begun, self.path)
        problems: list[str] = []
        self.runs += 1
        self._failed = False
        try:
            with watched(watcher):
                cases.write_store(self.path, self.plan, **BATCH)
        except DistillError as error:
            self._failed = True
            self.failures += 1
            if error.exit_code != code or str(self.path) not in (error.where or "") or not error.fix:
                problems.append(f"exit {error.exit_code}, designed {code}: {error}")
        except Exception as error:
            self._failed = True
            problems.append(f"a bug: {error!r}")
        left = cases.tree(self.path)
        if begun and any(left.get(name) != data for name, data in self.committed.items()):
            problems.append("the committed shard was touched")
        if not self._committed_is_whole(left):
            problems.append("a shard was committed and is not whole")
        if not self._failed and left != self.reference:
            problems.append("no error, and yet not the right tree")
        try:
            cases.write_store(self.path, self.plan, **BATCH)
        except DistillError as error:
            problems.append(f"the same run again: {error}")
        if cases.tree(self.path) != self.reference:
            problems.append("the same run again gives another tree")
        return problems

    def _committed_is_whole(self, left: dict[str, bytes]) -> bool:
        """Whether each record that is there is right, and everything that it stands for is there too."""
        records = [name for name in left if name.startswith("commits/")]
        shards = {name.split("/")[1].removesuffix(".json") for name in records}
        needed = [name for name in self.reference if name.startswith(tuple(f"shards/{shard}-" for shard in shards))]
        return all(left.get(name) == self.reference[name] for name in [*records, *needed])

    def _may_pass(self, watcher: FailAt) -> bool:
        """Errors that need not end a run: while cleaning, or where syncing a directory that is not ours is refused."""
        if watcher.function in CLEANING:
            return True
        not_ours = watcher.failed is not None and not Path(watcher.failed).is_relative_to(self.path)
        return not_ours and watcher.code in (errno.EROFS, errno.EACCES)
