"""What may stand in place of a file or directory by accident or malice, and what it must not do to who meets it."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SPARSE = 6 << 30  # bytes, none of them on the disk
MEMORY = 1 << 30  # that no refusal may take
SECONDS = 60.0


def _socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{folder}/{path.name}")  # the path itself may be too long
    os.close(folder)


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, SPARSE)


def _filled_directory(path: Path) -> None:
    path.mkdir()
    (path / "file").write_bytes(b"x")


SPECIAL: dict[str, Callable[[Path], None]] = {
    "named pipe": os.mkfifo,
    "socket": _socket,
    "directory": _filled_directory,
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "sparse": _sparse,
}


def put_in_place(path: Path, kind: str, aside: Path) -> None:
    """Replace a file or directory; what was there goes below `aside`. `link to what was there`: it can still be had."""
    aside.mkdir(exist_ok=True)
    there = aside / path.name
    if os.path.lexists(path):
        shutil.move(path, there)
    if kind == "link to what was there":
        path.symlink_to(there)
    else:
        SPECIAL[kind](path)


@contextmanager
def neither_waits_nor_swells(seconds: float = SECONDS) -> Iterator[None]:
    """Fail if the block takes longer than `seconds`, or gigabytes of memory. What blocks outside Python is killed."""

    def too_long(number: int, frame: object) -> None:
        raise TimeoutError(f"still waiting after {seconds} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, too_long)
    hard = threading.Timer(2 * seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))
    hard.daemon = True
    hard.start()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        hard.cancel()
    swollen = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert swollen < MEMORY, f"{swollen / 1e9:.1f} GB"


def state_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Kind, inode and content of everything in a directory, by name: changed by whoever reaches it through a link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and status.st_size < 1 << 20 else b""
        found[path.relative_to(folder).as_posix()] = (status.st_mode, status.st_ino, content)
    return found


def precious(folder: Path) -> Path:
    """Make a directory that nothing may touch, with what a store's own directories hold."""
    for name in ("file", "deep/file", "000001.json", "claim-000001", "c/0", "step-00000001/manifest.json"):
        with suppress(FileExistsError):
            (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"precious")
    return folder
