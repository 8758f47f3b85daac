"""Every file operation of the storage package: `base` says what a store needs, `local` does it in a directory.

The classes are known in here alone: others ask `open_files`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from storage.errors import UsageError, storage_errors
from storage.files.base import Files, StorePath
from storage.files.local import LocalFiles

# What looks like one, also where a Path has made one slash of two. A single letter may be a drive.
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)


def open_files(store: StorePath) -> Files:
    """Return the files of the store at a path, whether there is one or not; what is Files already comes back as it is.

    Raises:
        UsageError: it is a URL; stores are directories so far.
    """
    if not isinstance(store, str | os.PathLike):
        return store
    text = os.fspath(store)
    url = _URL.match(text)
    if url is not None:
        raise UsageError(
            f"a store is a directory so far, there is none behind {url[1]}://",
            where=text if "://" in text else text.replace(":/", "://", 1),
            fix="name a directory of this machine, or one that is mounted here",
        )
    return LocalFiles(Path(text))


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """Open a file, outside of any store, that appears under its name only when it is complete.

    Raises:
        UsageError: the file exists.
        OutOfSpaceError, StorageUnavailableError: it cannot be written; no partial file stays behind.
    """
    if target.exists():
        raise UsageError("the file exists already", where=str(target), fix="name another file")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    with storage_errors(target):
        try:
            with partial.open("xb") as file:
                yield file
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
