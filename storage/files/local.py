"""A store in a directory: durable, exclusive, and with errors that say what to do.

The order of system calls in here is the commit protocol's guarantee against power loss; FORMAT.md tells it in words.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from storage.errors import storage_errors
from storage.faults import fault_point
from storage.files.base import QUARANTINE, TEMPORARY, Files, Stamp

PARALLEL_SYNCS = 8
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOTSUP}


@dataclass(frozen=True)
class LocalFiles(Files):
    """File operations under one directory, the root of the store."""

    root: Path

    def __str__(self) -> str:
        """Return the directory's path."""
        return str(self.root)

    def place(self, name: str) -> str:
        """Return the path of a file or directory."""
        return str(self.root / name)

    def root_is_file(self) -> bool:
        """Tell whether something other than a directory stands at the root."""
        return self.root.exists() and not self.root.is_dir()

    def contains(self, other: Files) -> bool:
        """Tell whether another store's directory is this one or below it, also by way of symbolic links."""
        if not isinstance(other, LocalFiles):
            return False
        return Path(os.path.realpath(other.root)).is_relative_to(os.path.realpath(self.root))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if there is no such file."""
        content = self.read_stamped(name)
        return None if content is None else content[0]

    def read_stamped(self, name: str) -> tuple[bytes, Stamp] | None:
        """Return the content of a file and its stamp, or None if there is no such file."""
        path = f"{self.root}/{name}"  # a Path would take longer to build than the file to open
        with storage_errors(path):
            try:
                with open(path, "rb") as file:
                    stamp = Stamp.of(os.fstat(file.fileno()))  # before reading: a change in between shows later
                    return file.read(), stamp
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

    def read_range(self, name: str, start: int, size: int, stamp: int) -> bytes | None:
        """Return `size` bytes from `start`, or None if the file is gone or its stamp no longer has this hash."""
        path = f"{self.root}/{name}"
        with storage_errors(path):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                return None
            try:
                if hash(Stamp.of(os.fstat(descriptor))) != stamp:
                    return None
                return os.pread(descriptor, size, start)
            finally:
                os.close(descriptor)

    def prepare(self, *directories: str) -> None:
        """Create the root and the named directories in it where they are missing, and make all of them durable.

        What is there already is synced too: the process that made it may have died before it could.
        """
        with storage_errors(self.root):
            missing = [path for path in (self.root, *self.root.parents) if not path.exists()]
            there = missing[-1].parent if missing else self.root
            _sync_if_possible(there.parent)
            for path in reversed(missing):
                _make_directory(path)
                _sync_directory(path.parent)
            for name in directories:
                _make_directory(self.root / name)
                _sync_directory(self.root / name)
            _sync_directory(self.root)

    def settle(self, name: str) -> None:
        """Make durable what any process has created in a directory: it may have died, or sleep, before it could."""
        with storage_errors(self.root / name):
            _sync_directory(self.root / name)

    def create(self, name: str, data: bytes, *, point: str | None = None, durable: bool = True) -> bool:
        """Create a file whole, exclusively and durably. Return False if the name is taken.

        The content is written and synced under a temporary name, then linked: `link` fails if the name exists, and
        no reader ever sees a part. A failed fsync is not tried again on the same file: its pages may be lost already.

        Args:
            point: prefix of the fault points `<point>-link` and `<point>-linked`.
            durable: without it, nothing is synced, and a power loss may leave an empty file or none.
        """
        path = self.root / name
        with storage_errors(path):
            temporary = self._temporary()
            try:
                if durable:
                    _write_synced(temporary, data)
                else:
                    temporary.write_bytes(data)
                if point is not None:
                    fault_point(f"{point}-link")
                try:
                    os.link(temporary, path)
                    created = True
                except FileExistsError:
                    created = False
                if point is not None:
                    fault_point(f"{point}-linked")
                # Also when another process made the link: it may have died before this.
                if durable:
                    _sync_directory(path.parent)
            finally:
                with suppress(OSError):
                    os.unlink(temporary)
        return created

    def create_directory(self, name: str, objects: Mapping[str, bytes], *, point: str) -> bool:
        """Create a directory with all its files, whole, exclusively and durably. Return False if the name is taken.

        Args:
            objects: content by name inside it; names may have subdirectories.
            point: prefix of the fault points `<point>-write` (before each file), `<point>-rename`, `<point>-renamed`.
        """
        path = self.root / name
        with storage_errors(path):
            temporary = self._temporary()
            try:
                _write_tree(temporary, objects, point)
                fault_point(f"{point}-rename")
                created = _rename_exclusively(temporary, path)
                fault_point(f"{point}-renamed")
                _sync_directory(path.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return created

    def tree(self, name: str) -> dict[str, int] | None:
        """Return the size of every file below a directory by its name inside it, or None if there is no directory.

        Symbolic links and other special files count as files of size -1, so that they never pass for objects.
        """
        path = self.root / name
        found: dict[str, int] = {}
        with storage_errors(path):
            if not path.is_dir() or path.is_symlink():
                return None
            for folder, directories, names in os.walk(path, onerror=_raise_unless_gone):
                links = [entry for entry in directories if (Path(folder) / entry).is_symlink()]
                for entry in [*names, *links]:
                    file = Path(folder) / entry
                    with suppress(FileNotFoundError):  # a temporary file of a running writer
                        status = file.lstat()
                        regular = stat.S_ISREG(status.st_mode)
                        found[file.relative_to(path).as_posix()] = status.st_size if regular else -1
        return found

    def entries(self, name: str = ".") -> set[str]:
        """Return the names in a directory; none if there is no directory."""
        path = self.root / name
        with storage_errors(path):
            try:
                return set(os.listdir(path))
            except (FileNotFoundError, NotADirectoryError):
                return set()

    def exists(self, name: str) -> bool:
        """Tell whether there is a file or directory of this name."""
        return os.path.lexists(self.root / name)

    def quarantine(self, name: str) -> str | None:
        """Move a file or directory below `quarantine/`, durably, and return its name there.

        Returns None if there is nothing of that name (any more).
        """
        path = self.root / name
        target = f"{QUARANTINE}/{name.replace('/', '-')}"
        if self.exists(target):
            target += f".{os.urandom(4).hex()}"
        with storage_errors(path):
            _make_directory(self.root / QUARANTINE)
            _sync_directory(self.root)
            try:
                os.rename(path, self.root / target)
            except FileNotFoundError:
                return None
            _sync_directory(self.root / QUARANTINE)
            _sync_directory(path.parent)
        return target

    def move_directory(self, name: str, target: str) -> bool:
        """Rename a directory, durably there. Return False if that name is taken, or there is none of this name."""
        path, new = self.root / name, self.root / target
        with storage_errors(path):
            _make_directory(new.parent)
            try:
                moved = _rename_exclusively(path, new)
            except FileNotFoundError:
                return False
            _sync_directory(new.parent)
        return moved

    def remove(self, name: str, *, durable: bool = True) -> None:
        """Remove a file or directory that nothing refers to, if it is there."""
        path = self.root / name
        with storage_errors(path):
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    os.unlink(path)
            except FileNotFoundError:
                return
            if durable:
                _sync_directory(path.parent)

    def _temporary(self) -> Path:
        _make_directory(self.root / TEMPORARY)
        return self.root / TEMPORARY / f"{os.getpid()}-{os.urandom(6).hex()}"


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _write_tree(root: Path, objects: Mapping[str, bytes], point: str) -> None:
    """Write every file, then sync every file and directory, side by side.

    One after another, a hundred syncs take a quarter of a second on a busy disk; side by side, journalling file
    systems join them, and it takes a twentieth of that.
    """
    folders = {root}
    os.mkdir(root)
    with ExitStack() as opened:
        descriptors = []
        for name, data in objects.items():
            path = root / name
            for parent in reversed(path.parents):
                if parent.is_relative_to(root) and parent not in folders:
                    os.mkdir(parent)
                    folders.add(parent)
            fault_point(f"{point}-write")
            descriptors.append(_open(path, _CREATE, opened))
            _write(descriptors[-1], data)
        descriptors += [_open(folder, _DIRECTORY, opened) for folder in sorted(folders)]
        with ThreadPoolExecutor(PARALLEL_SYNCS) as pool:
            list(pool.map(os.fsync, descriptors))


def _make_directory(path: Path) -> None:
    with suppress(FileExistsError):
        os.mkdir(path)


def _write_synced(path: Path, data: bytes) -> None:
    with ExitStack() as opened:
        descriptor = _open(path, _CREATE, opened)
        _write(descriptor, data)
        os.fsync(descriptor)


def _sync_directory(path: Path) -> None:
    with ExitStack() as opened:
        os.fsync(_open(path, _DIRECTORY, opened))


def _sync_if_possible(path: Path) -> None:
    """Sync a directory that need not be ours; where that cannot be done, no process of ours has written there."""
    try:
        _sync_directory(path)
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise


def _open(path: Path, flags: int, opened: ExitStack) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    opened.callback(os.close, descriptor)
    return descriptor


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _rename_exclusively(source: Path, target: Path) -> bool:
    """Rename a directory. POSIX refuses a target that is not empty, and no store directory is ever empty."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        raise
    return True
