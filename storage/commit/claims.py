"""Claims: notes by which workers on one store stay out of each other's way, and out of the way of garbage collection.

Every worker leaves `tmp/claim-<shard>` for the shard that it works on, with its host and process, and takes it away in
the end. Others prefer shards that nobody claims. When no such shard is left, they work beside others, with notes
`claim-<shard>-1` and so on: at worst two workers compute the same shard, and the commit protocol keeps the first. So a
claim that outlives its worker delays a shard to the end and makes `pipeline gc` ask, and nothing else. No clock is
read, and nothing is synced: after a power loss every worker has ended, and no claim holds.

A name that is taken is never taken over, not even from a dead worker: two that did so at once would remove each
other's notes. What a dead worker left is removed once its shard is committed.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Literal

from storage.errors import CorruptionError
from storage.files import open_files
from storage.files.base import TEMPORARY, StorePath
from storage.plan import ShardSpec

_CLAIM = re.compile(r"claim-(\d{6,})(-\d+)?")
_UNKNOWN = "-"
LARGEST_CLAIM = 4096  # bytes


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Who works on a shard. What a system does not tell is `-`.

    Attributes:
        host: name of the machine.
        process: its number there.
        started: when it started, in ticks since the boot: numbers of processes are used again.
        boot: id of the boot of the machine.
        namespace: in which the number counts: each container may have its own.
    """

    host: str
    process: int
    started: str = _UNKNOWN
    boot: str = _UNKNOWN
    namespace: str = _UNKNOWN

    @classmethod
    def of_this_process(cls) -> Claim:
        """Return the claim that this process makes."""
        process = os.getpid()
        return cls(
            host=socket.gethostname(),
            process=process,
            started=_started(process),
            boot=_boot(),
            namespace=_namespace(),
        )

    @classmethod
    def read(cls, data: bytes) -> Claim | None:
        """Read a claim's file; None if it is not one."""
        fields = data.decode("utf-8", errors="replace").split()
        if len(fields) not in (2, 5) or not fields[1].isdecimal() or int(fields[1]) < 1:
            return None
        host, process, *life = fields
        started, boot, namespace = life or (_UNKNOWN, _UNKNOWN, _UNKNOWN)
        return cls(host=host, process=int(process), started=started, boot=boot, namespace=namespace)

    def to_bytes(self) -> bytes:
        """Return the content of the claim's file."""
        return f"{self.host} {self.process} {self.started} {self.boot} {self.namespace}\n".encode()

    @property
    def worker(self) -> Literal["runs", "ended", "unknown"]:
        """What is known of its process. Of other machines, and of other containers of this one, nothing is."""
        if self.host != socket.gethostname():
            return "unknown"
        if _differ(self.boot, _boot()):
            return "ended"
        if _differ(self.namespace, _namespace()):
            return "unknown"
        if self.process == os.getpid() and self.started == _UNKNOWN:
            return "ended"  # an earlier process with the number of this one, more likely than this one itself
        if not _runs(self.process) or _differ(self.started, _started(self.process)):
            return "ended"
        return "runs"

    def words(self, shard: int) -> str:
        """Say who works on the shard."""
        if self.worker == "unknown":
            return f"process {self.process} of {self.host} works on shard {shard}, or was cut off there"
        return f"process {self.process} of this machine works on shard {shard}"


def _differ(noted: str, found: str) -> bool:
    return _UNKNOWN not in (noted, found) and noted != found


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _started(process: int) -> str:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
        return status.rpartition(")")[2].split()[19]  # field 22; the second is a name that may hold anything
    except (OSError, IndexError):
        return _UNKNOWN


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() or _UNKNOWN
    except OSError:
        return _UNKNOWN


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return _UNKNOWN


class Claims:
    """The claims on the shards of one store."""

    def __init__(self, path: StorePath) -> None:
        self._files = open_files(path)
        self._mine = Claim.of_this_process()

    def turns(self, shards: Sequence[ShardSpec], is_committed: Callable[[ShardSpec], bool]) -> Generator[ShardSpec]:
        """Yield the shards to work on, one after another, each claimed while the caller works on it.

        First come those that nobody claims, in the order given, then the claimed ones. What is committed by then is
        left out. Close it when you stop early: the claim at hand goes with it.
        """
        claimed = []
        for spec in shards:
            if not is_committed(spec):
                notes = self._take(spec.index)
                if notes is None:
                    claimed.append(spec)
                else:
                    yield from self._turn(spec, notes, is_committed)
        while claimed := [spec for spec in claimed if not is_committed(spec)]:
            for spec in claimed:
                notes = self._take(spec.index)
                if notes is not None:
                    break
            else:
                spec = claimed[0]
                notes = self._take(spec.index, beside=True)
                assert notes is not None
            claimed.remove(spec)
            yield from self._turn(spec, notes, is_committed)

    def about(self, entry: str) -> str:
        """Say what an entry of `tmp` is: who may be at work by it, or that it was left behind."""
        claimed = self._claimed(entry)
        if claimed is None:
            return "left by a run that was cut off"
        shard, claim = claimed
        return f"a claim: {claim.words(shard)}"

    def in_work(self) -> dict[str, tuple[int, Claim]]:
        """Return shard and claim, by the name of the note, of every worker that is not known to have ended."""
        found = {}
        for entry in sorted(self._files.entries(TEMPORARY)):
            claimed = self._claimed(entry)
            if claimed is not None:
                found[f"{TEMPORARY}/{entry}"] = claimed
        return found

    def is_left(self, entry: str) -> bool:
        """Tell whether an entry of `tmp` may go: it is not a claim, or its worker has ended."""
        if _CLAIM.fullmatch(entry) is None:
            return True
        data = self._read(f"{TEMPORARY}/{entry}")
        claim = None if data is None else Claim.read(data)
        return data is not None and (claim is None or claim.worker == "ended")

    def _turn(
        self, spec: ShardSpec, notes: list[str], is_committed: Callable[[ShardSpec], bool]
    ) -> Generator[ShardSpec]:
        try:
            if not is_committed(spec):  # its worker may have ended between the look and the claim
                yield spec
        finally:
            for name in notes if is_committed(spec) else notes[-1:]:
                self._files.remove(name, durable=False)

    def _take(self, shard: int, *, beside: bool = False) -> list[str] | None:
        """Claim a shard; return the names of dead workers' notes on it and of the own one, the last.

        None if another worker claims it; with `beside` the shard is claimed all the same.
        """
        ended: list[str] = []
        for number in count():
            name = f"{TEMPORARY}/claim-{shard:06d}" + (f"-{number}" if number else "")
            data = self._read(name)
            if data is None and self._files.create(name, self._mine.to_bytes(), durable=False):
                return [*ended, name]
            claim = None if data is None else Claim.read(data)
            if data is not None and (claim is None or claim.worker == "ended"):
                ended.append(name)
            elif not beside:
                return None
        raise AssertionError("count() has no end")

    def _read(self, name: str) -> bytes | None:
        """Return what stands under a claim's name, or None if nothing does. What is no note reads as an empty one."""
        try:
            return self._files.read(name, most=LARGEST_CLAIM)
        except CorruptionError:
            return b""

    def _claimed(self, entry: str) -> tuple[int, Claim] | None:
        """Read an entry of `tmp` if its name is a claim's; None unless its worker may be alive."""
        match = _CLAIM.fullmatch(entry)
        data = None if match is None else self._read(f"{TEMPORARY}/{entry}")
        claim = None if data is None else Claim.read(data)
        if match is None or claim is None or claim.worker == "ended":
            return None
        return int(match[1]), claim
