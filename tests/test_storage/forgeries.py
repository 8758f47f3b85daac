"""Forged stores: any number, text or array of a store changed by someone who then mends every hash above it.

`Forged` takes a good store apart, lets a forger change what it likes, and puts it together again so that each hash,
directory name, checksum and index agrees with what is there. `judge` then asks verify and the reader.
"""

from __future__ import annotations

import copy
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import storage_cases as cases

from storage.commit.records import CommitRecord, StoredObject, directory_name, record_name
from storage.errors import CorruptionError, UsageError
from storage.files.memory import MemoryFiles
from storage.format.chunks import CRC_BYTES, ArrayLayout, _crc, decode_index, encode_array
from storage.plan import Plan
from storage.reader import StoreReader
from storage.tools.status import status
from storage.tools.verify import verify
from storage.values import canonical_json, sha256

MEMORY = 64 * 2**20  # bytes that no look at a forged store of a few kilobytes may take
Path = tuple[str | int, ...]  # of a value in JSON

# What verify holds of rows and readers do not ask, as FORMAT.md lists it: no size or place follows from it.
MEANING = (
    "an id occurs twice", "logprob rises", "head and tail mass", "logprob is positive", "entropy is negative",
    "entropy_T is negative", "is beyond 65504", "next_logprob is positive", "does not reach mass", "head mass is",
    "sequences are not in order", "is not one of shard",
)  # fmt: skip


@dataclass
class Shard:
    """A shard taken apart: its record's fields but for hashes, and its files."""

    record: dict[str, Any]
    files: dict[str, bytes]

    def listing(self) -> dict[str, Any]:
        """The `objects` of a record that names exactly these files."""
        return {name: {"size": len(data), "sha256": sha256(data)} for name, data in self.files.items()}


def signed(content: Any) -> bytes:
    """Canonical JSON with its own sha256, as records and seals have it."""
    if not isinstance(content, dict):
        return canonical_json(content) + b"\n"
    return canonical_json({**content, "sha256": sha256(canonical_json(content))}) + b"\n"


class Forged:
    """A store taken apart. Change `plan`, `parts` or `shards`, then `put_together`.

    Attributes:
        plan: fields of plan.json but for its hashes.
        parts: remap and tokenizer files.
        shards: every shard.
    """

    def __init__(self, store: MemoryFiles) -> None:
        content = cases.contents(store)
        self.plan = json.loads(content["plan.json"])
        for name in ("sha256", "store_id"):
            del self.plan[name]
        self.parts = {name: data for name, data in content.items() if name.split("/")[0] in ("remap", "tokenizer")}
        self.shards: list[Shard] = []
        self._id = Plan.from_json(content["plan.json"]).store_id
        for number in range(len([name for name in content if name.startswith("commits/")])):
            record = json.loads(content[record_name(number)])
            start = f"shards/{record['directory']}/"
            files = {name.removeprefix(start): data for name, data in content.items() if name.startswith(start)}
            for name in ("sha256", "objects", "directory"):
                del record[name]
            self.shards.append(Shard(record, files))

    def copy(self) -> Forged:
        """Take another one to change."""
        return copy.deepcopy(self)

    def put_together(
        self,
        *,
        change_record: Callable[[int, dict[str, Any]], Any] = lambda shard, record: record,
        change_seal: Callable[[dict[str, Any]], Any] = lambda seal: seal,
    ) -> MemoryFiles:
        """Write it with all hashes mended, also above what the callables make of records and seal."""
        store = MemoryFiles("forged")
        semantic = {name: value for name, value in self.plan.items() if name != "recorded"}
        store_id = sha256(canonical_json(semantic))
        plan = {**self.plan, "store_id": store_id}
        plan["sha256"] = sha256(canonical_json(plan))
        store.put("plan.json", json.dumps(plan, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n")
        for name, data in self.parts.items():
            store.put(name, data)
        lines = []
        for number, shard in enumerate(self.shards):
            shard.files["zarr.json"] = shard.files["zarr.json"].replace(self._id.encode(), store_id.encode())
            record = change_record(
                number, {**copy.deepcopy(shard.record), "store_id": store_id, "objects": shard.listing()}
            )
            if isinstance(record, dict) and "directory" not in record:
                record["directory"] = _directory(number, record.get("objects"))
            data = signed(record)
            store.put(record_name(number), data)
            directory = f"shards/{record['directory'] if isinstance(record, dict) else number}"
            for name, content in shard.files.items():
                store.put(f"{directory}/{name}", content)
            stated = record if isinstance(record, dict) else shard.record
            counts = stated.get("counts")
            of_seal = {n: counts.get(n) if isinstance(counts, dict) else 0 for n in ("sequences", "tokens", "rows")}
            lines.append({"shard": number, "split": stated.get("split"), **of_seal, "record_sha256": sha256(data)})
        seal = {"store_id": store_id, "shards": lines, "format_version": 1}
        store.put("sealed.json", signed(change_seal(seal)))
        self._id = store_id
        return store


def _directory(number: int, objects: Any) -> str:
    try:
        return directory_name(number, {name: StoredObject(**item) for name, item in objects.items()})
    except (AttributeError, TypeError):
        return f"{number:06d}-{'0' * 16}"


# JSON ----------------------------------------------------------------------------------------------------------------

DEEP: Any = 1
for _ in range(100):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, "", "x", "../../plan.json", "\x1b[2J\u202e", -1, 0, 1, 2, 7, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63,
    10**12, 10**18, 10**40, 0.5, 1.0, -1.5, 1e300, [], {}, [1], {"a": 1}, DEEP,
)  # fmt: skip


def paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every place in a JSON value, itself left out."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from paths(inner, (*path, key))


def changes(value: Any) -> Iterator[tuple[str, Any]]:
    """What may stand in the place of a value, with a word for it."""
    for other in VALUES:
        if type(other) is not type(value) or other != value:
            yield f"{'deep' if other is DEEP else repr(other)}", other
    if type(value) is int:
        for other in (value - 1, value + 1, -value, float(value), str(value)):
            yield repr(other), other
    if isinstance(value, list):
        yield "longer", [*value, *value[-1:]]
        yield "shorter", value[:-1]
        yield "turned around", value[::-1]
    if isinstance(value, dict):
        yield "one key less", dict(list(value.items())[1:])
        yield "one key more", {**value, "more": next(iter(value.values()), 0)}


def json_forgeries(value: Any) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Every change of one place of a JSON value: where and what, and a function that makes it in a copy."""
    for path in paths(value):
        here = value
        for key in path:
            here = here[key]
        for word, other in changes(here):
            yield f"{'.'.join(map(str, path))} = {word}", lambda given, path=path, other=other: _put(given, path, other)


def _put(value: Any, path: Path, other: Any) -> Any:
    value = copy.deepcopy(value)
    here = value
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = other
    return value


# Arrays --------------------------------------------------------------------------------------------------------------


def layout_of(shard: Shard, name: str) -> ArrayLayout:
    """The layout that an array's zarr.json states, without asking whether it may."""
    content = json.loads(shard.files[f"{name}/zarr.json"])
    inner = content["codecs"][0]["configuration"]["chunk_shape"]
    by_rank = len(inner) == 2 and content["dimension_names"][1] == "row"
    axis = 1 if by_rank else 0
    return ArrayLayout(
        axis=content["dimension_names"][axis],
        dtype=np.dtype(content["data_type"]),
        length=content["shape"][axis],
        chunk=inner[axis],
        ranks=inner[1 - axis] if len(inner) == 2 else None,
        by_rank=by_rank,
        second=content["dimension_names"][1 - axis] if len(inner) == 2 else "rank",
    )


def values_of(shard: Shard, name: str) -> np.ndarray:
    """The stored values of an array of one chunk: [N] or [N, ranks]."""
    from storage.format.chunks import decode_inner

    layout = layout_of(shard, name)
    data = shard.files[f"{name}/{layout.key}"]
    index = decode_index(data[-layout.index_bytes :], layout, len(data))
    assert len(index) == 1, "stores to forge have one chunk an array"
    decoded = decode_inner(data[: int(index[0, 1])], layout)
    return (decoded.T if layout.by_rank else decoded).copy()


def put_values(shard: Shard, name: str, values: np.ndarray) -> None:
    """Write an array anew, with the length and dtype of its zarr.json unless the number of values says otherwise."""
    from dataclasses import replace

    layout = layout_of(shard, name)
    if len(values) != layout.length:
        layout = replace(layout, length=len(values), chunk=max(1, len(values)))
        shard.files[f"{name}/zarr.json"] = layout.metadata_bytes()
    shard.files[f"{name}/{layout.key}"] = encode_array(values.astype(layout.dtype), layout)


def array_changes(values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays that may stand in the place of another: single values, all of them, another length."""
    kind = values.dtype.kind
    extremes = [np.nan, np.inf, -np.inf, 1e4, -1e4, 0.0] if kind == "f" else _whole_numbers(values.dtype)
    for place in sorted({0, 1, len(values) // 2, len(values) - 1}):
        for other in extremes:
            changed = values.copy()
            changed[place] = other
            yield f"[{place}] = {other}", changed
    for other in extremes:
        yield f"all {other}", np.full_like(values, other)
    yield "turned around", values[::-1].copy()
    yield "rolled", np.roll(values, 1, axis=0)
    yield "one longer", np.concatenate([values, values[-1:]])
    yield "one shorter", values[:-1]
    if len(values) > 2:
        # A detour whose differences, in 64 bits, never fall.
        around = values.copy()
        around[1:-1] = np.iinfo(values.dtype).max - 1 if kind == "u" else values[1:-1]
        yield "a detour", around


def _whole_numbers(dtype: np.dtype) -> list[int]:
    most = int(np.iinfo(dtype).max)
    return [0, 1, 2, 7, 255, most // 2, most // 2 + 1, most - 1, most]


def bodies(shard: Shard, name: str, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """The object of an array with bytes of its compressed chunk changed, its checksum mended."""
    layout = layout_of(shard, name)
    data = shard.files[f"{name}/{layout.key}"]
    size = len(data) - layout.index_bytes - CRC_BYTES
    for _ in range(count):
        body = bytearray(data[:size])
        places = [rng.randrange(min(size, 40) if rng.random() < 0.5 else size) for _ in range(rng.choice((1, 1, 3)))]
        for place in places:
            body[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, body[place] ^ 1 << rng.randrange(8)))
        yield f"bytes {places}", bytes(body) + _crc(bytes(body)) + data[size + CRC_BYTES :]


def indices(shard: Shard, name: str) -> Iterator[tuple[str, bytes]]:
    """The object of an array with another chunk index, its checksum mended."""
    layout = layout_of(shard, name)
    data = shard.files[f"{name}/{layout.key}"]
    size = len(data) - layout.index_bytes
    for pair in ((0, 0), (0, size - 1), (0, size + 1), (1, size), (1, size - 1), (0, 2**63), (0, 2**64 - 1),
                 (2**64 - 1, size + 1), (2**64 - 1, 1), (2**63, 2**63 + size), (size, 0)):  # fmt: skip
        index = np.array(pair, "<u8").tobytes()
        yield f"index {pair}", data[:size] + index + _crc(index)


# The verdict ---------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What a look at a forged store gave.

    Attributes:
        verify, reader: what they found, "" for nothing.
        sequences: that a reader of both splits has, if it found nothing.
        peak: bytes of memory taken at once, if they were counted.
    """

    verify: str
    reader: str
    sequences: int = 0
    peak: int = 0

    def fault(self, *, sequences: int | None) -> str | None:
        """Say what is wrong with this verdict: the two disagree, or sequences were dropped or made up."""
        if self.reader and not self.verify:
            return f"only the reader refuses: {self.reader}"
        if self.verify and not self.reader and not any(part in self.verify for part in MEANING):
            return f"only verify refuses: {self.verify}"
        if not self.reader and sequences is not None and self.sequences != sequences:
            return f"{self.sequences} sequences of {sequences}"
        if self.peak > MEMORY:
            return f"took {self.peak} bytes"
        return None


def judge(store: MemoryFiles, *, memory: bool = False) -> Verdict:
    """Let verify, status and the reader look at all of a store. Anything but damage that they name goes through."""
    if memory:
        tracemalloc.start()
    try:
        report = verify(store)
        verdict = Verdict("; ".join(problem.message for problem in report.problems), "")
        try:
            verdict.sequences = sum(_read(store, split) for split in ("train", "heldout"))
            status(store)
        except CorruptionError as error:
            verdict.reader = error.what
        except UsageError as error:  # of another version, or a codec that this one does not know
            verdict.reader = verdict.verify = error.what
        verdict.peak = tracemalloc.get_traced_memory()[1] if memory else 0
    except UsageError as error:
        return Verdict(error.what, error.what)
    finally:
        if memory:
            tracemalloc.stop()
    return verdict


def _read(store: MemoryFiles, split: Any) -> int:
    reader = StoreReader(store, split=split, threads=1)
    reader.tokenizer_files()
    reader.lengths()
    for numbers in (range(len(reader)), *([number] for number in range(len(reader)))):
        batch = reader.read(numbers)
        assert len(batch) == len(numbers)
        assert batch.rows == batch.row_offset[-1] == batch.has_row.sum() == len(batch.entropy)
        assert len(batch.head_ids) == len(batch.logprob) == batch.head_offset[-1] == batch.head_size.sum()
        assert len(batch.tail_ids) == len(batch.count) == batch.tail_offset[-1] == batch.tail_size.sum()
        assert max(batch.tokens.max(initial=0), batch.head_ids.max(initial=0)) < reader.plan.vocab_size
        assert not np.isnan(batch.logprob).any()
    reader.read(range(len(reader)), targets=False)
    return len(reader)


def records_of(store: MemoryFiles) -> list[CommitRecord]:
    """Every record of a good store."""
    content = cases.contents(store)
    return [CommitRecord.from_json(content[name]) for name in sorted(content) if name.startswith("commits/")]
