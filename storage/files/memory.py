"""A store in the memory of this process: for tests, and the measure of what a class of `Files` must do at least."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Mapping
from itertools import count

from storage.files.base import QUARANTINE, Files, Stamp
from storage.files.regular import LARGEST_FILE, not_a, too_large


class MemoryFiles(Files):
    """Files in a dictionary. A directory exists while a file is in it. Threads may share it.

    Args:
        name: of the store, in messages.

    Attributes:
        objects: content and stamp of each file by name.
    """

    def __init__(self, name: str = "memory") -> None:
        self.objects: dict[str, tuple[bytes, Stamp]] = {}
        self._name = name
        self._inodes = count(1)
        self._lock = threading.RLock()

    def __str__(self) -> str:
        """Return the store's name."""
        return self._name

    def put(self, name: str, data: bytes) -> None:
        """Create or replace a file: no code of a store does that, but what damages one may."""
        with self._lock:
            self.objects[name] = data, Stamp(next(self._inodes), len(data), time.time_ns())

    def place(self, name: str) -> str:
        """Return the store's name and the file's."""
        return f"{self._name}/{name}"

    def root_is_file(self) -> bool:
        """Return False: a store is all there is."""
        return False

    def contains(self, other: Files) -> bool:
        """Tell whether it is the same store."""
        return other is self

    def require_directory(self, name: str) -> None:
        """Check that no file has this name."""
        if name in self.objects:
            raise not_a("a directory", stat.S_IFREG, where=self.place(name), name=name)

    def read(self, name: str, *, most: int = LARGEST_FILE) -> bytes | None:
        """Return the content of a file, or None if nothing has this name."""
        content = self.read_stamped(name, most=most)
        return None if content is None else content[0]

    def read_stamped(self, name: str, *, most: int = LARGEST_FILE) -> tuple[bytes, Stamp] | None:
        """Return the content of a file and its stamp, or None if nothing has this name."""
        for end in [at for at, letter in enumerate(name) if letter == "/"]:
            self.require_directory(name[:end])
        found = self.objects.get(name)
        if found is None and self.exists(name):
            raise not_a("a file", stat.S_IFDIR, where=self.place(name))
        if found is not None and found[1].size > most:
            raise too_large(found[1].size, most, where=self.place(name))
        return found

    def read_range(self, name: str, start: int, size: int, stamp: int) -> bytes | None:
        """Return `size` bytes from `start`, or None if the file is gone or its stamp no longer has this hash."""
        found = self.objects.get(name)
        return None if found is None or hash(found[1]) != stamp else found[0][start : start + size]

    def prepare(self, *directories: str) -> None:
        """Do nothing: names need no directory."""

    def settle(self, name: str) -> None:
        """Do nothing: no power loss leaves anything of this process."""

    def create(self, name: str, data: bytes, *, point: str | None = None, durable: bool = True) -> bool:
        """Create a file. Return False if the name is taken."""
        with self._lock:
            if self.exists(name):
                return False
            self.put(name, data)
            return True

    def create_directory(self, name: str, objects: Mapping[str, bytes], *, point: str) -> bool:
        """Create a directory with all its files. Return False if the name is taken."""
        with self._lock:
            if self.exists(name):
                return False
            for part, data in objects.items():
                self.put(f"{name}/{part}", data)
            return True

    def tree(self, name: str) -> dict[str, int] | None:
        """Return the size of every file below a directory by its name inside it, or None if it does not exist."""
        start = "" if name == "." else f"{name}/"
        with self._lock:
            below = [found for found in self.objects if found.startswith(start)]
            return {found[len(start) :]: len(self.objects[found][0]) for found in below} or None

    def entries(self, name: str = ".") -> set[str]:
        """Return the names in a directory; none if there is no directory."""
        return {found.split("/")[0] for found in self.tree(name) or ()}

    def exists(self, name: str) -> bool:
        """Tell whether there is a file or directory of this name."""
        return name in self.objects or self.tree(name) is not None

    def quarantine(self, name: str) -> str | None:
        """Move a file or directory below `quarantine/`, and return its name there; None if it does not exist."""
        with self._lock:
            target = f"{QUARANTINE}/{name.replace('/', '-')}"
            if self.exists(target):
                target += f".{next(self._inodes):08x}"
            return target if self._move(name, target) else None

    def move_directory(self, name: str, target: str) -> bool:
        """Rename a directory. Return False if that name is taken, or this one does not exist."""
        with self._lock:
            return not self.exists(target) and self._move(name, target)

    def remove(self, name: str, *, durable: bool = True) -> None:
        """Remove a file or directory, if it is there."""
        with self._lock:
            for found in self._names(name):
                del self.objects[found]

    def _names(self, name: str) -> list[str]:
        """Return the name of a file, or of all in a directory."""
        return [found for found in self.objects if found == name or found.startswith(f"{name}/")]

    def _move(self, name: str, target: str) -> bool:
        names = self._names(name)
        for found in names:
            self.objects[target + found[len(name) :]] = self.objects.pop(found)
        return bool(names)
