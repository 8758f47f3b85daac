"""Commit records and the seal: the small files whose exclusive creation makes shards, and a whole store, exist.

Data path: shard objects -> **commit record** -> **seal**. Both are canonical JSON with their own sha256 inside, so a
reader accepts exactly the bytes that a writer wrote. FORMAT.md lists the fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from storage.files.base import QUARANTINE, TEMPORARY
from storage.plan import FORMAT_VERSION, LARGEST_DOCUMENTS, SPLITS, ShardSpec, Split
from storage.rows import Counts
from storage.values import (
    Json,
    canonical_json,
    parse_json,
    require_fields,
    require_hash,
    require_list,
    require_number,
    require_section,
    require_whole,
    sha256,
    short,
)

PLAN = "plan.json"
REMAP = "remap"
SEAL = "sealed.json"
SHARDS = "shards"
COMMITS = "commits"
TOKENIZER = "tokenizer"
DIRECTORIES = (TOKENIZER, COMMITS, SHARDS, TEMPORARY, QUARANTINE)  # of the store itself
DIRECTORY_HASH_DIGITS = 16
LARGEST_NUMBER = 2**63 - 1  # that any field may state; `bounds` knows what a shard of a plan may hold

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
        """Build a record from the fields of its file, which may hold anything yet."""
        require_fields("the record", content, cls)
        _require_shard(content)
        require_hash("store_id", content["store_id"])
        for name in ("first_document", "end_document"):
            require_whole(name, content[name], least=0, most=LARGEST_DOCUMENTS)
        require_fields("counts", content["counts"], Counts)
        for name, value in content["counts"].items():
            if name != "head_mass":
                require_whole(f"counts.{name}", value, least=0, most=LARGEST_NUMBER)
        require_number("counts.head_mass", content["counts"]["head_mass"])
        require_section("objects", content["objects"])
        objects = {name: _stored_object(name, item) for name, item in content["objects"].items()}
        record = cls(**{**content, "objects": objects, "counts": Counts(**content["counts"])})
        if record.directory != directory_name(record.shard, record.objects):
            raise ValueError("the directory's name does not agree with the hashes of its objects")
        return record


def _require_shard(content: Mapping[str, Json]) -> None:
    require_whole("shard", content["shard"], least=0, most=LARGEST_NUMBER)
    if content["split"] not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, found {short(content['split'])}")


def _stored_object(name: str, item: Json) -> StoredObject:
    require_fields(name, item, StoredObject)
    require_whole(f"the size of {name}", item["size"], least=0, most=LARGEST_NUMBER)
    require_hash(f"the sha256 of {name}", item["sha256"])
    return StoredObject(**item)


def directory_name(shard: int, objects: Mapping[str, StoredObject]) -> str:
    """Return the content-derived name of a shard's directory: `<shard>-<16 hex digits>`."""
    return f"{shard:06d}-{sha256(canonical_json(_listing(objects)))[:DIRECTORY_HASH_DIGITS]}"


def _listing(objects: Mapping[str, StoredObject]) -> dict[str, Json]:
    # Not `asdict`: it takes ten times as long, for each of a shard's forty files.
    return {name: {"size": item.size, "sha256": item.sha256} for name, item in objects.items()}


@dataclass(frozen=True, kw_only=True)
class SealedShard:
    """One committed shard in the seal: the hash of its record, and its numbers, which are held against the record's.

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

    @classmethod
    def from_content(cls, content: Json) -> SealedShard:
        """Build the line of a shard from what the seal's file says, which may be anything yet."""
        require_fields("a shard of the seal", content, cls)
        _require_shard(content)
        for name in ("sequences", "tokens", "rows"):
            require_whole(name, content[name], least=0, most=LARGEST_NUMBER)
        require_hash("record_sha256", content["record_sha256"])
        return cls(**content)

    def contradiction(self, record: CommitRecord | None) -> tuple[str, str] | None:
        """Hold the record of this shard against the seal.

        Returns:
            The file that is damaged, and how; None if they agree.
        """
        name = record_name(self.shard)
        if record is None:
            return name, "its commit record is missing"
        found = SealedShard.of(record)
        if found.record_sha256 != self.record_sha256:
            return name, "its commit record is not the sealed one"
        for field, value in vars(found).items():
            if vars(self)[field] != value:
                return SEAL, f"it says {field} {vars(self)[field]} of shard {self.shard}, the commit record {value}"
        return None


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
        """Build a seal from the fields of its file, which may hold anything yet."""
        require_fields("the seal", content, cls)
        require_hash("store_id", content["store_id"])
        require_list("shards", content["shards"])
        return cls(store_id=content["store_id"], shards=tuple(map(SealedShard.from_content, content["shards"])))


def _signed(content: dict[str, Json]) -> bytes:
    """Return canonical JSON with the sha256 of the rest under `sha256`, and a line end."""
    return canonical_json({**content, "sha256": sha256(canonical_json(content))}) + b"\n"


def _read(kind: type[_Stored], data: bytes) -> _Stored:
    content = parse_json(data)
    require_section(kind.__name__, content)
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {short(version)}; this version reads {FORMAT_VERSION}")
    content.pop("sha256", None)
    stored = kind.from_content(content)
    if stored.to_json() != data:
        raise ValueError("its own sha256 does not agree with its content")
    return stored
