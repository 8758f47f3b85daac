"""Out of sight: how the directory of a shard is taken away, so that a process that stops in between loses nothing.

`shards/<directory>` first becomes `tmp/discard-<directory>.<random>`, in one step. Garbage collection then looks
whether a commit record names it after all, and puts it back or removes it. Where that was cut off, `pipeline verify`
tells where a committed directory is, and `pipeline repair` puts it back.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress

from storage.commit.records import SHARDS, CommitRecord
from storage.errors import StorageUnavailableError
from storage.files.base import TEMPORARY, Files

SHARD_DIRECTORY = re.compile(r"\d{6,}-[0-9a-f]{16}")
_ASIDE = re.compile(rf"{TEMPORARY}/discard-({SHARD_DIRECTORY.pattern})\.[0-9a-f]{{8}}")


def set_aside(files: Files, path: str) -> str | None:
    """Move a shard's directory out of sight. Return its new name, or None if it is not there (any more)."""
    name = f"{TEMPORARY}/discard-{path.split('/')[1]}.{os.urandom(4).hex()}"
    return name if files.move_directory(path, name) else None


def origin(name: str) -> str | None:
    """Return the name in `shards` of what was set aside under this name, or None if nothing is."""
    match = _ASIDE.fullmatch(name)
    return None if match is None else f"{SHARDS}/{match[1]}"


def put_back(files: Files, name: str) -> bool:
    """Undo `set_aside`. Return False if the directory has been written anew, or has been put back already."""
    path = origin(name)
    return path is not None and files.move_directory(name, path)


def discard(files: Files, path: str) -> None:
    """Remove a shard's directory that no record names, if it exists. What cannot be removed stays in `tmp`."""
    name = set_aside(files, path)
    if name is not None:
        with suppress(StorageUnavailableError):
            files.remove(name, durable=False)


def left_aside(files: Files, record: CommitRecord) -> str | None:
    """Return under which name a committed directory that is missing in `shards` is set aside; None if it is not."""
    sizes = {name: item.size for name, item in record.objects.items()}
    for entry in () if files.exists(record.path) else sorted(files.entries(TEMPORARY)):
        name = f"{TEMPORARY}/{entry}"
        if origin(name) == record.path and files.tree(name) == sizes:
            return name
    return None
