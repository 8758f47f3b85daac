"""Any exception -> three lines for a person and an exit code for a machine.

The error tree itself is in `storage.errors`, so that all three packages can raise from it. Here the rest of the world
is mapped onto it: the operating system, memory, interruption, click. What fits nowhere is a bug of ours.

| exit code | meaning |
|---|---|
| 0 | ok |
| 1 | `pipeline diff`: the stores differ |
| 2 | usage or configuration |
| 3 | identity mismatch: teacher, tokenizer, corpus or plan |
| 4 | corruption |
| 5 | storage unavailable |
| 6 | out of space or memory |
| 7 | numerics: NaN or infinity |
| 70 | bug |
| 75 | interrupted, or another process of the run is lost; the same command again goes on |
| 130 | interrupted; nothing to go on from |
"""

from __future__ import annotations

import errno
import traceback
from dataclasses import dataclass
from pathlib import Path

import click

from stages.out_of_memory import is_out_of_memory
from storage.errors import NO_SPACE, DistillError, OutOfSpaceError, StorageUnavailableError, UsageError, no_space

BUG = 70
RESUMABLE = 75
INTERRUPTED = 130

_UNAVAILABLE = frozenset(
    {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT}
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What the user sees of a failure. Fields as in `DistillError`."""

    what: str
    where: str | None
    fix: str | None
    exit_code: int

    def lines(self) -> list[str]:
        """Return the lines for stderr: what, and where and what to do if known."""
        labelled = (("error", self.what), ("where", self.where), ("fix", self.fix))
        return [f"{label}: {text}" for label, text in labelled if text is not None]


def failure_of(error: BaseException, *, command: str, resumable: bool) -> Failure:
    """Describe any exception that reached the command line.

    Args:
        command: the command that ran, such as `pipeline extract`.
        resumable: whether running the same command again goes on where it stopped.
    """
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        fix = "run the same command again to go on" if resumable else None
        # click puts an Abort of its own in the place of an interrupt, and signals say nothing.
        what = str(error) or str(error.__cause__ or "") or "interrupted"
        return Failure(what=what, where=command, fix=fix, exit_code=RESUMABLE if resumable else INTERRUPTED)
    known = _known(error, command)
    if known is not None:
        return Failure(what=known.what, where=known.where or command, fix=known.fix, exit_code=known.exit_code)
    return Failure(
        what=f"this is a bug in topk-distill: {_one_line(error)}",
        where=f"{command}, {_origin(error)}",
        fix="run the command again with --debug to see the traceback, and report it",
        exit_code=BUG,
    )


def _known(error: BaseException, command: str) -> DistillError | None:
    if isinstance(error, DistillError):
        return error
    if isinstance(error, click.ClickException):
        return UsageError(error.format_message(), where=command, fix=f"{command} --help")
    if is_out_of_memory(error):
        return OutOfSpaceError(
            f"out of memory: {_one_line(error)}",
            fix="lower chunk_size, batch_size or tokens_per_batch, or use a machine with more memory",
        )
    if isinstance(error, OSError):
        where = None if error.filename is None else str(error.filename)
        if error.errno in NO_SPACE:
            return no_space(str(error.strerror), where)
        # With a file's name it is about that file, whatever the number: gone, a loop of links, a name too long.
        if error.errno in _UNAVAILABLE or (error.errno is not None and where is not None):
            fix = "check that it is there, its permissions and mounts; pipeline doctor PATH tests a directory"
            return StorageUnavailableError(f"storage unavailable: {error.strerror}", where=where, fix=fix)
    return None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _origin(error: BaseException) -> str:
    """Return file and line of the innermost frame in our own packages."""
    root = Path(__file__).resolve().parents[2]
    own = [root / package for package in ("pipeline", "stages", "storage")]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if any(path.is_relative_to(folder) for folder in own):
            return f"{path.relative_to(root).as_posix()}:{frame.lineno}"
    return "outside its own code"
