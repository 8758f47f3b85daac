"""The place where the storage tests look at, fail, stop and count what a store does to its files.

All file operations of a store are calls of `os` (and one of `shutil`) in `storage.files.local`. Inside
`watched(watcher)` every call that changes something goes through the watcher, which makes the real call: no logic is
replaced.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import storage.files.local

CHANGING = ("mkdir", "open", "write", "fsync", "link", "unlink", "rename", "rmtree")


@dataclass
class Call:
    """A call about to be made.

    Attributes:
        function: one of CHANGING; `open` only for a file that it creates.
        path: the file concerned: of a descriptor the one that it was opened for, of link and rename the first.
        arguments: as given, but for names inside of an open directory: these are paths here.
        proceed: makes the real call and returns its result. May be called again, with other arguments.
    """

    function: str
    path: str
    arguments: tuple[Any, ...]
    proceed: Callable[..., Any]


Watcher = Callable[[Call], Any]


class SeamOs:
    """The module `os` (or `shutil`) as storage.files.local sees it."""

    def __init__(self, module: Any, watcher: Watcher, paths: dict[int, str]) -> None:
        self._module, self._watcher, self._paths = module, watcher, paths

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._module, name)
        return self._seen(name, real) if name in CHANGING else real

    def _seen(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            def proceed(*others: Any) -> Any:
                return real(*(others or arguments), **options)

            first = self._path(arguments[0], options.get("dir_fd", options.get("src_dir_fd")))
            named = (arguments[0] if isinstance(arguments[0], int) else first, *arguments[1:])
            if "dst_dir_fd" in options:
                named = (first, self._path(arguments[1], options["dst_dir_fd"]), *arguments[2:])
            if name == "open" and not arguments[1] & os.O_CREAT:
                result = proceed()
            else:
                result = self._watcher(Call(name, first, named, proceed))
            if name == "open":
                self._paths[result] = first
            return result

        return call

    def _path(self, name: Any, folder: int | None) -> str:
        """The path of a descriptor, or of a name in an open directory."""
        if isinstance(name, int):
            return self._paths.get(name, "")
        return os.path.join(self._paths.get(folder, "") if folder is not None else "", os.fspath(name))


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Send every changing call of storage.files.local through `watcher`.

    Files are synced one after another meanwhile, so that the n-th call is the same in every run.
    """
    kept = storage.files.local.os, storage.files.local.shutil, storage.files.local.PARALLEL_SYNCS
    paths: dict[int, str] = {}
    storage.files.local.os = SeamOs(os, watcher, paths)
    storage.files.local.shutil = SeamOs(shutil, watcher, paths)
    storage.files.local.PARALLEL_SYNCS = 1
    try:
        yield
    finally:
        storage.files.local.os, storage.files.local.shutil, storage.files.local.PARALLEL_SYNCS = kept


class Counter:
    """Counts calls and goes on; `names` has the function and path of each."""

    def __init__(self) -> None:
        self.names: list[tuple[str, str]] = []

    def __call__(self, call: Call) -> Any:
        self.names.append((call.function, call.path))
        return call.proceed()


class FailAt:
    """Raises an OSError at the n-th call (from 1) of one function, and notes what is synced afterwards.

    Attributes:
        failed: path of the call that failed; None if there were fewer calls.
        synced_again: that path was synced after its own sync had failed.
    """

    def __init__(self, function: str, number: int, code: int) -> None:
        self.function, self.number, self.code = function, number, code
        self.calls = 0
        self.failed: str | None = None
        self.synced_again = False

    def __call__(self, call: Call) -> Any:
        if call.function == self.function:
            self.calls += 1
            if self.calls == self.number:
                self.failed = call.path
                raise OSError(self.code, os.strerror(self.code))
        if call.function == "fsync" and self.function == "fsync" and call.path == self.failed:
            self.synced_again = True
        return call.proceed()


class FullDisk:
    """A disk with room for so many bytes: a write takes what fits, the next one fails; so does anything new."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, call: Call) -> Any:
        if call.function in ("write", "mkdir", "open", "link") and self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if call.function != "write":
            return call.proceed()
        descriptor, data = call.arguments
        written = call.proceed(descriptor, data[: self.room])
        self.room -= written
        return written


class SignalAt:
    """Sends this process a signal before its n-th call (from 1), of one function or of any."""

    def __init__(self, number: int, which: signal.Signals, function: str | None = None) -> None:
        self.number, self.which, self.function = number, which, function
        self.calls = 0

    def __call__(self, call: Call) -> Any:
        if self.function in (None, call.function):
            self.calls += 1
            if self.calls == self.number:
                os.kill(os.getpid(), self.which)
        return call.proceed()


def files_below(root: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and content of every file below a directory, by name: equal if and only if nothing was replaced."""
    return {
        path.relative_to(root).as_posix(): (path.stat().st_ino, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
