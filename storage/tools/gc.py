"""Garbage collection: remove what nothing refers to. No other code deletes what another process has written.

No worker may run meanwhile: what it is writing looks like what a dead one left. Workers tell of themselves by claims,
and while one may be alive, nothing is removed. One that creates or seals the store, or is between two shards, has no
claim: the file that it is making may go, and it ends with an error. Nothing is lost; the same command again goes on.
What a commit record names is never removed, and while the store is damaged nothing is, for then it is not known what
its records named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from storage.commit.aside import SHARD_DIRECTORY, origin, put_back, set_aside
from storage.commit.claims import Claims
from storage.commit.manifest import Manifest
from storage.commit.records import SHARDS
from storage.errors import UsageError
from storage.files import open_files
from storage.files.base import QUARANTINE, TEMPORARY, Files, StorePath
from storage.tools.verify import require_whole


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


def collect_garbage(path: StorePath, *, apply: bool) -> list[Garbage]:
    """Find what nothing refers to, and with `apply` remove it. Returns what was found, or removed.

    That is: everything in `tmp`, claims included; shard directories that no commit record names; and, once the store is
    sealed, everything in `quarantine`. (Before, a repaired shard is still compared with its old record there.)

    Args:
        apply: do it; without it, only say what would be done.

    Raises:
        UsageError: there is no store; or, with `apply`, a worker that may be alive has claimed one of its shards.
        CorruptionError: the store is damaged: repair comes first.
        StorageUnavailableError: the file system refuses, perhaps after some of it was removed.
    """
    files = open_files(path)
    advice = f"run `pipeline repair {files}` first: with damage it is not known what may be removed"
    require_whole(files, advice=advice)
    manifest = Manifest.open(files)
    found = _find(manifest)
    if not apply:
        return found
    _refuse_workers(files)  # after the look: what a worker makes that starts later was not found
    return [item for item in found if _remove(manifest, item.name)]


def _remove(manifest: Manifest, name: str) -> bool:
    """Remove it, unless a record names it by now.

    This process may sleep anywhere while a worker finds the directory that a dead one left, and commits it. So it is
    moved out of sight first: a worker that has found it before that claims its shard still, or has linked the record.
    """
    files = manifest.files
    if name.startswith(f"{SHARDS}/"):
        if _in_use(manifest, name):
            return False
        aside = set_aside(files, name)
        return aside is None or _remove_aside(manifest, aside, name)
    path = origin(name)
    if path is not None:
        return _remove_aside(manifest, name, path)
    directory, entry = name.split("/", 1)
    if directory == TEMPORARY and not Claims(files).is_left(entry):
        return False  # its worker ended after the look, and another has taken its name, or may take it now
    files.remove(name)
    return True


def _remove_aside(manifest: Manifest, name: str, path: str) -> bool:
    """Remove a directory that is out of sight, or put it back to its path."""
    in_use, back = True, False
    try:
        in_use = _in_use(manifest, path)
    finally:
        if in_use:  # or it cannot be told
            back = put_back(manifest.files, name)
    if not back:
        manifest.files.remove(name)
    return not back


def _in_use(manifest: Manifest, path: str) -> bool:
    """Tell whether a record names a directory of a shard. Raises UsageError if a worker may be about to link one."""
    _refuse_workers(manifest.files)  # the claim first: it goes away when the record is there
    shard = int(path.split("/")[1].split("-")[0])
    record = manifest.record(manifest.shards[shard]) if shard < len(manifest.shards) else None
    return record is not None and record.path == path


def _find(manifest: Manifest) -> list[Garbage]:
    files = manifest.files
    directories = files.entries(SHARDS)  # before the records: what is committed meanwhile is not garbage
    records = [manifest.record(spec) for spec in manifest.shards]
    named = {record.directory for record in records if record is not None}
    orphans = {name for name in directories - named if SHARD_DIRECTORY.fullmatch(name)}
    claims = Claims(files)
    found = _garbage(files, TEMPORARY, files.entries(TEMPORARY), "")
    found = [replace(item, reason=claims.about(item.name.split("/")[1])) for item in found]
    if manifest.seal() is not None:
        found += _garbage(files, QUARANTINE, files.entries(QUARANTINE), "a repair moved it out of the way")
    # The last: for each of them all claims are read anew, and by then those of the dead are gone.
    return found + _garbage(files, SHARDS, orphans, "no commit record names it")


def _garbage(files: Files, directory: str, names: Iterable[str], reason: str) -> list[Garbage]:
    sizes = Counter[str]()
    for name, size in (files.tree(directory) or {}).items():
        sizes[name.split("/")[0]] += max(size, 0)
    return [Garbage(name=f"{directory}/{name}", reason=reason, bytes=sizes[name]) for name in sorted(names)]


def _refuse_workers(files: Files) -> None:
    for name, (shard, claim) in Claims(files).in_work().items():
        fix = "wait until it ends, or stop it; then run the same command again"
        if claim.worker == "unknown":
            fix = f"wait until it ends; if you know that it is dead, remove {name} by hand. Then run the command again"
        raise UsageError(claim.words(shard), where=files.place(name), fix=fix)
