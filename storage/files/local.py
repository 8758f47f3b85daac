"""A store in a directory: durable, exclusive, and with errors that say what to do.

The order of system calls in here is the commit protocol's guarantee against power loss; FORMAT.md tells it in words.
Every name is walked from the root, directory by directory, each opened without following a link, and what is done is
done inside the last of them (openat and its kin): whatever lies in a store, or is put there meanwhile, nothing outside
of it is reached.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from storage.errors import StorageUnavailableError, storage_errors
from storage.faults import fault_point
from storage.files.base import QUARANTINE, TEMPORARY, Files, Stamp
from storage.files.regular import (
    LARGEST_FILE,
    READ,
    not_a,
    open_descriptor,
    read_descriptor,
    require_name,
    sizes_below,
)

PARALLEL_SYNCS = 8
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_ROOT = os.O_RDONLY | os.O_DIRECTORY  # the user's own path, which may be a link
_DIRECTORY = _ROOT | os.O_NOFOLLOW
_ABSENT = (FileNotFoundError, NotADirectoryError)  # the second: the root is a file
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

    def require_directory(self, name: str) -> None:
        """Check that nothing but a directory has this name, if anything has."""
        with storage_errors(self.root / name), suppress(*_ABSENT), self._directory(name):
            pass

    def read(self, name: str, *, most: int = LARGEST_FILE) -> bytes | None:
        """Return the content of a file, or None if nothing has this name."""
        content = self.read_stamped(name, most=most)
        return None if content is None else content[0]

    def read_stamped(self, name: str, *, most: int = LARGEST_FILE) -> tuple[bytes, Stamp] | None:
        """Return the content of a file and its stamp, or None if nothing has this name."""
        path = f"{self.root}/{name}"  # a Path would take longer to build than the file to open
        with storage_errors(path):
            try:
                with self._at(name) as (folder, last):
                    descriptor, status = open_descriptor(last, most=most, folder=folder, where=path)
            except _ABSENT:
                return None
            try:
                # The state is older than the content: a change in between shows later.
                return read_descriptor(descriptor, status.st_size), Stamp.of(status)
            finally:
                os.close(descriptor)

    def read_range(self, name: str, start: int, size: int, stamp: int) -> bytes | None:
        """Return `size` bytes from `start`, or None if the file is gone or its stamp no longer has this hash.

        The stamp is of a file that was reached by `read_stamped`, so that no directory needs to be looked at again.
        """
        path = f"{self.root}/{name}"
        with storage_errors(path):
            try:
                descriptor = os.open(path, READ | os.O_NOFOLLOW)
            except OSError as error:
                if isinstance(error, _ABSENT) or error.errno in (errno.ELOOP, errno.ENXIO):
                    return None
                raise
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
                self._make(name)
                self.settle(name)
            _sync_directory(self.root)

    def settle(self, name: str) -> None:
        """Make durable what any process has created in a directory: it may have died, or sleep, before it could."""
        with storage_errors(self.root / name), self._directory(name) as folder:
            _sync_directory(folder)

    def create(self, name: str, data: bytes, *, point: str | None = None, durable: bool = True) -> bool:
        """Create a file whole, exclusively and durably. Return False if the name is taken.

        The content is written and synced under a temporary name, then linked: `link` fails if the name exists, and
        no reader ever sees a part. A failed fsync is not tried again on the same file: its pages may be lost already.

        Args:
            point: prefix of the fault points `<point>-link` and `<point>-linked`.
            durable: without it, nothing is synced, and a power loss may leave an empty file or none.
        """
        with storage_errors(self.root / name), self._temporary() as (making, temporary), self._at(name) as (there, new):
            try:
                _write_file(temporary, data, making, synced=durable)
                if point is not None:
                    fault_point(f"{point}-link")
                try:
                    os.link(temporary, new, src_dir_fd=making, dst_dir_fd=there)
                    created = True
                except FileExistsError:
                    created = False
                if point is not None:
                    fault_point(f"{point}-linked")
                # Also when another process made the link: it may have died before this.
                if durable:
                    _sync_directory(there)
            finally:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=making)
        return created

    def create_directory(self, name: str, objects: Mapping[str, bytes], *, point: str) -> bool:
        """Create a directory with all its files, whole, exclusively and durably. Return False if the name is taken.

        Args:
            objects: content by name inside it; names may have subdirectories.
            point: prefix of the fault points `<point>-write` (before each file), `<point>-rename`, `<point>-renamed`.
        """
        with storage_errors(self.root / name), self._temporary() as (making, temporary), self._at(name) as (there, new):
            try:
                _write_tree(temporary, objects, point, making)
                fault_point(f"{point}-rename")
                created = _rename_exclusively(temporary, new, making, there)
                fault_point(f"{point}-renamed")
                _sync_directory(there)
            finally:
                shutil.rmtree(temporary, ignore_errors=True, dir_fd=making)
        return created

    def tree(self, name: str) -> dict[str, int] | None:
        """Return the size of every file below a directory by its name inside it, or None if there is no directory.

        Symbolic links and other special files count as files of size -1, so that they never pass for objects, and so
        do directories that lie deeper than a store's.
        """
        with storage_errors(self.root / name):
            try:
                with self._at(name) as (folder, last), ExitStack() as opened:
                    return dict(sizes_below(_open(last, _DIRECTORY, opened, folder)))
            except _ABSENT:
                return None

    def entries(self, name: str = ".") -> set[str]:
        """Return the names in a directory; none if there is no directory."""
        with storage_errors(self.root / name):
            try:
                with self._at(name) as (folder, last), ExitStack() as opened:
                    return set(os.listdir(_open(last, _DIRECTORY, opened, folder)))
            except _ABSENT:
                return set()

    def exists(self, name: str) -> bool:
        """Tell whether there is anything of this name."""
        with storage_errors(self.root / name):
            try:
                with self._at(name) as (folder, last):
                    os.stat(last, dir_fd=folder, follow_symlinks=False)
            except _ABSENT:
                return False
        return True

    def quarantine(self, name: str) -> str | None:
        """Move a file or directory below `quarantine/`, durably, and return its name there.

        Returns None if there is nothing of that name (any more).
        """
        target = f"{QUARANTINE}/{name.replace('/', '-')}"
        if self.exists(target):
            target += f".{os.urandom(4).hex()}"
        with storage_errors(self.root / name):
            self._make(QUARANTINE)
            _sync_directory(self.root)
            try:
                with self._at(name) as (folder, last), self._at(target) as (there, new):
                    os.rename(last, new, src_dir_fd=folder, dst_dir_fd=there)
                    _sync_directory(there)
                    _sync_directory(folder)
            except FileNotFoundError:
                return None
        return target

    def move_directory(self, name: str, target: str) -> bool:
        """Rename a directory, durably there. Return False if that name is taken, or there is none of this name."""
        with storage_errors(self.root / name):
            self._make(target.rpartition("/")[0])
            try:
                with self._at(name) as (folder, last), self._at(target) as (there, new):
                    moved = _rename_exclusively(last, new, folder, there)
                    _sync_directory(there)
            except FileNotFoundError:
                return False
        return moved

    def remove(self, name: str, *, durable: bool = True) -> None:
        """Remove a file or directory that nothing refers to, if it is there."""
        path = self.root / name
        with storage_errors(path):
            try:
                with self._at(name) as (folder, last):
                    if stat.S_ISDIR(os.stat(last, dir_fd=folder, follow_symlinks=False).st_mode):
                        shutil.rmtree(last, dir_fd=folder)
                    else:
                        os.unlink(last, dir_fd=folder)
                    if durable:
                        _sync_directory(folder)
            except FileNotFoundError:
                return
            except RecursionError as error:
                what = "directories lie too deep in one another to be removed"
                raise StorageUnavailableError(what, where=str(path), fix="remove it by hand") from error

    def _walk(self, name: str) -> int:
        """Open a directory of the store, `.` for its root, following no link on the way; return its descriptor."""
        folder = os.open(self.root, _ROOT)
        parts = [] if name == "." else name.split("/")
        for number, part in enumerate(parts, 1):
            try:
                require_name(part)
                inner = os.open(part, _DIRECTORY, dir_fd=folder)
            except NotADirectoryError as error:
                walked = "/".join(parts[:number])
                mode = os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode
                raise not_a("a directory", mode, where=self.place(walked), name=walked) from error
            finally:
                os.close(folder)
            folder = inner
        return folder

    @contextmanager
    def _directory(self, name: str) -> Iterator[int]:
        """Open a directory of the store, as `_walk`."""
        folder = self._walk(name)
        try:
            yield folder
        finally:
            os.close(folder)

    @contextmanager
    def _at(self, name: str) -> Iterator[tuple[int, str]]:
        """Open the directory that a name lies in. Yields it and the last part of the name."""
        parent, _, last = name.rpartition("/")
        if name != ".":
            require_name(last)
        folder = self._walk(parent or ".")
        try:
            yield folder, last
        finally:
            os.close(folder)

    def _make(self, directory: str) -> None:
        with self._at(directory) as (folder, last):
            _make_directory(last, folder)

    @contextmanager
    def _temporary(self) -> Iterator[tuple[int, str]]:
        """Open the directory of temporary files. Yields it and a fresh name in it."""
        self._make(TEMPORARY)
        with self._directory(TEMPORARY) as folder:
            yield folder, f"{os.getpid()}-{os.urandom(6).hex()}"


def _write_tree(name: str, objects: Mapping[str, bytes], point: str, folder: int) -> None:
    """Write every file, then sync every file and directory, side by side.

    One after another, a hundred syncs take a quarter of a second on a busy disk; side by side, journalling file
    systems join them, and it takes a twentieth of that.
    """
    with ExitStack() as opened:
        _make_directory(name, folder, exclusively=True)
        folders = {"": _open(name, _DIRECTORY, opened, folder)}
        files = []
        for path, data in objects.items():
            inside, _, last = path.rpartition("/")
            _make_folders(inside, folders, opened)
            fault_point(f"{point}-write")
            files.append(_open(last, _CREATE, opened, folders[inside]))
            _write(files[-1], data)
        with ThreadPoolExecutor(PARALLEL_SYNCS) as pool:
            list(pool.map(os.fsync, [*files, *(folders[inside] for inside in sorted(folders))]))


def _make_folders(path: str, folders: dict[str, int], opened: ExitStack) -> None:
    """Make a directory below a new one, and those on the way to it; `folders` has what was made, open."""
    if path in folders:
        return
    parent, _, last = path.rpartition("/")
    _make_folders(parent, folders, opened)
    _make_directory(last, folders[parent], exclusively=True)
    folders[path] = _open(last, _DIRECTORY, opened, folders[parent])


def _make_directory(path: str | Path, folder: int | None = None, *, exclusively: bool = False) -> None:
    try:
        os.mkdir(path, dir_fd=folder)
    except FileExistsError:
        if exclusively:
            raise


def _write_file(path: str | Path, data: bytes, folder: int | None = None, *, synced: bool = True) -> None:
    with ExitStack() as opened:
        descriptor = _open(path, _CREATE, opened, folder)
        _write(descriptor, data)
        if synced:
            os.fsync(descriptor)


def _sync_directory(place: Path | int) -> None:
    """Sync a directory: an open one, or one by its path."""
    with ExitStack() as opened:
        os.fsync(place if isinstance(place, int) else _open(place, _ROOT, opened))


def _sync_if_possible(path: Path) -> None:
    """Sync a directory that need not be ours; where that cannot be done, no process of ours has written there."""
    try:
        _sync_directory(path)
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise


def _open(path: str | Path, flags: int, opened: ExitStack, folder: int | None = None) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644, dir_fd=folder)
    opened.callback(os.close, descriptor)
    return descriptor


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _rename_exclusively(source: str, target: str, folder: int, there: int) -> bool:
    """Rename a directory. POSIX refuses a target that is not empty, and no store directory is ever empty."""
    try:
        os.rename(source, target, src_dir_fd=folder, dst_dir_fd=there)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        raise
    return True
