"""Regular files only: opened without waiting, and looked at before a byte is read.

A named pipe would make a reader wait for ever, a device never end, a link lead elsewhere, and a sparse file of
terabytes fill the memory. Here all of them are refused, by their kind or size.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from storage.errors import CorruptionError, storage_errors

LARGEST_FILE = 1 << 28  # bytes of a file for which nothing says how large it may be; descriptions, not weights
READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_NOT_OPENED = {errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR}  # a link, a socket, a device without a driver
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of(mode: int) -> str:
    """Say what a file is by the mode of its stat result."""
    return _KINDS.get(stat.S_IFMT(mode), "a special file")


def not_a(wanted: str, mode: int, *, where: str, name: str = "it") -> CorruptionError:
    """Return the error for what stands in place of a file or directory.

    Args:
        wanted: `a file` or `a directory`.
        name: of it, as the message begins.
    """
    return CorruptionError(
        f"{name} is {kind_of(mode)}, not {wanted}",
        where=where,
        fix=f"put {wanted} itself there, or take away what is: links are not followed, nor special files read",
    )


def too_large(size: int, most: int, *, where: str) -> CorruptionError:
    """Return the error for a file that is larger than it may be."""
    fix = "bring it back from a copy"
    return CorruptionError(f"it has {size} bytes, more than the {most} that it may have", where=where, fix=fix)


def open_regular(
    path: str | Path, *, most: int | None = None, follow: bool = False, folder: int | None = None, where: str = ""
) -> BufferedReader:
    """Open a regular file for reading. It never waits, whatever stands there.

    Args:
        path: relative to `folder`, if that is given.
        most: bytes that it may have.
        follow: a link is followed if it leads to a regular file.
        folder: descriptor of an open directory.
        where: the file as messages name it; default: `path`.

    Raises:
        FileNotFoundError, OSError: it is not there (with `follow`, a link may lead nowhere), or cannot be opened.
        CorruptionError: it is something else, or larger.
    """
    named = where or str(path)

    def opened(name: str, flags: int) -> int:
        return os.open(name, READ if follow else READ | os.O_NOFOLLOW, dir_fd=folder)

    try:
        file = open(path, "rb", opener=opened)  # noqa: SIM115  # the caller closes it
    except OSError as error:
        if error.errno not in _NOT_OPENED:
            raise
        mode = os.stat(path, dir_fd=folder, follow_symlinks=error.errno != errno.ELOOP and follow).st_mode
        raise not_a("a file", mode, where=named) from error
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise not_a("a file", status.st_mode, where=named)
        if most is not None and status.st_size > most:
            raise too_large(status.st_size, most, where=named)
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: Path, *, most: int = LARGEST_FILE, follow: bool = False) -> bytes | None:
    """Return the content of a regular file, or None if there is no such file. Arguments as `open_regular`.

    Raises:
        CorruptionError: something else stands there, or it is larger.
        StorageUnavailableError: it cannot be read.
    """
    with storage_errors(path):
        try:
            with open_regular(path, most=most, follow=follow) as file:
                return file.read(os.fstat(file.fileno()).st_size)
        except (FileNotFoundError, NotADirectoryError):
            return None
