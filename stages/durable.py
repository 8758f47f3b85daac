"""Files and directories of a run that appear whole or not at all, also when the power fails.

Written under a temporary name beside the target, synced, renamed, and the directory that holds the name synced. A kill
in between leaves a temporary name that `remove_leftovers` clears away.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from storage.errors import storage_errors
from storage.faults import fault_point

_TEMPORARY = ".tmp-"
_OLD = "old-"


@contextmanager
def durable_directory(target: Path, *, point: str | None = None) -> Iterator[Path]:
    """Yield an empty directory to fill, which becomes `target` when the block ends without an error.

    Args:
        target: its final name. A directory that stands there is replaced.
        point: prefix of the fault points `<point>-write` (all written, nothing synced) and `<point>-rename`.

    Raises:
        OutOfSpaceError, StorageUnavailableError: the operating system refuses.
    """
    temporary = target.parent / f"{_TEMPORARY}{target.name}"
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        temporary.mkdir()
        try:
            with _safetensors_errors():
                yield temporary
            if point is not None:
                fault_point(f"{point}-write")
            _use_ordinary_modes(temporary)
            for path in (*temporary.iterdir(), temporary):
                _sync(path)
            if point is not None:
                fault_point(f"{point}-rename")
            _put_in_place(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _use_ordinary_modes(directory: Path) -> None:
    """Let others read the files as they may read any that this process creates: safetensors makes its own private."""
    probe = directory / f"{_TEMPORARY}mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in directory.iterdir():
        if path.is_file():
            path.chmod(mode)


def replace_file(path: Path, data: bytes) -> None:
    """Give a file this content, durably; readers see the old content or the new."""
    temporary = path.parent / f"{_TEMPORARY}{path.name}"
    with storage_errors(path):
        remove(temporary)
        with temporary.open("xb") as file:  # exclusively: never through a link that somebody has left there
            file.write(data)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


def remove_leftovers(directory: Path, *names: str) -> None:
    """Remove what a killed process left half-written of `names`, which are patterns, in `directory`."""
    for pattern in [f"{_TEMPORARY}{old}{name}" for name in names for old in ("", _OLD)]:
        for path in directory.glob(pattern):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a directory as far as it can be; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _safetensors_errors() -> Iterator[None]:
    """Raise OSError for what the operating system refuses; safetensors words it as an error of its own."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename; an older directory of that name steps aside first, because POSIX does not replace a full one."""
    aside = target.parent / f"{_TEMPORARY}{_OLD}{target.name}"
    if os.path.lexists(target):
        remove(aside)
        os.rename(target, aside)
    os.rename(temporary, target)
    _sync(target.parent)
    remove(aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
