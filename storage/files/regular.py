"""Regular files only: opened without waiting, and looked at before a byte is read.

A named pipe would make a reader wait for ever, a device never end, a link lead elsewhere, and a sparse file of
terabytes fill the memory. Here all of them are refused, by their kind or size.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from storage.errors import CorruptionError, storage_errors

DEEPEST = 32  # directories in one another; a store has six
LONGEST_NAME = 255  # bytes, in any file system
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


def open_descriptor(
    path: str | Path, *, most: int | None = None, follow: bool = False, folder: int | None = None, where: str = ""
) -> tuple[int, os.stat_result]:
    """Open a regular file for reading, and return its descriptor and state. It never waits, whatever stands there.

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
    try:
        descriptor = os.open(path, READ if follow else READ | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno not in _NOT_OPENED:
            raise
        mode = os.stat(path, dir_fd=folder, follow_symlinks=follow and error.errno != errno.ELOOP).st_mode
        raise not_a("a file", mode, where=where or str(path)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise not_a("a file", status.st_mode, where=where or str(path))
        if most is not None and status.st_size > most:
            raise too_large(status.st_size, most, where=where or str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status


def open_regular(path: Path, *, most: int | None = None, follow: bool = False) -> BufferedReader:
    """Open a regular file as a file object. Arguments and errors as `open_descriptor`."""
    return os.fdopen(open_descriptor(path, most=most, follow=follow)[0], "rb")


def read_descriptor(descriptor: int, size: int) -> bytes:
    """Return so many bytes of an open file, from where it stands; fewer at its end."""
    data = os.read(descriptor, size)
    while len(data) < size and (more := os.read(descriptor, size - len(data))):
        data += more
    return data


def read_regular(path: Path, *, most: int = LARGEST_FILE) -> bytes | None:
    """Return the content of a regular file, or None if there is no such file.

    Raises:
        CorruptionError: something else stands there, or it is larger.
        StorageUnavailableError: it cannot be read.
    """
    with storage_errors(path):
        try:
            descriptor, status = open_descriptor(path, most=most)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return read_descriptor(descriptor, status.st_size)
        finally:
            os.close(descriptor)


def require_name(part: str) -> None:
    """Refuse what would lead out of a directory. Names come from our own code, but also from records.

    Raises:
        CorruptionError: it is not the name of a file in a directory.
    """
    if part in ("", ".", "..") or "\0" in part or len(os.fsencode(part)) > LONGEST_NAME:
        raise CorruptionError(f"{part!r} is not the name of a file in a store", fix="repair the record that names it")


def sizes_below(folder: int, prefix: str = "", depth: int = 1) -> Iterator[tuple[str, int]]:
    """Yield name and size of every file below an open directory; -1 for special files, and for what lies too deep."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False) and depth < DEEPEST:
                    inner = os.open(entry.name, READ | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                    try:
                        yield from sizes_below(inner, f"{prefix}{entry.name}/", depth + 1)
                    finally:
                        os.close(inner)
                else:
                    status = entry.stat(follow_symlinks=False)
                    yield prefix + entry.name, status.st_size if stat.S_ISREG(status.st_mode) else -1
            except (FileNotFoundError, NotADirectoryError):  # a temporary file of a running writer
                continue
