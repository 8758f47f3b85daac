"""The one seam for file operations of a store: what a place that can hold stores must be able to do.

Whoever writes or reads a store does it through `Files`, by names relative to the store's root, with `/` between their
parts. Files are created whole or not at all, and never changed. `open_files` chooses the class: LocalFiles for a
directory, MemoryFiles for tests. All errors are of `storage.errors`.

Nothing is read, written, moved or removed outside of the store, whatever lies in it: only plain files are read, of a
bounded size, and no link is followed.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from storage.files.regular import LARGEST_FILE

TEMPORARY = "tmp"
QUARANTINE = "quarantine"


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells a file from its replacement without reading it: inode, size in bytes, modification time in ns.

    Not the time of the last status change: a store that is copied by hard links, or given other rights, under its
    readers would be hashed anew. A change that leaves all three as they were is found by the checksums of chunks.
    Where there are no inodes, `inode` is any number that a replacement of the file would not share.
    """

    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Take it from a stat result."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


class Files(Protocol):
    """The files of one store. Several processes and threads may use it at once.

    A class of files names this one as its base: what it leaves out is found when it is built, not when it is missed.

    *Durable* means that a power loss after the call takes nothing of it back. Where a place has no directories
    of its own, a directory is the common beginning of names, and exists while a file is in it.

    Raises:
        CorruptionError: something else stands in place of a directory of the store, in every method that takes a name.
        OutOfSpaceError: there is no room, in every method that writes.
        StorageUnavailableError: the place refuses for any other reason, in every method.
    """

    @abstractmethod
    def __str__(self) -> str:
        """Return the store as messages name it, and as `open_files` takes it."""
        ...

    @abstractmethod
    def place(self, name: str) -> str:
        """Return a file or directory of the store as messages name it."""
        ...

    @abstractmethod
    def root_is_file(self) -> bool:
        """Tell whether a file stands where the store should be, so that no store can be there."""
        ...

    @abstractmethod
    def contains(self, other: Files) -> bool:
        """Tell whether another store is this one, or would lie inside of it."""
        ...

    @abstractmethod
    def require_directory(self, name: str) -> None:
        """Check that nothing but a directory has this name, if anything has. Raises CorruptionError."""
        ...

    @abstractmethod
    def read(self, name: str, *, most: int = LARGEST_FILE) -> bytes | None:
        """Return the content of a file, or None if nothing has this name. Arguments and errors as `read_stamped`."""
        ...

    @abstractmethod
    def read_stamped(self, name: str, *, most: int = LARGEST_FILE) -> tuple[bytes, Stamp] | None:
        """Return the content of a file and its stamp, or None if nothing has this name.

        The stamp is not newer than the content: a replacement in between shows later.

        Args:
            most: bytes that it may have; a larger one is refused before it is read.

        Raises:
            CorruptionError: it is larger, or not a file.
        """
        ...

    @abstractmethod
    def read_range(self, name: str, start: int, size: int, stamp: int) -> bytes | None:
        """Return `size` bytes from `start`, or None if the file is gone or its stamp no longer has this hash."""
        ...

    @abstractmethod
    def prepare(self, *directories: str) -> None:
        """Make the store and these directories of it ready for files to be created in them, durably.

        What is there already is made durable too: the process that made it may have died before it could.
        """
        ...

    @abstractmethod
    def settle(self, name: str) -> None:
        """Make durable what any process has created in a directory: it may have died, or sleep, before it could."""
        ...

    @abstractmethod
    def create(self, name: str, data: bytes, *, point: str | None = None, durable: bool = True) -> bool:
        """Create a file whole, exclusively and durably. Return False if the name is taken.

        No reader ever sees a part of it, and of several that create the same name exactly one is told True.

        Args:
            name: in a prepared directory.
            point: prefix of the fault points that the way of creating it has.
            durable: without it, a power loss may leave an empty file or none.
        """
        ...

    @abstractmethod
    def create_directory(self, name: str, objects: Mapping[str, bytes], *, point: str) -> bool:
        """Create a directory with all its files, whole, exclusively and durably. Return False if the name is taken.

        An empty directory does not take it. Where this cannot be done in one step, all files are written, whatever is
        there: the name of a directory carries the hash of its content, so that all who write it write the same.

        Args:
            name: of the directory, in a prepared directory.
            objects: content by name inside it, at least one; names may have subdirectories.
            point: prefix of the fault points that the way of creating it has.
        """
        ...

    @abstractmethod
    def tree(self, name: str) -> dict[str, int] | None:
        """Return the size of every file below a directory by its name inside it, or None if there is no directory.

        Anything but a plain file counts as one of size -1, so that it never passes for an object.
        """
        ...

    @abstractmethod
    def entries(self, name: str = ".") -> set[str]:
        """Return the names in a directory; none if there is no directory."""
        ...

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Tell whether there is a file or directory of this name."""
        ...

    @abstractmethod
    def quarantine(self, name: str) -> str | None:
        """Move a file or directory below `quarantine/`, durably, and return its name there, which was not taken.

        Returns None if there is nothing of that name (any more).
        """
        ...

    @abstractmethod
    def move_directory(self, name: str, target: str) -> bool:
        """Rename a directory, durably there. Return False if that name is taken, or this one does not exist.

        Where this cannot be done in one step, a call that was cut off is finished by the next one.
        """
        ...

    @abstractmethod
    def remove(self, name: str, *, durable: bool = True) -> None:
        """Remove a file or directory that nothing refers to, if it is there."""
        ...


StorePath = str | os.PathLike[str] | Files  # what every public function takes: a store by its path, or its files
