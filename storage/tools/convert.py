"""Conversion: a store rewritten into a new one, with another codec, another sharding or a smaller head.

Data path: sealed store -> `StoreReader` -> **changed rows** -> `StoreWriter` -> new store. Never in place: the new plan
says in `derived_from` what it was made from and how, so the new store has an identity of its own. It goes through the
ordinary commit protocol: killed anywhere, the same call again ends in the same bytes, and several at once share the
work.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from storage.codecs import logprob_codec
from storage.commit.bounds import require_fit
from storage.commit.claims import Claims
from storage.errors import UsageError
from storage.files import open_files
from storage.files.base import StorePath
from storage.plan import COLUMN_AXES, SPLITS, Plan, ShardSpec, Split
from storage.reader import StoreReader
from storage.rows import SequenceBatch
from storage.tools.columns import ColumnFile
from storage.tools.smaller_head import smaller_head
from storage.values import Json
from storage.writer import StoreWriter


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is to change; None leaves a thing as it is.

    Attributes:
        codec: of log-probabilities: id and parameters, as plans hold them.
        k: entries of the exact head.
        documents_per_shard: size of the new shards.
        columns: columns to add.
    """

    codec: Mapping[str, Json] | None = None
    k: int | None = None
    documents_per_shard: int | None = None
    columns: tuple[ColumnFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ValuesFound:
    """How far the look-up of added values is, which comes before anything is written.

    Attributes:
        shards, checked: shards of the new store, and for how many of them every value was found.
        rows: of these shards.
        seconds, seconds_left: since the start of the look-up, and left at the same pace.
    """

    shards: int
    checked: int
    rows: int
    seconds: float
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class Converted:
    """How far a conversion is.

    Attributes:
        store: the new store, as `open_files` takes it.
        shards, committed: shards of the new store, and how many of them are known to be committed.
        rows: written by this run.
        bytes: of the shards written by this run.
        seconds, seconds_left: since the start of this run, and left at the pace of all who work on it.
        digest: of the new store; None until it is complete.
    """

    store: str
    shards: int
    committed: int
    rows: int
    bytes: int
    seconds: float
    seconds_left: float
    digest: str | None


def convert(source: StorePath, target: StorePath, conversion: Conversion) -> Iterator[ValuesFound | Converted]:
    """Write a changed copy of a store; tells after each shard, and last of all the new digest. Must be exhausted.

    Where columns are added to a store that is not begun yet, all their values are looked up first, shard by shard.

    Args:
        source: a sealed store. It is read only, and verified while it is read.
        target: where the new store goes; a conversion that was cut off goes on there.
        conversion: what changes.

    Raises:
        UsageError: the source is not sealed, nothing would change, the change is impossible, or the target is in use
            for something else.
        IdentityError: the target holds another store, or a column's file was changed meanwhile.
        CorruptionError: the source is damaged.
        OutOfSpaceError, StorageUnavailableError: the file system refuses; what is committed stays valid.
    """
    old, new = open_files(source), open_files(target)
    readers = {split: StoreReader(old, split=split) for split in SPLITS}
    origin = readers["train"]
    if old.contains(new):
        raise UsageError("a store is never converted in place", where=str(new), fix="name a directory outside of it")
    plan = converted_plan(origin, conversion)
    require_fit(plan, sum(map(len, readers.values())))
    remap, tokenizer_files = origin.remap, origin.tokenizer_files()
    if StoreWriter.stored_plan(new, plan, remap=remap, tokenizer_files=tokenizer_files) is None:
        # Whoever began a store that is there has checked the same files: its plan names their hashes.
        yield from _check_values(readers, plan, columns=conversion.columns)
    writer = StoreWriter.create(new, plan, remap=remap, tokenizer_files=tokenizer_files)
    meter = _Meter(store=str(new), plan=plan, writer=writer)
    with closing(Claims(new).turns(writer.missing(), writer.is_committed)) as turns:
        for spec in turns:
            reader = readers[spec.split]
            numbers = _sequences(reader, spec)
            batch = _converted(reader, numbers, plan=plan, columns=conversion.columns)
            points = reader.read(numbers, scaled=False).logprob if _keeps_heads(plan, reader.plan) else None
            meter.count(batch.rows, writer.commit(spec, batch, logprob=points).size)
            yield meter.told()
    yield meter.told(writer.seal())


class _Meter:
    """Counts what this run writes, and tells how far the store is, at which others may work too."""

    def __init__(self, *, store: str, plan: Plan, writer: StoreWriter) -> None:
        self._store, self._writer, self._shards = store, writer, len(plan.shards())
        self._began = time.perf_counter()
        self._done_before = len(writer.committed())
        self._rows = self._bytes = 0

    def count(self, rows: int, size: int) -> None:
        self._rows += rows
        self._bytes += size

    def told(self, digest: str | None = None) -> Converted:
        """Return what to tell after a shard, or with the digest in the end."""
        committed = self._writer.count_committed()
        seconds = time.perf_counter() - self._began
        return Converted(
            store=self._store,
            shards=self._shards,
            committed=committed,
            rows=self._rows,
            bytes=self._bytes,
            seconds=seconds,
            seconds_left=seconds / max(committed - self._done_before, 1) * (self._shards - committed),
            digest=digest,
        )


def converted_plan(origin: StoreReader, conversion: Conversion) -> Plan:
    """Return the plan of the new store. Raises UsageError if nothing would change or the change is impossible."""
    plan = origin.plan
    changed: dict[str, Json] = {}
    if conversion.codec is not None:
        parameters = logprob_codec(conversion.codec).parameters()  # all of them, and known ones
        if parameters != plan.codecs["logprob"]:
            changed["codecs"] = {**plan.codecs, "logprob": parameters}
    if conversion.k is not None and conversion.k != plan.target.k:
        _check_k(plan, conversion.k)
        changed["target"] = replace(plan.target, k=conversion.k)
    if conversion.documents_per_shard not in (None, plan.documents_per_shard):
        changed["documents_per_shard"] = conversion.documents_per_shard
    if conversion.columns:
        changed["columns"] = {**plan.columns, **_new_columns(plan, conversion)}
    if not changed:
        raise UsageError(
            "nothing would change: the store is like that already",
            where="pipeline convert",
            fix="name another codec, a smaller k or another number of documents per shard",
        )
    new = replace(plan, **changed)
    before, after = plan.semantic(), new.semantic()
    what = {name: {"from": before.get(name), "to": after[name]} for name in sorted(changed)}
    derived = {"store_id": plan.store_id, "digest": origin.digest, "changed": what}
    if conversion.columns:
        derived["column_files"] = {column.name: column.sha256 for column in conversion.columns}
    return replace(new, derived_from=derived)


def _new_columns(plan: Plan, conversion: Conversion) -> dict[str, dict[str, str]]:
    names = [*plan.columns, *(column.name for column in conversion.columns)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"there would be two columns {twice}", where="columns", fix="give the new one another name")
    return {column.name: column.about for column in conversion.columns}


def _check_values(
    readers: Mapping[Split, StoreReader], plan: Plan, *, columns: tuple[ColumnFile, ...]
) -> Iterator[ValuesFound]:
    """Look up every value once before anything is written: one that is missing would be found hours later."""
    began, rows = time.perf_counter(), 0
    shards = plan.shards() if columns else ()
    for checked, spec in enumerate(shards, start=1):
        numbers = _sequences(readers[spec.split], spec)
        batch = readers[spec.split].read(numbers, targets=False)
        for column in columns:
            column.values(batch, np.asarray(numbers))
        rows += batch.rows
        seconds = time.perf_counter() - began
        yield ValuesFound(
            shards=len(shards),
            checked=checked,
            rows=rows,
            seconds=seconds,
            seconds_left=seconds / checked * (len(shards) - checked),
        )


def _check_k(plan: Plan, k: int) -> None:
    if plan.target.k == 0:
        raise UsageError("rows of samples alone have no head", where="k", fix="leave k out")
    if not 0 < k < plan.target.k:
        raise UsageError(
            f"k: {k} is not a smaller head: the store has heads of {plan.target.k}, and beyond that nothing is known",
            where="k",
            fix=f"name a k from 1 to {plan.target.k - 1}, or extract anew for a larger head",
        )


def _keeps_heads(plan: Plan, old: Plan) -> bool:
    """Tell whether heads stay as they are stored. Rounded once more, one in 200 would have an entry that changes."""
    return plan.target.k == old.target.k and plan.codecs["logprob"] == old.codecs["logprob"]


def _converted(reader: StoreReader, numbers: range, *, plan: Plan, columns: tuple[ColumnFile, ...]) -> SequenceBatch:
    """Return these sequences as the new store holds them."""
    batch = reader.read(numbers)
    new = {
        axis: {item.name: item.values(batch, np.asarray(numbers)) for item in columns if item.axis == axis}
        for axis in COLUMN_AXES
    }
    batch = replace(
        batch,
        row_columns={**(batch.row_columns or {}), **new["row"]} or None,
        sequence_columns={**(batch.sequence_columns or {}), **new["sequence"]} or None,
    )
    if plan.target.k < reader.plan.target.k:
        return smaller_head(batch, plan.target, origin=reader.plan.store_id)
    return batch


def _sequences(reader: StoreReader, spec: ShardSpec) -> range:
    """Return the numbers of the sequences of a document range, by looking into the old shards that meet it."""
    old = reader.plan.shards()
    after = bisect_right(reader.shards, spec.first_document, key=lambda item: old[item.shard].end_document)
    beyond = bisect_left(reader.shards, spec.end_document, key=lambda item: old[item.shard].first_document)
    if after >= beyond:
        return range(0)
    first, end = int(reader.starts[after]), int(reader.starts[beyond])
    documents = reader.read(range(first, end), targets=False).document
    inside = np.searchsorted(documents, [spec.first_document, spec.end_document])
    return range(first + int(inside[0]), first + int(inside[1]))
