"""The writer: how shards, and in the end the whole store, come to exist.

Data path: plan, `SequenceBatch` -> encode -> shard directory -> **commit record** -> **seal**. FORMAT.md tells the
protocol. There are no locks, clocks or servers: any number of processes may run this on the same store, and a process
may die anywhere.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from storage.commit.aside import discard
from storage.commit.bounds import check_record
from storage.commit.manifest import (
    LARGEST_TOKENIZER,
    Manifest,
    compress_tokenizer_file,
    read_plan,
    tokenizer_hashes,
    tokenizer_name,
)
from storage.commit.records import COMMITS, PLAN, REMAP, SEAL, SHARDS, TOKENIZER, CommitRecord, Seal, record_name
from storage.errors import CorruptionError, IdentityError, UsageError
from storage.faults import fault_point
from storage.files import open_files
from storage.files.base import QUARANTINE, TEMPORARY, Files, StorePath
from storage.format.encode import counts_of, encode_shard
from storage.format.remap import encode_remap, invert, is_permutation, remap_sha256
from storage.format.validate import check_batch
from storage.plan import Plan, ShardSpec, difference
from storage.rows import SequenceBatch
from storage.values import NOT_STATED, sha256

log = logging.getLogger("topk_distill.storage")

_BEFORE_PLAN = {TEMPORARY, REMAP, TOKENIZER, COMMITS, SHARDS}  # what a creation that was cut off may leave
LOOKS = 64  # for records of other processes, each time that progress is told


class StoreWriter:
    """Writes the shards of one store.

    Use `StoreWriter.create`, then `commit` for every shard of `missing()`, then `seal`.

    Attributes:
        plan: the plan as stored; `recorded` is the first writer's.
    """

    def __init__(self, files: Files, plan: Plan, remap: NDArray[np.uint32]) -> None:
        self.plan = plan
        self._files = files
        self._manifest = Manifest(files, plan)
        self._rank = invert(remap)
        self._records: dict[int, CommitRecord] = {}
        self._unseen = OrderedDict((spec.index, spec) for spec in self._manifest.shards)  # no record seen of them yet

    @classmethod
    def create(
        cls,
        path: StorePath,
        plan: Plan,
        *,
        remap: NDArray[np.uint32],
        tokenizer_files: Mapping[str, bytes],
    ) -> StoreWriter:
        """Create a store, or go on with the one that is there if it has the same identity.

        Args:
            path: of the store; what is missing is created.
            plan: what the store holds.
            remap: token id of each frequency rank [V]; its hash is in the plan.
            tokenizer_files: content by plain file name; hashes in `plan.tokenizer["files"]`.

        Raises:
            IdentityError: the store there has another plan; the message lists the fields that differ.
            UsageError: the directory is not empty and no store, or the arguments contradict the plan.
            CorruptionError: the store there is damaged.
            OutOfSpaceError, StorageUnavailableError: the file system refuses.
        """
        files = open_files(path)
        stored = cls.stored_plan(files, plan, remap=remap, tokenizer_files=tokenizer_files)
        if stored is None:
            files.prepare(TEMPORARY, TOKENIZER, SHARDS, COMMITS)
            _start(files, plan, remap, tokenizer_files)
            files.create(PLAN, plan.to_json(), point="plan")
            stored = read_plan(files)
            assert stored is not None
            _require_same(files, stored, plan)  # another process may have been first
        files.prepare(TEMPORARY, TOKENIZER, SHARDS, COMMITS)
        _create_parts(files, stored, remap, tokenizer_files)
        return cls(files, stored, remap)

    @staticmethod
    def stored_plan(
        path: StorePath,
        plan: Plan,
        *,
        remap: NDArray[np.uint32],
        tokenizer_files: Mapping[str, bytes],
    ) -> Plan | None:
        """Return the plan of the store that `create` would go on with, or None if it would begin one. Writes nothing.

        Arguments and errors are those of `create`, which begins with this.
        """
        _check_arguments(plan, remap, tokenizer_files)
        files = open_files(path)
        stored = read_plan(files)
        if stored is None:
            _refuse_foreign(files)
        else:
            _require_same(files, stored, plan)
        return stored

    def committed(self) -> frozenset[int]:
        """Return the indices of committed shards. Tries every record; raises CorruptionError for a damaged one."""
        for spec in self._manifest.shards:
            if spec.index not in self._records:
                record = self._manifest.record(spec)
                if record is not None:
                    self._remember(record)
        return frozenset(self._records)

    def count_committed(self) -> int:
        """Return how many shards are known to be committed, for telling progress; the cost is bounded.

        Up to `LOOKS` of the others are looked for, a few more each time: where more are missing, what other processes
        commit is counted late.
        """
        for _ in range(min(LOOKS, len(self._unseen))):
            index, spec = self._unseen.popitem(last=False)
            if not self.is_committed(spec):
                self._unseen[index] = spec
        return len(self._manifest.shards) - len(self._unseen)

    def missing(self) -> list[ShardSpec]:
        """Return the shards that are not committed yet, in order."""
        committed = self.committed()
        return [spec for spec in self._manifest.shards if spec.index not in committed]

    def is_committed(self, shard: ShardSpec) -> bool:
        """Tell whether a shard has a commit record now, without reading it."""
        return self._files.exists(record_name(shard.index))

    def commit(
        self, shard: ShardSpec, batch: SequenceBatch, *, logprob: NDArray[np.float32] | None = None
    ) -> CommitRecord:
        """Write a shard and commit it. If it is committed already, what is stored stays and is returned.

        Args:
            shard: one of the plan's.
            batch: all its sequences, in order of document and window; may be empty.
            logprob: log-probabilities [H] to encode in place of the batch's: those that the same codec gives back, as
                `StoreReader.read` has them without scaling, so that no value is rounded twice.

        Raises:
            ValueError, NumericsError: the batch is not valid content for this shard; names the document.
            CorruptionError: the shard's record exists and is damaged.
            OutOfSpaceError, StorageUnavailableError: the file system refuses; the shard is not committed.
        """
        check_batch(self.plan, shard, batch)
        content = batch if logprob is None else replace(batch, logprob=logprob)
        objects = encode_shard(self.plan, shard, content, self._rank)
        mine = CommitRecord.of(self.plan.store_id, shard, objects, counts_of(self.plan, batch))
        check_record(self.plan, mine)
        fault_point("encoded")
        stored = self._manifest.record(shard)
        if stored is not None:
            self._files.settle(COMMITS)
        else:
            self._write_directory(mine, objects)
            fault_point("record-write")
            self._files.create(record_name(shard.index), mine.to_json(), point="record")
            self._compare_with_repaired(mine)
            stored = self._manifest.record(shard)
            if stored is None:
                raise self._manifest.damage.shard(shard, "its record vanished while it was written")
        if stored != mine:
            log.warning(
                "shard %d was committed by another process with other content (%s, here %s): keeping what is "
                "stored. What computes the rows is not deterministic across these processes.",
                shard.index, stored.directory, mine.directory,
            )  # fmt: skip
            if stored.path != mine.path:
                discard(self._files, mine.path)
        self._remember(stored)
        return stored

    def seal(self) -> str | None:
        """Seal the store once every shard is committed, and return its digest; None while shards are missing.

        Raises:
            CorruptionError: the seal there does not agree with the records, or a committed shard is gone.
        """
        if self.missing():
            return None
        seal = Seal.of(self.plan.store_id, self._records.values())
        self._files.settle(COMMITS)  # a record that another process has just linked may not be durable yet
        stored = self._manifest.seal()
        if stored is not None:
            self._files.settle(".")
        else:
            self._check_directories()
            self._files.create(SEAL, seal.to_json(), point="seal")
            stored = self._manifest.seal()
        if stored != seal:
            raise self._manifest.damage.file(SEAL, "it does not agree with the commit records")
        return seal.digest

    def _remember(self, record: CommitRecord) -> None:
        self._records[record.shard] = record
        self._unseen.pop(record.shard, None)

    def _check_directories(self) -> None:
        """Check that each record has its directory: a repair that was cut off may have moved it away already."""
        for record in self._records.values():
            if not self._files.exists(record.path):
                raise self._manifest.damage.shard(record.spec(), "its directory is missing", name=record.path)

    def _write_directory(self, record: CommitRecord, objects: Mapping[str, bytes]) -> None:
        """Take step 4: when this returns, the directory exists, whole and durable."""
        for _ in range(3):
            if self._files.create_directory(record.path, objects, point="shard"):
                return
            if self._holds(record):
                log.info("shard %d: its directory was there already, whole", record.shard)
                return
            moved = self._files.quarantine(record.path)
            log.warning("shard %d: its directory was there, damaged; moved to %s", record.shard, moved)
        raise self._manifest.damage.shard(
            record.spec(), "its directory is changed as fast as it is written", name=record.path
        )

    def _compare_with_repaired(self, record: CommitRecord) -> None:
        """Warn if a repair took this shard out and it has come out different."""
        try:
            before = self._files.read(f"{QUARANTINE}/{record_name(record.shard).replace('/', '-')}")
        except CorruptionError:  # what was there was no record either
            return
        if before is not None and before != record.to_json():
            log.warning(
                "shard %d was computed anew after a repair and differs from what it was: the program, its libraries or "
                "the machine are not what they were for the rest of the store, or its old record was damaged.",
                record.shard,
            )

    def _holds(self, record: CommitRecord) -> bool:
        """Tell whether the record's directory holds exactly its objects, by reading all of them."""
        sizes = {name: item.size for name, item in record.objects.items()}
        if self._files.tree(record.path) != sizes:
            return False
        for name, item in record.objects.items():
            data = self._files.read(f"{record.path}/{name}", most=item.size)
            if data is None or sha256(data) != item.sha256:
                return False
        return True


def _check_arguments(plan: Plan, remap: NDArray[np.uint32], tokenizer_files: Mapping[str, bytes]) -> None:
    try:
        plan.check()
    except ValueError as error:
        raise UsageError(f"the plan: {error}", where="plan") from error
    if len(remap) != plan.vocab_size or not is_permutation(remap) or remap_sha256(remap) != plan.remap_sha256:
        raise UsageError(
            f"the remap of {len(remap)} ids is not the one that the plan names (vocabulary {plan.vocab_size})",
            where="plan: remap_sha256",
            fix="build the plan with storage.format.remap.remap_sha256 of this remap",
        )
    given = {name: sha256(data) for name, data in tokenizer_files.items()}
    if given != dict(tokenizer_hashes(plan)):
        raise UsageError(
            f"the tokenizer files {sorted(given)} are not those that the plan names",
            where="plan: tokenizer.files",
            fix="build the plan with the sha256 of each tokenizer file",
        )
    if sum(map(len, tokenizer_files.values())) > LARGEST_TOKENIZER:
        raise UsageError(
            f"the tokenizer's files have more than {LARGEST_TOKENIZER} bytes together",
            where="plan: tokenizer.files",
            fix="leave out what no tokenizer needs",
        )


def _refuse_foreign(files: Files) -> None:
    """Refuse a directory that is in use for something else, unless another process has just made a store of it."""
    if files.root_is_file():
        raise UsageError("the store's path is a file", where=str(files), fix="name a directory")
    records, foreign = files.entries(COMMITS), sorted(files.entries() - _BEFORE_PLAN)
    if files.exists(PLAN):
        return
    if records:
        raise UsageError(
            f"{PLAN} is missing, but there are commit records",
            where=str(files),
            fix=f"bring {PLAN} back from a copy, or name another directory",
        )
    if foreign:
        raise UsageError(
            f"the directory is not empty and not a store: it holds {', '.join(foreign[:3])}",
            where=str(files),
            fix="name an empty or new directory",
        )


def _create_parts(files: Files, plan: Plan, remap: NDArray[np.uint32], tokenizer_files: Mapping[str, bytes]) -> None:
    """Create the remap and the tokenizer's files where they are missing, then check them all against the plan."""
    if not files.exists(REMAP):
        files.create(REMAP, encode_remap(remap))
    for name, data in sorted(tokenizer_files.items()):
        if not files.exists(tokenizer_name(name)):
            files.create(tokenizer_name(name), compress_tokenizer_file(data))
    manifest = Manifest(files, plan)
    manifest.remap()
    for name in tokenizer_files:
        manifest.tokenizer_file(name)


def _start(files: Files, plan: Plan, remap: NDArray[np.uint32], tokenizer_files: Mapping[str, bytes]) -> None:
    """Create the parts in a directory that has no plan yet."""
    try:
        _create_parts(files, plan, remap, tokenizer_files)
    except CorruptionError as error:
        raise UsageError(
            f"the creation of another store was cut off here, or is going on: {error.what}",
            where=str(files),
            fix="remove the directory, or name another one",
        ) from error


def _require_same(files: Files, stored: Plan, wanted: Plan) -> None:
    if stored.store_id == wanted.store_id:
        return
    lines = _to_be_told(difference(stored, wanted))
    raise IdentityError(
        "the store there was made with another plan:\n" + "\n".join(f"    {line}" for line in lines),
        where=files.place(PLAN),
        fix="name another directory for this plan, or go back to the settings of the store",
    )


def _to_be_told(lines: list[str]) -> list[str]:
    """Put what a configuration states first, and say of the rest, or leave out, what follows from it."""
    derived = ("documents_per_shard:", "remap_sha256:")
    own = sorted((line for line in lines if not line.startswith(derived)), key=lambda line: NOT_STATED in line)
    if not own:
        return lines
    shards = [f"{line} (follows from the rest unless it is set)" for line in lines if line.startswith(derived[0])]
    rule = f"({NOT_STATED}: as version 0.1 did, or of no effect on this corpus)"
    return [*own, *shards, *([rule] if NOT_STATED in own[-1] else [])]
