"""Finding and hashing the files that a source names."""

from __future__ import annotations

import glob
import hashlib
from pathlib import Path

from storage.errors import StorageUnavailableError, UsageError


def find_files(pattern: str) -> list[Path]:
    """Return the files that a path or glob pattern names, sorted by path. `**` spans directories.

    Raises:
        UsageError: nothing matches, or the path is a directory.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise UsageError(f"{path} is a directory, not a file", where="corpus.path", fix=f"use {path}/*.EXTENSION")
    found = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [name for name in found if name.is_file()]
    if not files:
        what = "no file matches the pattern" if glob.has_magic(pattern) else "no such file:"
        raise UsageError(
            f"{what} {pattern}",
            where=f"corpus.path, relative to {Path.cwd()}",
            fix="check the path; relative paths start from the working directory",
        )
    return files


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes. Raises StorageUnavailableError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise StorageUnavailableError(f"cannot read {path}: {error.strerror}", where=str(path)) from error
