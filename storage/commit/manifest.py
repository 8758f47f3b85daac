"""The store-wide files: plan, remap, tokenizer, records, seal. Read and checked here, for writers and readers alike.

Nothing here lists a directory: what exists follows from the plan and from trying names.
"""

from __future__ import annotations

import lzma
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from storage.commit.bounds import check_counts, check_record
from storage.commit.damage import Damage, damaged_plan
from storage.commit.records import (
    DIRECTORIES,
    PLAN,
    REMAP,
    SEAL,
    TOKENIZER,
    CommitRecord,
    Seal,
    SealedShard,
    record_name,
)
from storage.errors import CorruptionError, UsageError
from storage.files.base import Files
from storage.files.regular import LARGEST_FILE
from storage.format.remap import decode_remap, remap_sha256
from storage.plan import Plan, ShardSpec
from storage.rows import Counts
from storage.values import parse_json, sha256

LARGEST_TOKENIZER = 1 << 28  # bytes of all tokenizer files together, decompressed
SEALED_SHARD_BYTES = 512  # of a line of the seal, at most
XZ_MEMORY = 1 << 27  # bytes that decompression may take; our files need a tenth of it


def read_plan(files: Files) -> Plan | None:
    """Return the plan, or None if there is no plan.json.

    Raises:
        CorruptionError: it is damaged, or holds what no plan may hold; or a directory of the store is something else.
        UsageError: this version cannot read it.
    """
    for directory in DIRECTORIES:
        files.require_directory(directory)
    try:
        data = files.read(PLAN)
    except CorruptionError as error:
        raise damaged_plan(files, error.what) from error
    if data is None:
        return None
    try:
        plan = Plan.from_json(data)
    except ValueError as error:
        raise damaged_plan(files, str(error)) from error
    return plan


def tokenizer_hashes(plan: Plan) -> Mapping[str, str]:
    """Return the sha256 (hex) of each tokenizer file by name, from the plan's `tokenizer.files`."""
    hashes: Mapping[str, str] = plan.tokenizer.get("files", {})
    return hashes


def tokenizer_name(name: str) -> str:
    """Return the store's name for a tokenizer file of a plan, which has plain names alone."""
    return f"{TOKENIZER}/{name}.xz"


def compress_tokenizer_file(data: bytes) -> bytes:
    """Return the stored form of a tokenizer file: xz, for it would else be a large part of a small store."""
    return lzma.compress(data, preset=6)


def _decompress(data: bytes, *, most: int) -> bytes:
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
    content = decoder.decompress(data, max_length=most + 1)
    if len(content) > most:
        raise ValueError(f"the tokenizer's files hold more than {LARGEST_TOKENIZER} bytes")
    if not decoder.eof or decoder.unused_data:
        raise ValueError("it is cut short or has something after its end")
    return content


class Manifest:
    """A store's files outside of its shards.

    Args:
        plan: already read.

    Attributes:
        damage: the errors for damage in it.

    All methods raise CorruptionError, naming the file, if it is missing or its content does not agree with the plan.
    """

    def __init__(self, files: Files, plan: Plan) -> None:
        self.files = files
        self.plan = plan
        self.damage = Damage(files, plan)

    @classmethod
    def open(cls, files: Files) -> Manifest:
        """Open a store.

        Raises:
            UsageError: there is no store here.
            CorruptionError: its plan is damaged.
        """
        plan = read_plan(files)
        if plan is None:
            raise UsageError(
                f"there is no store here: no {PLAN}",
                where=str(files),
                fix="name a directory that `pipeline extract` or `pipeline convert` has written",
            )
        return cls(files, plan)

    @property
    def shards(self) -> tuple[ShardSpec, ...]:
        """The shards of the plan."""
        return self.plan.shards()

    def remap(self) -> NDArray[np.uint32]:
        """Return the token id of each frequency rank [V]."""
        data = self._require(REMAP)
        try:
            remap = decode_remap(data, self.plan.vocab_size)
        except ValueError as error:
            raise self.damage.file(REMAP, str(error)) from error
        if remap_sha256(remap) != self.plan.remap_sha256:
            raise self.damage.file(REMAP, "its hash is not the plan's")
        return remap

    def tokenizer_file(self, name: str, *, most: int = LARGEST_TOKENIZER) -> bytes:
        """Return the content of a tokenizer file that the plan lists, which may be `most` bytes long."""
        path = tokenizer_name(name)
        data = self._require(path)
        try:
            content = _decompress(data, most=most)
        except (lzma.LZMAError, ValueError, EOFError) as error:
            raise self.damage.file(path, str(error)) from error
        if sha256(content) != tokenizer_hashes(self.plan)[name]:
            raise self.damage.file(path, "its hash is not the plan's")
        return content

    def record(self, spec: ShardSpec) -> CommitRecord | None:
        """Return the commit record of a shard, or None if it is not committed."""
        data = self.record_bytes(spec)
        return None if data is None else self.parse_record(spec, data)

    def record_bytes(self, spec: ShardSpec) -> bytes | None:
        """Return the content of a shard's commit record, not looked at, or None if the shard is not committed."""
        name = record_name(spec.index)
        try:
            return self.files.read(name)
        except CorruptionError as error:
            raise self.damage.shard(spec, f"its commit record: {error.what}", name=name) from error

    def parse_record(self, spec: ShardSpec, data: bytes) -> CommitRecord:
        """Read a record and check that it belongs to this shard of this store and states what it may hold."""
        name = record_name(spec.index)
        try:
            record = CommitRecord.from_json(data)
            if record.store_id != self.plan.store_id:
                raise self.damage.shard(spec, "its commit record is another store's", name=name)
            if record.spec() != spec:
                raise self.damage.shard(spec, "its commit record is another shard's", name=name)
            check_record(self.plan, record)
        except ValueError as error:
            raise self.damage.shard(spec, f"its commit record: {error}", name=name) from error
        return record

    def sealed_record(self, sealed: SealedShard) -> CommitRecord:
        """Return the record of a shard, held against the seal."""
        spec = self.shards[sealed.shard]
        record = self.record(spec)
        found = sealed.contradiction(record)
        if found is not None and found[0] == SEAL:
            raise self.damage.file(*found)
        if found is not None:
            raise self.damage.shard(spec, found[1], name=found[0])
        assert record is not None, "a missing record contradicts the seal"
        return record

    def require_sealed(self, sealed: SealedShard) -> None:
        """Check that a shard's record is the sealed one and that their numbers agree and can be those of a shard.

        It takes a tenth of the time of `sealed_record`, which checks the rest before the shard itself is used.
        """
        data = self.record_bytes(self.shards[sealed.shard])
        if data is None or sha256(data) != sealed.record_sha256 or not self._counts_agree(sealed, data):
            self.sealed_record(sealed)  # which tells what is wrong

    def _counts_agree(self, sealed: SealedShard, data: bytes) -> bool:
        try:
            counts = Counts(**parse_json(data)["counts"])
            check_counts(self.plan, counts)
        except (KeyError, TypeError, ValueError):
            return False
        return all(getattr(counts, name) == getattr(sealed, name) for name in ("sequences", "tokens", "rows"))

    def seal(self) -> Seal | None:
        """Return the seal, or None if the store is not sealed."""
        data = self._read(SEAL, most=LARGEST_FILE + SEALED_SHARD_BYTES * len(self.shards))
        if data is None:
            return None
        try:
            seal = Seal.from_json(data)
        except ValueError as error:
            raise self.damage.file(SEAL, str(error)) from error
        if seal.store_id != self.plan.store_id:
            raise self.damage.file(SEAL, "it is another store's")
        if [(item.shard, item.split) for item in seal.shards] != [(spec.index, spec.split) for spec in self.shards]:
            raise self.damage.file(SEAL, "its shards are not the plan's")
        return seal

    def _require(self, name: str) -> bytes:
        data = self._read(name)
        if data is None:
            raise self.damage.file(name, "it is missing")
        return data

    def _read(self, name: str, *, most: int = LARGEST_FILE) -> bytes | None:
        try:
            return self.files.read(name, most=most)
        except CorruptionError as error:
            raise self.damage.file(name, error.what) from error
