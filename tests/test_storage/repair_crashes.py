"""Damage, a repair that is cut off by a power loss at any moment, and then whatever comes next: never a damaged commit.

A garbage collection that is cut off likewise: never a file gone that a record names.

Data path: a damaged store -> the recorded calls of `repair` -> every tree that a crash may leave -> extraction without
another repair, which must not make damage official -> repair and extraction, which must end in the undamaged store.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import storage_cases as cases
from disk_model import Disk, Recorder, Tree, exhaustive, read_tree, write_tree
from power_loss import BATCH, LIMIT, key_of, small_plan
from row_check import fingerprints, read_store
from seam import watched

from storage.commit.records import SEAL, CommitRecord, record_name
from storage.errors import DistillError
from storage.files.base import Files
from storage.tools import gc
from storage.tools.gc import collect_garbage
from storage.tools.repair import repair
from storage.tools.verify import verify
from storage.values import sha256


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _object(store: Path, name: str = "entropy/c/0") -> Path:
    (directory,) = (store / "shards").glob("000001-*")
    return directory / name


def _record(store: Path) -> Path:
    return store / "commits/000001.json"


def _several(*damages: Callable[[Path], object]) -> Callable[[Path], None]:
    def all_of_them(store: Path) -> None:
        for damage in damages:
            damage(store)

    return all_of_them


DAMAGES: dict[str, Callable[[Path], object]] = {
    "object flipped": lambda store: flip(_object(store)),
    "object gone": lambda store: _object(store).unlink(),
    "object empty": lambda store: _object(store).write_bytes(b""),
    "metadata flipped": lambda store: flip(_object(store, "entropy/zarr.json")),
    "foreign file": lambda store: _object(store, "stranger").write_bytes(b"mine"),
    "directory gone": lambda store: shutil.rmtree(_object(store, ".")),
    "record flipped": lambda store: flip(_record(store)),
    "record gone": lambda store: _record(store).unlink(),
    "record and object flipped": _several(lambda store: flip(_record(store)), lambda store: flip(_object(store))),
    "record gone, object flipped": _several(lambda store: _record(store).unlink(), lambda store: flip(_object(store))),
    "seal flipped": lambda store: flip(store / SEAL),
    "seal and object flipped": _several(lambda store: flip(store / SEAL), lambda store: flip(_object(store))),
    "remap flipped": lambda store: flip(store / "remap"),
    "tokenizer flipped": lambda store: flip(store / "tokenizer/tokenizer.json.xz"),
}


class RepairCrashes:
    """The study: a sealed store of two shards, the second one damaged.

    Attributes:
        states: distinct trees that crashes left.
        findings: what was wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.base, self.plan = folder / "base", small_plan(2)
        self.store = self.base / "store"
        cases.write_store(folder / "reference", self.plan, **BATCH)
        self.reference, self.rows = cases.tree(folder / "reference"), fingerprints(folder / "reference")
        self.states: set[str] = set()
        self.findings: list[str] = []

    def study(self, name: str) -> None:
        """Crash a repair of one damage at every moment."""
        self._put({})
        cases.write_store(self.store, self.plan, **BATCH)
        DAMAGES[name](self.store)
        self._crash(name, lambda: repair(self.store, apply=True), self._check_repair)

    def study_garbage(self) -> None:
        """Crash a garbage collection at every moment."""
        self._put({})
        cases.write_store(self.store, self.plan, **BATCH)
        for name in ("shards/000001-0123456789abcdef/c", "tmp/1-2/c", "quarantine/shards-000000-0123456789abcdef/c"):
            (self.store / name).mkdir(parents=True)
            (self.store / name / "0").write_bytes(b"left")
        self._crash("garbage", lambda: collect_garbage(self.store, apply=True), self._check_garbage)

    def study_adoption(self) -> None:
        """Crash a collection that is about to remove a directory which a worker has found, and commits meanwhile.

        The worker links its record and drops its claim while the directory is out of sight.
        """
        self._put({})
        cases.write_store(self.store, self.plan, **BATCH)
        directory, record = _object(self.store, "."), _record(self.store).read_bytes()
        (self.store / SEAL).unlink()
        _record(self.store).unlink()
        refuse_workers = gc._refuse_workers

        def commit_and_look(files: Files) -> None:
            if not directory.exists():
                files.create(record_name(1), record)
            refuse_workers(files)

        with mock.patch.object(gc, "_refuse_workers", commit_and_look):
            disk = self._crash("adoption", lambda: collect_garbage(self.store, apply=True), self._check_repair)
        for tree in exhaustive(disk, LIMIT)[0]:
            self._put(tree)
            self.findings += [f"adoption, in the end: {problem.name}" for problem in verify(self.store).problems]

    def _crash(self, name: str, action: Callable[[], object], check: Callable[[Tree], list[str]]) -> Disk:
        """Record an action on the store that is there; check every tree that a crash at any moment may leave.

        Returns the disk in the end.
        """
        before = read_tree(self.base)
        recorder = Recorder(self.base)
        with watched(recorder):
            action()
        disk = Disk(before)
        for operation in [("start", "."), *recorder.log]:
            disk.apply(operation)
            for tree in exhaustive(disk, LIMIT)[0]:
                key = key_of(tree)
                if key not in self.states:
                    self.states.add(key)
                    label = f"{name}, crash after {' '.join(map(str, operation[:2]))}"
                    self.findings += [f"{label}: {problem}" for problem in check(tree)]
        return disk

    def _put(self, tree: Tree) -> None:
        shutil.rmtree(self.base, ignore_errors=True)
        self.base.mkdir()
        write_tree(tree, self.base)

    def _check_garbage(self, tree: Tree) -> list[str]:
        self._put(tree)
        problems = [] if self._has_everything() else ["something is gone that a record names"]
        collect_garbage(self.store, apply=True)
        if not self._has_everything() or len(list((self.store / "shards").iterdir())) != 2:
            problems.append("another collection does not end it")
        return problems

    def _has_everything(self) -> bool:
        found = cases.tree(self.store)
        return all(found.get(name) == data for name, data in self.reference.items()) and not verify(self.store).problems

    def _check_repair(self, tree: Tree) -> list[str]:
        problems = []
        self._put(tree)
        problems += [f"wrong rows in shard {n}" for n in read_store(self.store, self.rows, allow_partial=True).wrong]
        problems += self._extract_only()
        self._put(tree)
        repair(self.store, apply=True)
        cases.write_store(self.store, self.plan, **BATCH)
        if cases.tree(self.store) != self.reference or verify(self.store).problems:
            problems.append("repair and extraction do not mend it")
        return problems

    def _extract_only(self) -> list[str]:
        """Run the extraction without another repair: what it commits or seals must be whole."""
        before = cases.tree(self.store)
        with suppress(DistillError):  # it may refuse, but it has run
            cases.write_store(self.store, self.plan, **BATCH)
        after = cases.tree(self.store)
        new = {name for name in after if name not in before}
        problems = [
            f"{name} commits a damaged shard"
            for name in new
            if name.startswith("commits/") and not _is_whole(after, CommitRecord.from_json(after[name]))
        ]
        if SEAL in new and not all(
            any(one.startswith(f"{CommitRecord.from_json(data).path}/") for one in after)
            for name, data in after.items()
            if name.startswith("commits/")
        ):
            problems.append("a shard that is not there was sealed")
        wrong = read_store(self.store, self.rows, allow_partial=True).wrong
        return [*problems, *(f"wrong rows in shard {n} after extraction" for n in wrong)]


def _is_whole(tree: dict[str, bytes], record: CommitRecord) -> bool:
    inside = {name for name in tree if name.startswith(f"{record.path}/")}
    named = {f"{record.path}/{name}": item for name, item in record.objects.items()}
    return inside == set(named) and all(sha256(tree[name]) == item.sha256 for name, item in named.items())
