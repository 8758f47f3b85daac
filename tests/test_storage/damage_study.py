"""Damage to every file of a tiny store, bit by bit: `verify` finds all of it, and the reader returns no wrong row.

Whether a damage is found is decided by the functions that `verify` and the reader themselves use on the file concerned
(`Damage.found_in`), which makes a hundred thousand damages a matter of seconds; and for a seeded sample of the damages
by a whole `verify` and a whole reading of the store.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import storage_cases as cases
from power_loss import BATCH, small_plan
from row_check import Reading, fingerprints, read_again, read_store

from storage.commit.manifest import Manifest, read_plan
from storage.commit.open_shard import CommittedObjects, DamageError, chunk_cache
from storage.commit.records import PLAN, REMAP, SEAL
from storage.errors import DistillError
from storage.files.local import LocalFiles
from storage.reader import StoreReader
from storage.tools.verify import verify
from storage.values import sha256


@dataclass
class Found:
    """How many damages were done, how many of them looked at by the whole verify and reader, and what was missed."""

    damages: int = 0
    whole: int = 0
    findings: list[str] = field(default_factory=list)


class Damage:
    """The study of one store.

    Args:
        folder: an empty directory, best in memory.
        shards: of the store.
        seed: of the sample that the whole verify and reader look at.
    """

    def __init__(self, folder: Path, *, shards: int, seed: int) -> None:
        self.path = folder / "store"
        cases.write_store(self.path, small_plan(shards), **BATCH)
        self.content, self.rows = cases.tree(self.path), fingerprints(self.path)
        self.rng = random.Random(seed)
        self.files = LocalFiles(self.path)
        self.manifest = Manifest.open(self.files)
        seal = self.manifest.seal()
        assert seal is not None
        self.sealed = {item.shard: item.record_sha256 for item in seal.shards}
        self.records = [self.manifest.record(spec) for spec in self.manifest.shards]
        self.found = Found()

    @property
    def objects(self) -> list[str]:
        """Every file of every shard."""
        return [name for name in self.content if name.startswith("shards/")]

    def found_in(self, name: str) -> bool:
        """Whether the function that checks this file, for verify and reader alike, refuses it."""
        try:
            self._check(name)
        except (DistillError, DamageError):
            return True
        return False

    def _check(self, name: str) -> None:
        folder, _, rest = name.partition("/")
        if name == PLAN:
            if read_plan(self.files) is None:
                raise DamageError("missing", name)
        elif name == REMAP:
            self.manifest.remap()
        elif name == SEAL:
            if self.manifest.seal() is None:
                raise DamageError("missing", name)
        elif folder == "tokenizer":
            self.manifest.tokenizer_file(rest.removesuffix(".xz"))
        elif folder == "commits":
            number = int(rest.removesuffix(".json"))
            record = self.manifest.record(self.manifest.shards[number])
            if record is None or sha256(record.to_json()) != self.sealed[number]:
                raise DamageError("not the sealed one", name)
        else:
            record = self.records[int(rest[:6])]
            assert record is not None
            CommittedObjects(self.files, record, chunk_cache(0)).whole(name.removeprefix(f"{record.path}/"))

    def judge(self, label: str, names: Iterable[str], *, whole: bool) -> None:
        """Say whether the damage that is there now, to these files, is found."""
        self.found.damages += 1
        if not any(self.found_in(name) for name in names):
            self.found.findings.append(f"{label}: not found")
        if whole:
            self.judge_wholly(label)

    def judge_wholly(self, label: str, *, unread: bool = False) -> None:
        """Let the whole verify and the whole reader look. `unread`: readers have no use for what is damaged."""
        self.found.whole += 1
        if not self._verify_finds():
            self.found.findings.append(f"{label}: verify finds nothing")
        reading = read_store(self.path, self.rows)
        if reading.wrong:
            self.found.findings.append(f"{label}: wrong rows in shards {reading.wrong}")
        if not unread and not reading.errors:
            self.found.findings.append(f"{label}: the reader says nothing")

    def _verify_finds(self) -> bool:
        try:
            report = verify(self.path)
        except DistillError:
            return True  # no store any more
        return bool(report.problems) or not report.sealed  # a missing seal is told as such

    @contextmanager
    def replaced(self, contents: dict[str, bytes | None]) -> Iterator[None]:
        """Give files other contents for a while; None takes one away."""
        for name, data in contents.items():
            (self.path / name).unlink()
            if data is not None:
                (self.path / name).write_bytes(data)
        try:
            yield
        finally:
            for name in contents:
                (self.path / name).write_bytes(self.content[name])

    def bits(self, *, every: int = 1, whole_every: int = 500) -> None:
        """Flip each bit of each file, or a seeded sample of one in `every`."""
        for name, data in self.content.items():
            descriptor = os.open(self.path / name, os.O_WRONLY)
            for bit in self._some(len(data) * 8, every):
                place, flipped = bit // 8, data[bit // 8] ^ 1 << bit % 8
                os.pwrite(descriptor, bytes([flipped]), place)
                self.judge(f"{name} bit {bit}", [name], whole=self.rng.randrange(whole_every) == 0)
                os.pwrite(descriptor, data[place : place + 1], place)
            os.close(descriptor)

    def lengths(self, *, every: int = 1, whole_every: int = 500) -> None:
        """Cut each file to each length, or to a sample of them; take it away; put a byte behind it."""
        for name, data in self.content.items():
            for length in {0, len(data) - 1, *self._some(len(data), every)}:
                with self.replaced({name: data[:length]}):
                    self.judge(f"{name} cut to {length}", [name], whole=self.rng.randrange(whole_every) == 0)
            for label, other in (("gone", None), ("longer", data + b"\n")):
                with self.replaced({name: other}):
                    self.judge(f"{name} {label}", [name], whole=self.rng.randrange(max(1, every // 10)) == 0)

    def swaps(self, *, every: int = 1, whole_every: int = 50) -> None:
        """Swap the contents of each pair of files, or of a sample; identical ones cannot be told apart, nor need be."""
        pairs = [pair for pair in combinations(self.content, 2) if self.content[pair[0]] != self.content[pair[1]]]
        for left, right in (pairs[number] for number in self._some(len(pairs), every)):
            with self.replaced({left: self.content[right], right: self.content[left]}):
                self.judge(f"{left} and {right} swapped", [left, right], whole=self.rng.randrange(whole_every) == 0)

    def shard_swaps(self) -> None:
        """Swap each pair of shard directories, and each pair of records."""
        directories = sorted((self.path / "shards").iterdir())
        records = sorted((self.path / "commits").iterdir())
        for paths in (directories, records):
            for left, right in combinations(paths, 2):
                self.found.damages += 1
                _swap(left, right)
                self.judge_wholly(f"{left.name} and {right.name} swapped")
                _swap(left, right)

    def foreign(self, folders: Iterable[Path] | None = None) -> None:
        """Put files of several kinds where they do not belong, in every directory of every shard."""
        inside = [path for path in sorted((self.path / "shards").glob("*/**")) if path.is_dir()]
        for folder in folders or inside:
            for kind, make in FOREIGN.items():
                stranger = folder / "stranger"
                make(stranger)
                self.found.damages += 1
                self.judge_wholly(f"foreign {kind} in {folder.relative_to(self.path)}", unread=True)
                _remove(stranger)

    def under_an_open_reader(self, flips: int) -> None:
        """Flip bits of objects that a reader has checked already, leaving inode, size and time as they were.

        No hash is looked at then: it is the checksums of the chunks that must tell.
        """
        reader = StoreReader(self.path, cache_bytes=0)
        read_again(reader, self.rows, Reading())
        for _ in range(flips):
            name = self.rng.choice([one for one in self.objects if not one.endswith("zarr.json")])
            bit = self.rng.randrange(len(self.content[name]) * 8)
            self._flip_unseen(name, bit)
            self.found.damages += 1
            reading = Reading()
            read_again(reader, self.rows, reading)
            if reading.wrong:
                self.found.findings.append(f"{name} bit {bit} under an open reader: wrong rows")
            self._flip_unseen(name, bit)

    def _flip_unseen(self, name: str, bit: int) -> None:
        path = self.path / name
        times = path.stat()
        descriptor = os.open(path, os.O_RDWR)
        byte = os.pread(descriptor, 1, bit // 8)[0]
        os.pwrite(descriptor, bytes([byte ^ 1 << bit % 8]), bit // 8)
        os.close(descriptor)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def _some(self, count: int, every: int) -> Iterable[int]:
        return range(count) if every == 1 else sorted(self.rng.sample(range(count), -(-count // every)))


def _swap(left: Path, right: Path) -> None:
    aside = left.parent.parent / "aside"
    left.rename(aside)
    right.rename(left)
    aside.rename(right)


def _directory_with_a_file(path: Path) -> None:
    path.mkdir()
    (path / "file").write_bytes(b"mine")


FOREIGN = {
    "file": lambda path: path.write_bytes(b"mine"),
    "empty file": lambda path: path.write_bytes(b""),
    "link to a file": lambda path: path.symlink_to("zarr.json"),
    "link to a directory": lambda path: path.symlink_to("."),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "directory with a file": _directory_with_a_file,
    "pipe": os.mkfifo,
}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        (path / "file").unlink()
        path.rmdir()
    else:
        path.unlink()
