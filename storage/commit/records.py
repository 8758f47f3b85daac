"""Commit records and the seal: the small files whose exclusive creation makes shards, and a whole store, exist.

Data path: shard objects -> **commit record** -> **seal**. Both are canonical JSON with their own sha256 inside, so a
reader accepts exactly the bytes that a writer wrote. FORMAT.md lists the fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from storage.plan import FORMAT_VERSION, ShardSpec, Split
from storage.rows import Counts
from storage.values import Json, canonical_json, parse_json, sha256

PLAN = "plan.json"
REMAP = "remap"
SEAL = "sealed.json"
SHARDS = "shards"
COMMITS = "commits"
TOKENIZER = "tokenizer"
DIRECTORY_HASH_DIGITS = 16

_Stored = TypeVar("_Stored", "CommitRecord", "Seal")


def record_name(shard: int) -> str:
    """Return the name of a shard's commit record."""
    return f"{COMMITS}/{shard:06d}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """A file of a shard: its size in bytes and the sha256 (hex) of its content."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """The record of one shard.

    Attributes:
        store_id: hash of the plan: a record of another store is refused.
        shard, split, first_document, end_document: the shard, as the plan has it.
        directory: below `shards/`; carries the hash of `objects`.
        objects: every file in that directory, by name.
        counts: what the shard holds.
    """

    store_id: str
    shard: int
    split: Split
    first_document: int
    end_document: int
    directory: str
    objects: Mapping[str, StoredObject]
    counts: Counts

    @classmethod
    def of(cls, store_id: str, spec: ShardSpec, objects: Mapping[str, bytes], counts: Counts) -> CommitRecord:
        """Describe a shard's files."""
        stored = {name: StoredObject(size=len(data), sha256=sha256(data)) for name, data in sorted(objects.items())}
        return cls(
            store_id=store_id,
            shard=spec.index,
            split=spec.split,
            first_document=spec.first_document,
            end_document=spec.end_document,
            directory=directory_name(spec.index, stored),
            objects=stored,
            counts=counts,
        )

    @property
    def path(self) -> str:
        """Name of the shard's directory inside the store."""
        return f"{SHARDS}/{self.directory}"

    @property
    def size(self) -> int:
        """Sum of the sizes of the shard's files."""
        return sum(item.size for item in self.objects.values())

    def spec(self) -> ShardSpec:
        """Return the shard as a plan lists it."""
        return ShardSpec(
            index=self.shard, split=self.split, first_document=self.first_document, end_document=self.end_document
        )

    def to_json(self) -> bytes:
        """Return the content of the record's file."""
        content = {**vars(self), "objects": _listing(self.objects), "counts": vars(self.counts)}
        return _signed({**content, "format_version": FORMAT_VERSION})

    @classmethod
    def from_json(cls, data: bytes) -> CommitRecord:
        """Read a record's file. Raises ValueError unless these are the bytes that a writer wrote."""
        return _read(cls, data)

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> CommitRecord:
        """Build a record from the fields of its file."""
        content["objects"] = {name: StoredObject(**item) for name, item in content["objects"].items()}
        content["counts"] = Counts(**content["counts"])
        record = cls(**content)
        numbers = [item.size for item in record.objects.values()]
        numbers += [value for name, value in vars(record.counts).items() if name != "head_mass"]
        if not all(type(number) is int and number >= 0 for number in [record.shard, *numbers]):
            raise ValueError("sizes and counts must be whole numbers")
        if record.directory != directory_name(record.shard, record.objects):
            raise ValueError("the directory's name does not agree with the hashes of its objects")
        return record


def directory_name(shard: int, objects: Mapping[str, StoredObject]) -> str:
    """Return the content-derived name of a shard's directory: `<shard>-<16 hex digits>`."""
    return f"{shard:06d}-{sha256(canonical_json(_listing(objects)))[:DIRECTORY_HASH_DIGITS]}"


def _listing(objects: Mapping[str, StoredObject]) -> dict[str, Json]:
    # Not `asdict`: it takes ten times as long, for each of a shard's forty files.
    return {name: {"size": item.size, "sha256": item.sha256} for name, item in objects.items()}


@dataclass(frozen=True, kw_only=True)
class SealedShard:
    """One committed shard in the seal: enough to open a store without reading its records.

    Attributes:
        shard, split: as in the record.
        sequences, tokens, rows: counts of the record.
        record_sha256: hash of the record's file.
    """

    shard: int
    split: Split
    sequences: int
    tokens: int
    rows: int
    record_sha256: str

    @classmethod
    def of(cls, record: CommitRecord) -> SealedShard:
        """Summarise a record."""
        return cls(
            shard=record.shard,
            split=record.split,
            sequences=record.counts.sequences,
            tokens=record.counts.tokens,
            rows=record.counts.rows,
            record_sha256=sha256(record.to_json()),
        )


@dataclass(frozen=True, kw_only=True)
class Seal:
    """The list of all committed shards; sha256 of its file is the digest of the store."""

    store_id: str
    shards: tuple[SealedShard, ...]

    @classmethod
    def of(cls, store_id: str, records: Iterable[CommitRecord]) -> Seal:
        """Summarise records, in order of their shards."""
        return cls(
            store_id=store_id,
            shards=tuple(SealedShard.of(record) for record in sorted(records, key=lambda record: record.shard)),
        )

    def to_json(self) -> bytes:
        """Return the content of the seal's file."""
        shards = [vars(item) for item in self.shards]
        return _signed({"store_id": self.store_id, "shards": shards, "format_version": FORMAT_VERSION})

    @property
    def digest(self) -> str:
        """Sha256 (hex) of the seal's file."""
        return sha256(self.to_json())

    @classmethod
    def from_json(cls, data: bytes) -> Seal:
        """Read the seal's file. Raises ValueError unless these are the bytes that a writer wrote."""
        return _read(cls, data)

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> Seal:
        """Build a seal from the fields of its file."""
        return cls(store_id=content["store_id"], shards=tuple(SealedShard(**item) for item in content["shards"]))


def _signed(content: dict[str, Json]) -> bytes:
    """Return canonical JSON with the sha256 of the rest under `sha256`, and a line end."""
    return canonical_json({**content, "sha256": sha256(canonical_json(content))}) + b"\n"


def _read(kind: type[_Stored], data: bytes) -> _Stored:
    try:
        content = parse_json(data)
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version!r}; this version reads {FORMAT_VERSION}")
        del content["sha256"]
        stored = kind.from_content(content)
        written = stored.to_json()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a {kind.__name__}: {error!r}") from error
    if written != data:
        raise ValueError("its own sha256 does not agree with its content")
    return stored
