"""What a store holds and what is missing, from its plan, records and file sizes."""

from __future__ import annotations

from dataclasses import dataclass

from storage.commit.damage import written_by
from storage.commit.manifest import Manifest
from storage.commit.records import COMMITS, SEAL, SHARDS, CommitRecord, record_name
from storage.files import open_files
from storage.files.base import QUARANTINE, TEMPORARY, Files, StorePath
from storage.plan import Split

NEWEST = 10  # commits that a pace is taken from


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast the newest shards came, by the times that the file system gives their records.

    It holds for all workers together, and for pauses between runs too.

    Attributes:
        shards, rows: committed after the oldest of the newest `NEWEST` records.
        seconds: from that record to the newest.
        rows_per_second: rows / seconds.
    """

    shards: int
    rows: int
    seconds: float
    rows_per_second: float


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a store holds.

    Attributes:
        path: the store, as `open_files` takes it.
        store_id: hash of the plan.
        teacher: its name as recorded, if it is.
        written_by: the command that writes it, and goes on with it.
        kind, k, p, draws, temperatures: what is stored per row, as in the plan.
        contents: the same in words.
        digest: sha256 of the seal; None while it is not sealed.
        shards, committed, missing: number of shards of the plan, committed and not.
        documents: of the plan, before filters.
        sequences, tokens, rows: committed, both splits.
        heldout_rows: those of `rows` that are held out.
        bytes: of every file of the store, without temporary and quarantined ones.
        bytes_per_row: bytes / rows, all-in; None without rows.
        shard_bytes_per_row: the same for shards, records and seal alone: what grows with the corpus.
        head_mass: mean probability that the exact head keeps; None without rows or without heads.
        pace: of a store that is not finished; None if it is, or if there are too few records to tell.
    """

    path: str
    store_id: str
    teacher: str | None
    written_by: str
    kind: str
    k: int
    p: float | None
    draws: int
    temperatures: tuple[float, ...]
    contents: str
    digest: str | None
    shards: int
    committed: int
    missing: int
    documents: int
    sequences: int
    tokens: int
    rows: int
    heldout_rows: int
    bytes: int
    bytes_per_row: float | None
    shard_bytes_per_row: float | None
    head_mass: float | None
    pace: Pace | None


def status(path: StorePath) -> Status:
    """Return what a store holds.

    Raises:
        UsageError: there is no store.
        CorruptionError: plan, seal or a commit record is damaged.
    """
    files = open_files(path)
    manifest = Manifest.open(files)
    seal = manifest.seal()
    records = [record for spec in manifest.shards if (record := manifest.record(spec)) is not None]
    plan, rows = manifest.plan, _rows(records)
    size, growing = _sizes(files)
    return Status(
        path=str(files),
        store_id=plan.store_id,
        teacher=plan.recorded.get("teacher", {}).get("name"),
        written_by=written_by(plan),
        kind=plan.target.kind,
        k=plan.target.k,
        p=plan.target.p,
        draws=plan.target.draws,
        temperatures=plan.target.temperatures,
        contents=plan.target.describe(),
        digest=None if seal is None else seal.digest,
        shards=len(manifest.shards),
        committed=len(records),
        missing=len(manifest.shards) - len(records),
        documents=plan.documents,
        sequences=sum(record.counts.sequences for record in records),
        tokens=sum(record.counts.tokens for record in records),
        rows=rows,
        heldout_rows=_rows(records, "heldout"),
        bytes=size,
        bytes_per_row=size / rows if rows else None,
        shard_bytes_per_row=growing / rows if rows else None,
        head_mass=_head_mass(records) if rows and plan.target.k else None,
        pace=_pace(files, records) if seal is None else None,
    )


def _pace(files: Files, records: list[CommitRecord]) -> Pace | None:
    found = [(files.read_stamped(record_name(record.shard)), record) for record in records]
    newest = sorted((item[1].modified, record.counts.rows) for item, record in found if item is not None)[-NEWEST:]
    seconds = (newest[-1][0] - newest[0][0]) / 1e9 if newest else 0.0
    if seconds <= 0.0:
        return None
    rows = sum(count for _, count in newest[1:])
    return Pace(shards=len(newest) - 1, rows=rows, seconds=seconds, rows_per_second=rows / seconds)


def _head_mass(records: list[CommitRecord]) -> float:
    return sum(record.counts.head_mass * record.counts.rows for record in records) / _rows(records)


def _rows(records: list[CommitRecord], split: Split | None = None) -> int:
    return sum(record.counts.rows for record in records if split in (None, record.split))


def _sizes(files: Files) -> tuple[int, int]:
    """Return bytes of all files, and of those that grow with the number of rows."""
    sizes = {
        name: size
        for name, size in (files.tree(".") or {}).items()
        if name.split("/")[0] not in (TEMPORARY, QUARANTINE) and size > 0
    }
    growing = sum(size for name, size in sizes.items() if name.split("/")[0] in (SHARDS, COMMITS, SEAL))
    return sum(sizes.values()), growing
