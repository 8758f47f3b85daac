"""Garbage collection: remove what nothing refers to. The only code that deletes files of a store.

No worker may run meanwhile: what it is writing looks like what a dead one left. Workers tell of themselves by claims,
and while one may be alive, nothing is removed. One that creates or seals the store, or is between two shards, has no
claim: the file that it is making may go, and it ends with an error. Nothing is lost; the same command again goes on.
What a commit record names is never touched, and while the store is damaged nothing is, for then it is not known what
its records named.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from storage.claims import Claims
from storage.errors import UsageError
from storage.files import QUARANTINE, TEMPORARY, LocalFiles
from storage.manifest import Manifest
from storage.records import SHARDS, CommitRecord, record_name
from storage.verify import require_whole

_SHARD_DIRECTORY = re.compile(r"\d{6,}-[0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """One file or directory that nothing refers to.

    Attributes:
        name: inside the store.
        reason: what it is.
        bytes: sum of the sizes of its files.
    """

    name: str
    reason: str
    bytes: int


def collect_garbage(path: str | os.PathLike[str], *, apply: bool) -> list[Garbage]:
    """Find what nothing refers to, and with `apply` remove it. Returns what was found.

    That is: everything in `tmp`, claims included; shard directories that no commit record names; and, once the store is
    sealed, everything in `quarantine`. (Before, a repaired shard is still compared with its old record there.)

    Args:
        path: the store's directory.
        apply: do it; without it, only say what would be done.

    Raises:
        UsageError: there is no store; or, with `apply`, a worker that may be alive has claimed one of its shards.
        CorruptionError: the store is damaged: repair comes first.
        StorageUnavailableError: the file system refuses.
    """
    files = LocalFiles(Path(path))
    advice = f"run `pipeline repair {files.root}` first: with damage it is not known what may be removed"
    require_whole(files.root, advice=advice)
    if not apply:
        return _find(files)
    _refuse_workers(files.root)
    found = _find(files)
    return [item for item in found if _remove(files, item)]


def _remove(files: LocalFiles, item: Garbage) -> bool:
    """Remove it, unless a record names it by now.

    This process may sleep anywhere while a worker finds the directory that a dead one left, and commits it. So it is
    moved out of sight first: a worker that has found it before that claims its shard still, or has linked the record.
    """
    directory, name = item.name.split("/", 1)
    if directory != SHARDS:
        _refuse_workers(files.root)
        files.remove(item.name)
        return True
    in_use = partial(_in_use, files, name)
    return not in_use() and files.discard_directory(item.name, unless=in_use)


def _in_use(files: LocalFiles, directory: str) -> bool:
    """Tell whether a record names a directory of a shard. Raises UsageError if a worker may be about to link one."""
    _refuse_workers(files.root)  # the claim first: it goes away when the record is there
    record = files.read(record_name(int(directory.split("-")[0])))
    return record is not None and CommitRecord.from_json(record).directory == directory


def _find(files: LocalFiles) -> list[Garbage]:
    directories = files.entries(SHARDS)  # before the records: what is committed meanwhile is not garbage
    manifest = Manifest.open(files)
    records = [manifest.record(spec) for spec in manifest.shards]
    named = {record.directory for record in records if record is not None}
    orphans = {name for name in directories - named if _SHARD_DIRECTORY.fullmatch(name)}
    found = _garbage(files, SHARDS, orphans, "no commit record names it")
    claims = Claims(files.root)
    left = _garbage(files, TEMPORARY, files.entries(TEMPORARY), "")
    found += [replace(item, reason=claims.about(item.name.split("/")[1])) for item in left]
    if manifest.seal() is not None:
        found += _garbage(files, QUARANTINE, files.entries(QUARANTINE), "a repair moved it out of the way")
    return found


def _garbage(files: LocalFiles, directory: str, names: Iterable[str], reason: str) -> list[Garbage]:
    sizes = Counter[str]()
    for name, size in (files.tree(directory) or {}).items():
        sizes[name.split("/")[0]] += max(size, 0)
    return [Garbage(name=f"{directory}/{name}", reason=reason, bytes=sizes[name]) for name in sorted(names)]


def _refuse_workers(root: Path) -> None:
    for name, (shard, claim) in Claims(root).in_work().items():
        fix = "wait until it ends, or stop it; then run the same command again"
        if claim.worker == "unknown":
            fix = f"wait until it ends; if you know that it is dead, remove {name} by hand. Then run the command again"
        raise UsageError(claim.words(shard), where=f"{root}/{name}", fix=fix)
