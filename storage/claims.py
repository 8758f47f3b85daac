"""Claims: notes by which workers on one store stay out of each other's way. Never needed for correctness.

A worker leaves `tmp/claim-<shard>`, with its host and process, for the shard that it works on, and takes it away in the
end. Others prefer shards that nobody claims. When no such shard is left, claims are ignored: at worst two workers
compute the same shard, and the commit protocol keeps the first. So a claim that outlives its worker delays a shard to
the end, and nothing else. No clock is read. A claim of a dead process of this machine is known to be void at once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.files import TEMPORARY, LocalFiles
from storage.plan import ShardSpec

PREFIX = "claim-"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Who works on a shard.

    Attributes:
        host: name of the machine.
        process: its number there.
    """

    host: str
    process: int

    @classmethod
    def of_this_process(cls) -> Claim:
        """Return the claim that this process makes."""
        return cls(host=socket.gethostname(), process=os.getpid())

    @classmethod
    def read(cls, data: bytes) -> Claim | None:
        """Read a claim's file; None if it is not one."""
        host, _, number = data.decode("utf-8", errors="replace").strip().rpartition(" ")
        return cls(host=host, process=int(number)) if host and number.isdecimal() else None

    def to_bytes(self) -> bytes:
        """Return the content of the claim's file."""
        return f"{self.host} {self.process}\n".encode()

    @property
    def is_alive_here(self) -> bool:
        """Whether its process runs on this machine now. Of other machines nothing is known: False."""
        return self.host == socket.gethostname() and _runs(self.process)

    @property
    def is_void(self) -> bool:
        """Whether its process is known to have ended. Of other machines nothing is known: False."""
        return self.host == socket.gethostname() and not _runs(self.process)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


class Claims:
    """The claims on the shards of one store.

    Args:
        path: the store's directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._files = LocalFiles(Path(path))
        self._mine = Claim.of_this_process()

    def turns(self, shards: Sequence[ShardSpec], is_committed: Callable[[ShardSpec], bool]) -> Generator[ShardSpec]:
        """Yield the shards to work on, one after another, each claimed while the caller works on it.

        First come those that nobody claims, in the order given, then the claimed ones. What is committed by then is
        left out. Close it when you stop early: the claim at hand goes with it.
        """
        left = list(shards)
        while left := [spec for spec in left if not is_committed(spec)]:
            free = next((spec for spec in left if self._take(spec.index)), None)
            chosen = left[0] if free is None else free
            left.remove(chosen)
            try:
                if not is_committed(chosen):  # its worker may have ended between the look and the claim
                    yield chosen
            finally:
                if free is not None:
                    self._files.remove(_name(chosen.index))

    def alive_here(self) -> dict[int, Claim]:
        """Return the claims, by shard, of processes that run on this machine now."""
        found = {}
        for name in sorted(self._files.entries(TEMPORARY)):
            number = name.removeprefix(PREFIX)
            if name.startswith(PREFIX) and number.isdecimal():
                claim = self._read(int(number))
                if claim is not None and claim.is_alive_here:
                    found[int(number)] = claim
        return found

    def _take(self, shard: int) -> bool:
        """Claim a shard, if nobody does. A void claim is cleared first; that two may do so at once does no harm."""
        claim = self._read(shard)
        if claim is not None and claim.is_void:
            self._files.remove(_name(shard))
        return self._files.create(_name(shard), self._mine.to_bytes())

    def _read(self, shard: int) -> Claim | None:
        data = self._files.read(_name(shard))
        return None if data is None else Claim.read(data)


def _name(shard: int) -> str:
    return f"{TEMPORARY}/{PREFIX}{shard:06d}"
