"""The error tree of the product: every failure a user can meet, with what, where, what to do, and an exit code.

It sits at the bottom of the import order so that all three packages can raise from it. Anything that is not a
`DistillError` when it reaches the command line is a bug (exit code 70).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # a full disk, a quota, a limit on the size of files


class DistillError(Exception):
    """A failure told in three lines: what happened, where, and what to do about it.

    Args:
        what: one line, the fact, with the values found and allowed.
        where: one line, the file, key, shard or document concerned.
        fix: one line, the command or edit that mends it.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
        if self.fix is not None:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class UsageError(DistillError):
    """Wrong configuration, arguments or input data."""

    exit_code = 2


class IdentityError(DistillError):
    """Teacher, tokenizer, corpus or plan are not the ones the store was made with."""

    exit_code = 3


class CorruptionError(DistillError):
    """Stored bytes are missing, empty, short, altered, swapped or foreign."""

    exit_code = 4


class UnfinishedError(UsageError):
    """A store that is not sealed yet, where a finished one is needed."""


class StorageUnavailableError(DistillError):
    """The storage cannot be read or written: permissions, read-only, input/output errors."""

    exit_code = 5


class OutOfSpaceError(DistillError):
    """No space or memory left. What was committed stays valid."""

    exit_code = 6


def no_space(reason: str, where: str | None) -> OutOfSpaceError:
    """Return the error for an OSError of `NO_SPACE`.

    Args:
        reason: what the operating system says.
        where: the file concerned, if known.
    """
    return OutOfSpaceError(
        f"no space left: {reason}",
        where=where,
        fix="free some space or raise the limit (quota, ulimit -f), then run the same command again: "
        "what is committed stays valid",
    )


class NumericsError(DistillError):
    """NaN or infinity where a number is needed."""

    exit_code = 7


class PeerLostError(DistillError):
    """Another process of the same run has ended or cannot be reached. The same command goes on."""

    exit_code = 75


class StoppedError(DistillError):
    """A run was asked to stop, and has saved everything up to there. The same command goes on."""

    exit_code = 75


@contextmanager
def storage_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError inside into an error of ours that names `path`.

    Raises:
        OutOfSpaceError: the disk or the quota is full, or the file larger than one may be.
        StorageUnavailableError: anything else the operating system refuses.
    """
    try:
        yield
    except OSError as error:
        raise _translated(error, path) from error


def _translated(error: OSError, path: str | os.PathLike[str]) -> DistillError:
    reason = error.strerror or str(error)
    if error.errno in NO_SPACE:
        return no_space(reason, str(path))
    fixes = {
        errno.EROFS: "the file system is read-only: name a directory that can be written",
        errno.EACCES: "give this user the right to read and write there",
        errno.EPERM: "give this user the right; or the file system has no hard links: `pipeline doctor` tells",
        errno.EIO: "the device reports an error: check it, then run the same command again",
    }
    fix = fixes.get(error.errno or 0, "check the path and the file system, then run the same command again")
    return StorageUnavailableError(f"storage refuses: {reason}", where=str(path), fix=fix)
