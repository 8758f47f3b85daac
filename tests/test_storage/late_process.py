"""Many processes on one store: stopped ones that wake up late, and eight at once."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import storage_cases as cases
from row_check import fingerprints, read_store
from seam import files_below
from workers import Workers

from storage.commit.records import SEAL, CommitRecord
from storage.tools.verify import verify

STOPS = [("link", number) for number in range(1, 7)] + [("rename", 1)]  # all that a store of one shard has


def late(folder: Path, workers: Workers, stop: tuple[str, int], *, longest: int, bug: str | None = None) -> list[str]:
    """Stop a worker before a link or rename, let another one finish the store, wake the first. What is wrong then.

    Args:
        folder: to work in.
        workers: to start.
        stop: function, and which call of it.
        longest: of the first worker's content: other than the second's 6 it is a teacher that is not deterministic.
        bug: planted into both.
    """
    path = folder / "store"
    shutil.rmtree(path, ignore_errors=True)
    sleeper = workers.start(path, longest=longest, signal_at=[stop[1], int(signal.SIGSTOP), stop[0]], bug=bug)
    if (ended := workers.wait(sleeper)).code is not None:
        return [f"{stop} was never reached: exit {ended.code} {ended.error}"]
    problems = []
    other = workers.run(path, bug=bug)
    if other.code != 0:
        problems.append(f"the second worker: exit {other.code} {other.error}")
    before, rows = _named(path), fingerprints(path)
    workers.wake(sleeper)
    ended = workers.wait(sleeper)
    if ended.code != 0:
        problems.append(f"the late worker: exit {ended.code} {ended.error}")
    if _named(path) != before:
        problems.append("the late worker has changed the store")
    if len(list((path / "shards").iterdir())) != 1:
        problems.append("the late worker has left a directory")
    if len(other.made) + len(ended.made) != 1:
        problems.append(f"records made: {other.made} and {ended.made}")
    if read_store(path, rows).wrong or verify(path).problems:
        problems.append("rows have changed")
    return [f"{stop}: {problem}" for problem in problems]


def _named(path: Path) -> dict[str, tuple[int, bytes]]:
    """The files that the store names, with their inodes: not the directory that a sleeper has yet to commit."""
    named = CommitRecord.from_json((path / "commits/000000.json").read_bytes()).path
    return {
        name: file
        for name, file in files_below(path).items()
        if name.startswith(named) or name.split("/")[0] not in ("tmp", "quarantine", "shards")
    }


def at_once(folder: Path, workers: Workers, *, processes: int, shards: int, claims: bool) -> list[str]:
    """Let many workers loose on one store at the same moment. What is wrong in the end."""
    reference, path = folder / "reference", folder / "store"
    for one in (reference, path):
        shutil.rmtree(one, ignore_errors=True)
    workers.run(reference, shards=shards)
    children = [workers.start(path, shards=shards, claims=claims, gather=True) for _ in range(processes)]
    for child in children:
        workers.wait(child)
    for child in children:
        workers.wake(child)
    ended = [workers.wait(child) for child in children]
    problems = [f"exit {one.code} {one.error}" for one in ended if one.code != 0]
    made = sorted(name for one in ended for name in one.made)
    if made != sorted({name for name in cases.tree(reference) if name.startswith("commits/")}):
        problems.append(f"records made, by all together: {made}")
    if cases.tree(path) != cases.tree(reference):
        problems.append("another tree")
    if not (path / SEAL).exists():
        problems.append("not sealed")
    return problems
