"""The same rows in other formats: Parquet lists, Arrow IPC, JSON Lines; and what DistillKit's layout would take."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

from storage.exchange.jsonl import NEMO_ALIGNER_KEYS, sequence_lines
from storage.rows import SequenceBatch
from storage.segments import row_starts

# Options of the writer; a dictionary is its default.
PARQUET: dict[str, dict[str, Any]] = {
    "parquet snappy": {"compression": "snappy"},
    "parquet snappy, without dictionary": {"compression": "snappy", "use_dictionary": False},
    "parquet zstd": {"compression": "zstd"},
    "parquet zstd, without dictionary": {"compression": "zstd", "use_dictionary": False},
}
# name: (k, exact values of 2 bytes, polynomial terms of 4 bytes), as DistillKit's README recommends them
DISTILLKIT = {"recommended": (128, 16, 6), "budget": (50, 1, 3)}


def table(batch: SequenceBatch, first_sequence: int = 0) -> pa.Table:
    """Lay rows out as a table: sequence, token, head as uint32 and float16 lists, tail as lists, scalars as float16."""

    def lists(values: np.ndarray, size: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(row_starts(size).astype(np.int32)), pa.array(values))

    columns = {
        "sequence": (batch.sequence_of_row + first_sequence).astype(np.int32),
        "token": batch.tokens[np.flatnonzero(batch.has_row)],
        "ids": lists(batch.head_ids, batch.head_size),
        "logprob": lists(batch.logprob.astype(np.float16), batch.head_size),
    }
    if batch.draws:
        columns["tail_ids"] = lists(batch.tail_ids, batch.tail_size)
        columns["count"] = lists(batch.count, batch.tail_size)
    for name in ("tail_logit", "logsumexp", "entropy", "next_logprob"):
        columns[name] = getattr(batch, name).astype(np.float16)
    return pa.table(columns)


def sizes(batches: list[SequenceBatch], folder: Path) -> dict[str, float | None]:
    """Return the bytes per row of each format; None where it has no place for such rows."""
    rows = sum(batch.rows for batch in batches)
    whole = pa.concat_tables([table(batch) for batch in batches])
    found: dict[str, float | None] = {}
    for name, options in PARQUET.items():
        pq.write_table(whole, folder / "rows.parquet", **options)
        found[name] = (folder / "rows.parquet").stat().st_size / rows
    for codec in ("uncompressed", "zstd"):
        feather.write_feather(whole, str(folder / "rows.arrow"), compression=codec)
        found[f"arrow ipc {codec}"] = (folder / "rows.arrow").stat().st_size / rows
    exact = not batches[0].draws
    found["nemo-aligner jsonl"] = sum(map(_nemo_bytes, batches)) / rows if exact else None
    return found


def _nemo_bytes(batch: SequenceBatch) -> int:
    lines = sequence_lines(batch, numbers=range(len(batch)), padding=0)
    return sum(len(json.dumps({key: value for key, value in json.loads(line).items() if key in NEMO_ALIGNER_KEYS})) + 1
               for line in lines)  # fmt: skip


def distillkit_bytes(vocab_size: int) -> dict[str, float]:
    """Calculate, not measure: bit-packed ids, the exact values, and the polynomial's coefficients."""
    bits = math.ceil(math.log2(vocab_size))
    return {name: math.ceil(k * bits / 8) + 2 * exact + 4 * terms for name, (k, exact, terms) in DISTILLKIT.items()}
