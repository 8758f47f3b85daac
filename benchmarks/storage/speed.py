"""How fast a store is read and opened, beside plain zarr-python on the same shards and Parquet lists of the same rows.

Every side ends with the same thing for each sequence: its head and tail as numpy arrays, ids uint32, log-probabilities
float32. Only "zarr, raw arrays" stops at stored numbers, which is less. Times begin with a path and include opening.
Ours also checks sha256 and crc32c of all that it reads and returns the other arrays of a row; Parquet checks nothing.
Every side may use all cores: ours and Parquet decode in threads, zarr-python does in its own way.
All sides run in the same rounds, one after the other, and a ratio is the median of the ratios of the rounds.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from storage.commit.records import SEAL, Seal, SealedShard
from storage.exchange.arrow import shard_rows, to_parquet
from storage.plan import HeldoutRule, Plan
from storage.reader import StoreReader
from storage.rows import SequenceBatch
from storage.segments import row_starts

SEQUENCES_PER_READ = 64  # about what a training step reads
Rows = tuple[np.ndarray, ...]  # of one sequence: head ids, log-probabilities, tail ids, counts
Side = Callable[[], int]  # reads, and returns how many rows


def split(batch: SequenceBatch) -> Iterator[Rows]:
    """Yield the heads and tails of each sequence, as views."""
    for head, tail in zip(np.c_[batch.head_offset[:-1], batch.head_offset[1:]],
                          np.c_[batch.tail_offset[:-1], batch.tail_offset[1:]], strict=True):  # fmt: skip
        yield (batch.head_ids[slice(*head)], batch.logprob[slice(*head)],
               batch.tail_ids[slice(*tail)], batch.count[slice(*tail)])  # fmt: skip


def counted(sequences: Iterator[Rows], k: int) -> int:
    return sum(len(rows[0]) for rows in sequences) // k


@dataclass(frozen=True)
class Rounds:
    """How often everything is run, and by which clock."""

    count: int
    clock: Callable[[], float] = time.perf_counter


class Zarr:
    """Reading with plain zarr-python and the numpy lines of FORMAT.md."""

    def __init__(self, store: Path) -> None:
        import zarr

        plan = json.loads((store / "plan.json").read_bytes())
        codec = plan["codecs"]["logprob"]
        self.root_step, self.log_step = codec["root_step"], codec["log_step"]
        records = [json.loads(path.read_bytes()) for path in sorted((store / "commits").iterdir())]
        groups = [zarr.open_group(store / "shards" / record["directory"], mode="r") for record in records]
        self.shards: list[dict[str, Any]] = [dict(group.arrays()) for group in groups]

    def raw(self) -> int:
        """Read every array whole and decode nothing; return the number of rows."""
        return sum(len({name: array[:] for name, array in shard.items()}["entropy"]) for shard in self.shards)

    def decoded(self, remap: np.ndarray) -> Iterator[Rows]:
        """Read whole shards at once, then cut them into sequences."""
        for shard in self.shards:
            values = {name: array[:] for name, array in shard.items()}
            yield from self._sequences(values, remap)

    def sequences(self, remap: np.ndarray, numbers: np.ndarray) -> Iterator[Rows]:
        """Yield one sequence after another; offsets are read once for all."""
        offsets = [{name: shard[name][:].astype(int) for name in shard if name.endswith("_offset")}
                   for shard in self.shards]  # fmt: skip
        starts = np.cumsum([0, *(len(edges["row_offset"]) - 1 for edges in offsets)])
        for number in numbers:
            index = int(np.searchsorted(starts, number, side="right")) - 1
            shard, edges, at = self.shards[index], offsets[index], int(number - starts[index])
            span = {name: slice(*edge[at : at + 2]) for name, edge in edges.items()}
            rows, tail = span["row_offset"], span["tail_offset"]
            values = {name: shard[name][rows] for name in ("head_ids", "head_size", "tail_size", "tail_logit")}
            values |= {"logprob": shard["logprob"][:, rows], "tail_ids": shard["tail_ids"][tail]}
            values |= {"count": shard["count"][tail]}
            for name in ("logsumexp", "entropy", "next_logprob"):
                shard[name][rows]
            shard["tokens"][span["token_offset"]]
            values["row_offset"] = np.array([0, rows.stop - rows.start])
            values["tail_offset"] = np.array([0, tail.stop - tail.start])
            yield from self._sequences(values, remap)

    def _sequences(self, values: Mapping[str, np.ndarray], remap: np.ndarray) -> Iterator[Rows]:
        D, E = self.root_step, self.log_step
        code = values["logprob"].T.astype("i8").cumsum(axis=1)
        root = np.maximum(1 - code * D / 2, D / E)
        logprob = np.where(code < 2 / D - 2 / E, 2 * np.log(root), 2 * np.log(D / E) - (code - 2 / D + 2 / E) * E)
        log_mass = -np.logaddexp(0, values["tail_logit"].astype("f8"))
        logprob += (log_mass - np.log(np.exp(logprob).sum(axis=1)))[:, None]
        logprob, head = logprob.astype("f4"), remap[values["head_ids"]]
        size = values["tail_size"].astype("i8")
        total = np.concatenate([[0], values["tail_ids"].cumsum(dtype="i8")])
        tail = remap[total[1:] - np.repeat(total[:-1][np.minimum(np.cumsum(size) - size, len(total) - 2)], size)]
        rows, tails = values["row_offset"].astype(int), values["tail_offset"].astype(int)
        for first, end, begin, stop in zip(rows[:-1], rows[1:], tails[:-1], tails[1:], strict=True):
            yield (head[first:end].reshape(-1), logprob[first:end].reshape(-1), tail[begin:stop],
                   values["count"][begin:stop])  # fmt: skip


def parquet_sequences(table: Any) -> Iterator[Rows]:
    """Yield the rows of each sequence of a table with the columns of `formats.table`."""
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    number = columns["sequence"].to_numpy()
    edges = np.concatenate([[0], np.flatnonzero(np.diff(number)) + 1, [len(number)]])
    head, tail = (columns[name].offsets.to_numpy()[edges] for name in ("ids", "tail_ids"))
    ids, logprob, tail_ids, count = (
        columns[name].values.to_numpy() for name in ("ids", "logprob", "tail_ids", "count")
    )
    logprob = logprob.astype(np.float32)
    for begin, end, first, stop in zip(head[:-1], head[1:], tail[:-1], tail[1:], strict=True):
        yield ids[begin:end], logprob[begin:end], tail_ids[first:stop], count[first:stop]


def rates(sides: Mapping[str, Side], rounds: Rounds) -> tuple[dict[str, float], dict[str, float]]:
    """Run all sides in every round. Returns median rows/s, and how many times slower than the first, also a median."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds.count + 1):  # the first one warms up
        for name, side in sides.items():
            began = rounds.clock()
            rows = side()
            taken[name].append((rounds.clock() - began) / rows)
    times = {name: values[1:] for name, values in taken.items()}
    first = next(iter(times.values()))
    return (
        {name: 1.0 / statistics.median(values) for name, values in times.items()},
        {name: statistics.median(a / b for a, b in zip(values, first, strict=True)) for name, values in times.items()},
    )


def sequential(store: Path, parquet: Mapping[str, Path], rounds: Rounds, k: int) -> tuple[dict[str, float], ...]:
    """Read every row of a store, in order."""
    remap = StoreReader(store).remap
    starts = range(0, len(StoreReader(store)), SEQUENCES_PER_READ)
    requests = [range(first, first + SEQUENCES_PER_READ) for first in starts]

    def ours(reader: StoreReader) -> Iterator[Rows]:
        for wanted in requests:
            yield from split(reader.read(range(wanted.start, min(wanted.stop, len(reader)))))

    few = np.arange(0, len(StoreReader(store)), max(1, len(StoreReader(store)) // 64))
    sides: dict[str, Side] = {
        "ours, read": lambda: counted(ours(StoreReader(store)), k),
        "ours, one thread": lambda: counted(ours(StoreReader(store, threads=1)), k),
        "zarr, raw arrays": lambda: Zarr(store).raw(),
        "zarr, decoded": lambda: counted(Zarr(store).decoded(remap), k),
        "zarr, sequence by sequence": lambda: counted(Zarr(store).sequences(remap, few), k),
    }
    for name, path in parquet.items():
        sides[name] = lambda path=path: counted(parquet_sequences(pq.read_table(path)), k)  # type: ignore[misc]
    return rates(sides, rounds)


def random_sequences(store: Path, parquet: Path, rounds: Rounds, k: int) -> tuple[dict[str, float], ...]:
    """Read full-length sequences in random order, everything opened before; no values come from a cache."""
    numbers = _long_sequences(store)
    reader, zarr = StoreReader(store, cache_bytes=0), Zarr(store)
    file = pq.ParquetFile(parquet)
    groups = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
    rows = row_starts(_rows_of_sequences(store))

    def from_parquet(number: int) -> Iterator[Rows]:
        first, last = np.searchsorted(groups, [rows[number], rows[number + 1] - 1], side="right") - 1
        table = file.read_row_groups(list(range(first, last + 1)))
        yield from parquet_sequences(table.slice(rows[number] - groups[first], rows[number + 1] - rows[number]))

    few = numbers[: max(1, len(numbers) // 4)]
    sides: dict[str, Side] = {
        "ours, read": lambda: sum(counted(split(reader.read([number])), k) for number in numbers),
        "zarr, sequence by sequence": lambda: counted(zarr.sequences(reader.remap, few), k),
        "parquet zstd, row groups of 4096": lambda: sum(counted(from_parquet(int(number)), k) for number in few),
    }
    return rates(sides, rounds)


def _rows_of_sequences(store: Path) -> np.ndarray:
    reader = StoreReader(store)
    return np.diff(reader.read(range(len(reader)), targets=False).row_offset)


def _long_sequences(store: Path) -> np.ndarray:
    rows_S = _rows_of_sequences(store)
    longest = np.flatnonzero(rows_S >= rows_S.max() - 1)
    return np.random.default_rng(0).permutation(longest)[:80]


def open_sealed(path: Path, plan: Plan, writer_of: Callable[[Plan], Any], shards: int) -> float:
    """Return the seconds to open a sealed store of this many shards, with a synthetic seal."""
    many = replace(plan, documents=shards, documents_per_shard=1, heldout=HeldoutRule())
    writer_of(many)
    sealed = tuple(
        SealedShard(shard=spec.index, split=spec.split, sequences=3, tokens=999, rows=996, record_sha256=f"{0:064x}")
        for spec in many.shards()
    )
    (path / SEAL).write_bytes(Seal(store_id=many.store_id, shards=sealed).to_json())
    began = time.perf_counter()
    assert len(StoreReader(path).shards) == shards
    return time.perf_counter() - began


warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")


def looking(reader: StoreReader, parquet: Path) -> dict[str, float]:
    """Time an export (rows per second of processor time) and one sequence of a decoded shard (microseconds)."""
    start = time.process_time()
    rows = to_parquet(reader, parquet)
    export = time.process_time() - start
    decoded = shard_rows(reader, 0)
    start = time.perf_counter()
    for number in range(len(decoded)):
        decoded[number]
    return {
        "export_rows_per_second": rows / export,
        "slice_microseconds": (time.perf_counter() - start) / len(decoded) * 1e6,
    }
