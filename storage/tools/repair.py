"""Repair: take what is damaged out of a store, so that the command that wrote it computes exactly that anew.

No worker may run meanwhile. Nothing is deleted: everything goes to `quarantine/`, or, if a garbage collection that was
cut off has left a committed shard in `tmp/`, back to its place. This is the only code that takes a
commit record away, and it does so last: while the record stands, readers refuse the shard, and without record and
directory it is simply not committed yet. A crash in between leaves something that the next repair finds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from storage.commit.aside import left_aside, origin, put_back
from storage.commit.damage import written_by
from storage.commit.manifest import Manifest
from storage.commit.records import REMAP, SEAL, SHARDS, TOKENIZER, record_name
from storage.files import open_files
from storage.files.base import QUARANTINE, Files, StorePath
from storage.tools.verify import Report, verify


@dataclass(frozen=True, kw_only=True)
class Action:
    """One thing that a repair does or would do.

    Attributes:
        name: file or directory inside the store that is moved.
        reason: why.
        moved_to: its new name; None if nothing was moved (yet), or if it is missing and there is nothing to.
        missing: it is not there; the command that wrote the store writes it anew.
        goes_to: `shards` for what a garbage collection, cut off, has left out of its place; else `quarantine`.
    """

    name: str
    reason: str
    moved_to: str | None = None
    missing: bool = False
    goes_to: str = QUARANTINE


def repair(path: StorePath, *, apply: bool) -> list[Action]:
    """Find what is damaged, and with `apply` move it to quarantine. Returns an empty list for a good store.

    What a garbage collection, cut off, has left out of its place is put back there instead.

    Args:
        apply: do it; without it, only say what would be done.

    Raises:
        UsageError: there is no store.
        CorruptionError: plan.json itself is damaged: only a copy helps. Or a directory of the store is something else.
        OutOfSpaceError, StorageUnavailableError: the file system refuses.
    """
    files = open_files(path)
    actions = _planned(files)
    if not apply:
        return actions
    back = [action for action in actions if action.goes_to == SHARDS and put_back(files, action.name)]
    if back:
        actions = _planned(files)  # until now, only the sizes of what was put back had been looked at
    done = [replace(action, moved_to=origin(action.name)) for action in back]
    for action in actions:
        if action.goes_to == QUARANTINE:
            done.append(action if action.missing else replace(action, moved_to=files.quarantine(action.name)))
    return done


def command_after(path: StorePath) -> str:
    """Return the command that computes what a repair has taken out. Raises as `repair` does."""
    return written_by(Manifest.open(open_files(path)).plan)


def _planned(files: Files) -> list[Action]:
    """Return everything to move, in order: parts and what is put back, damaged directories, seal, records."""
    manifest = Manifest.open(files)  # what it refuses cannot be mended here
    actions = _answers(manifest, verify(files))
    return [action for action in actions if action.missing or files.exists(action.name)]


def _answers(manifest: Manifest, report: Report) -> list[Action]:
    parts: list[Action] = []
    directories: dict[str, Action] = {}
    records: dict[str, Action] = {}
    files = manifest.files
    for problem in report.problems:
        if problem.shard is None:
            if problem.name == REMAP or problem.name.startswith(f"{TOKENIZER}/"):
                gone = not files.exists(problem.name)
                parts.append(Action(name=problem.name, reason=problem.message, missing=gone))
            continue
        if problem.foreign:
            parts.append(Action(name=problem.name, reason=problem.message))
            continue
        if problem.name.startswith(f"{SHARDS}/"):
            record = manifest.record(manifest.shards[problem.shard])
            aside = None if record is None else left_aside(files, record)
            if aside is not None:
                reason = f"shard {problem.shard}, committed; a garbage collection was cut off"
                parts.append(Action(name=aside, reason=reason, goes_to=SHARDS))
                continue
            directory = "/".join(problem.name.split("/")[:2])
            directories.setdefault(directory, Action(name=directory, reason=problem.message))
        name = record_name(manifest.shards[problem.shard].index)
        records.setdefault(name, Action(name=name, reason=f"shard {problem.shard} must be computed anew"))
    seal = [Action(name=SEAL, reason="it seals damaged shards, or is damaged itself")]
    needs_seal = records or any(problem.name == SEAL for problem in report.problems)
    return [*parts, *directories.values(), *(seal if needs_seal else []), *records.values()]
