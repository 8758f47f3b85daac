"""Finding and hashing the files that a source names, and telling when one changes under a run."""

from __future__ import annotations

import errno
import glob
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from storage.errors import IdentityError, StorageUnavailableError, UsageError
from storage.files.regular import kind_of, open_regular


@dataclass(frozen=True, kw_only=True)
class FileState:
    """A file as it was when it was scanned. A source hashes its files once and reads them again hours later.

    Nothing else vouches for the content by then. So the time of the last status change counts too: unlike the time of
    modification, no program can set it back.
    """

    path: Path
    inode: int
    size: int  # bytes
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Return the state now. Raises StorageUnavailableError if the file is gone or cannot be reached."""
        try:
            found = path.stat()
        except OSError as error:
            raise StorageUnavailableError(
                f"cannot read {path}: {error.strerror}",
                where=str(path),
                fix="put the file back, or mount its disk, and run the same command again: what is committed is kept",
            ) from error
        return cls(
            path=path,
            inode=found.st_ino,
            size=found.st_size,
            modified_ns=found.st_mtime_ns,
            changed_ns=found.st_ctime_ns,
        )


@contextmanager
def unchanged(*states: FileState) -> Iterator[None]:
    """Check before and after the block that files are still the ones that were scanned.

    Raises:
        IdentityError: one was changed or replaced, or its owner, rights or links were changed.
        StorageUnavailableError: one is gone.
    """
    _compare(states)
    try:
        yield
    finally:
        _compare(states)  # also after an error: a line that an edit cut in two only looks like broken JSON


def _compare(states: Iterable[FileState]) -> None:
    for state in states:
        if FileState.of(state.path) != state:
            raise IdentityError(
                "the file was changed while it was being read",
                where=str(state.path),
                fix="put its content back if it is another, and run the same command again: what is committed is kept; "
                "for the new content use a new store or run directory",
            )


def user_path(name: str, *, key: str) -> Path:
    """Return the path that a configuration names, `~` expanded; it need not exist.

    Args:
        key: the configuration key that holds it, for messages.

    Raises:
        UsageError: no such user, or no path that the system could hold.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except RuntimeError as error:
        raise UsageError(f"no home directory is known for {name!r}", where=key, fix="write the path out") from error
    except ValueError as error:
        raise UsageError(f"{name!r} is not a path: {error}", where=key, fix="check the path") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            what = f"the path is too long for the system: {name[:60]!r}..., {len(name)} characters"
            raise UsageError(what, where=key, fix="check the path") from error
        # Absent or out of reach: whoever opens it knows what it was to be.
    return path


def find_files(pattern: str) -> list[Path]:
    """Return the files that a path or glob pattern names, sorted by path. `**` spans directories.

    Raises:
        UsageError: nothing matches, the path is a directory or not a path, or a match is neither file nor directory.
    """
    path = user_path(pattern, key="path")
    if path.is_dir():
        raise UsageError(f"{path} is a directory, not a file", where="path", fix=f"use {path}/*.EXTENSION")
    files = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [name for name in files if not name.is_dir()]
    for name in files:
        if not name.is_file():
            kind = kind_of(name.stat().st_mode) if name.exists() else "a link that leads nowhere"
            fix = "mount the disk that it leads to, or take it away" if name.is_symlink() else "take it away"
            fix += "; what a pipe or device gives goes into a file first: it is hashed, and read later"
            raise UsageError(f"{name} is {kind}, not a file", where="path", fix=fix)
    if not files:
        what = "no file matches the pattern" if glob.has_magic(pattern) else "no such file:"
        raise UsageError(
            f"{what} {pattern}",
            where=f"path, relative to {Path.cwd()}",
            fix="check the path; relative paths start from the working directory",
        )
    return files


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes.

    Raises:
        CorruptionError: it is not a file.
        StorageUnavailableError: it cannot be read.
    """
    try:
        with open_regular(path, follow=True) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise StorageUnavailableError(f"cannot read {path}: {error.strerror}", where=str(path)) from error
