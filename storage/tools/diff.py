"""The difference between two stores: their plans field by field, then their rows.

Data path: two stores -> sequences of the same document and window -> **what differs, and by how much**. Blocks of
sequences are read side by side, so memory does not grow with the stores. Shards with equal records are not read.

What only one of the stores has, an added column or another temperature, is a difference of the plans, not of rows.

Axis legend: S sequences, R rows, H head entries, C tail entries; a, b: the two stores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.files.base import StorePath
from storage.plan import SPLITS, Split, difference
from storage.reader import StoreReader
from storage.rows import NUMBERS, SequenceBatch

SEQUENCES_PER_BLOCK = 64
EXAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class SequenceDifference:
    """A sequence that both stores have, and in which they differ.

    Attributes:
        shard: its index in the first store.
        document, window_start: which it is.
        rows: how many of its rows differ; None if its tokens do, so that rows cannot be compared.
        largest_logprob: largest difference of log-probabilities, nats.
        parts: which of the parts that `SplitDifference.other_parts` counts differ.
    """

    shard: int
    document: int
    window_start: int
    rows: int | None
    largest_logprob: float
    parts: tuple[str, ...]


@dataclass(kw_only=True)
class SplitDifference:
    """How a split differs.

    Attributes:
        only_first, only_second: sequences that one store has alone, by document and window.
        sequences: sequences that both have.
        other_tokens: those of them whose tokens, or positions with a row, differ. Their rows are not compared.
        other_parts: by name, `token_end_byte` or `column NAME`, in how many of the others it differs.
        sequences_different: those with other tokens or parts, or with a row that differs in anything.
        rows, rows_different: rows compared, and those that differ in anything.
        rows_other_head, rows_other_samples: rows with another list of head ids, or other samples.
        largest_logprob: largest difference of the log-probability of an id that both heads have, nats.
        mean_kl: mean over the rows compared of KL(first || second) over the ids that both heads have, with everything
            else as one more outcome, nats.
        shards: indices, in the first store, of the shards with a difference.
        examples: the first sequences that differ.
    """

    only_first: int = 0
    only_second: int = 0
    sequences: int = 0
    other_tokens: int = 0
    other_parts: dict[str, int] = field(default_factory=dict)
    sequences_different: int = 0
    rows: int = 0
    rows_different: int = 0
    rows_other_head: int = 0
    rows_other_samples: int = 0
    largest_logprob: float = 0.0
    mean_kl: float = 0.0
    shards: list[int] = field(default_factory=list)
    examples: list[SequenceDifference] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.only_first or self.only_second or self.sequences_different)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How two stores differ.

    Attributes:
        digests: of the first and the second store.
        plan: one line per field of the plans that differs.
        splits: the differences by split; empty if the digests are equal.
    """

    digests: tuple[str, str]
    plan: list[str]
    splits: dict[Split, SplitDifference]

    @property
    def equal(self) -> bool:
        """Whether plans and rows are the same."""
        return not self.plan and all(split.equal for split in self.splits.values())


def diff(first: StorePath, second: StorePath) -> Difference:
    """Compare two stores. Of one that is not finished, the shards committed now are compared.

    Raises:
        UsageError: there is no store.
        CorruptionError: one of them is damaged.
    """
    stores = [_open(path) for path in (first, second)]
    a, b = stores[0]["train"], stores[1]["train"]
    digests = (a.digest, b.digest)
    if a.digest == b.digest:
        return Difference(digests=digests, plan=[], splits={})
    splits = {split: _compare_split(stores[0][split], stores[1][split]) for split in stores[0]}
    return Difference(digests=digests, plan=difference(a.plan, b.plan), splits=splits)


def _open(path: StorePath) -> dict[Split, StoreReader]:
    return {split: StoreReader(path, split=split, allow_partial=True) for split in SPLITS}


def _compare_split(a: StoreReader, b: StoreReader) -> SplitDifference:
    found = SplitDifference()
    keys_a, keys_b = _keys(a), _keys(b)
    _, in_a, in_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    found.only_first, found.only_second = len(keys_a) - len(in_a), len(keys_b) - len(in_b)
    found.sequences = len(in_a)
    shards_S = np.repeat([item.shard for item in a.shards], [item.sequences for item in a.shards])
    others = set(b.shards)
    same = {item.shard for item in a.shards if item in others}  # equal records, hence equal bytes
    found.rows = sum(item.rows for item in a.shards if item.shard in same)
    to_read = ~np.isin(shards_S[in_a], list(same))
    in_a, in_b = in_a[to_read], in_b[to_read]
    kl = 0.0
    for start in range(0, len(in_a), SEQUENCES_PER_BLOCK):
        block = slice(start, start + SEQUENCES_PER_BLOCK)
        kl += _compare_block(a.read(in_a[block]), b.read(in_b[block]), shards_S[in_a[block]], found)
    found.mean_kl = kl / found.rows if found.rows else 0.0
    return found


def _keys(reader: StoreReader) -> NDArray[Any]:
    """Return document and window of every sequence, as records [S] that can be compared."""
    keys = np.zeros(len(reader), dtype=[("document", np.int64), ("window", np.int64)])
    for first in range(0, len(reader), SEQUENCES_PER_BLOCK):
        batch = reader.read(range(first, min(first + SEQUENCES_PER_BLOCK, len(reader))), targets=False)
        keys["document"][first : first + len(batch)] = batch.document
        keys["window"][first : first + len(batch)] = batch.window_start
    return keys


def _compare_block(a: SequenceBatch, b: SequenceBatch, shard_S: NDArray[np.int64], found: SplitDifference) -> float:
    """Compare sequences pairwise, add what differs to `found`, and return the sum of KL over the rows compared."""
    same_S = _same_tokens(a, b, "tokens", "has_row")
    temperatures = [value for value in a.temperatures if value in b.temperatures]
    rows_a, rows_b = (_Rows(batch, np.repeat(same_S, np.diff(batch.row_offset)), temperatures) for batch in (a, b))
    sequence_R = a.sequence_of_row[rows_a.chosen]
    other_head = _entries_differ(rows_a.head_ids, rows_a.head_size, rows_b.head_ids, rows_b.head_size)
    other_samples = _entries_differ(rows_a.samples, rows_a.tail_size, rows_b.samples, rows_b.tail_size)
    other_values = _entries_differ(rows_a.logprob, rows_a.head_size, rows_b.logprob, rows_b.head_size)
    other_numbers = np.any(rows_a.numbers != rows_b.numbers, axis=1)
    columns = _columns_differ(rows_a.columns, rows_b.columns)
    different = np.any([other_head, other_samples, other_values, other_numbers, *columns.values()], axis=0)
    largest_R, kl_R = _distances(rows_a, rows_b)
    found.rows += len(different)
    found.rows_different += int(different.sum())
    found.rows_other_head += int(other_head.sum())
    found.rows_other_samples += int(other_samples.sum())
    found.largest_logprob = max(found.largest_logprob, float(largest_R.max(initial=0.0)))
    rows_S = np.bincount(sequence_R[different], minlength=len(a))
    parts = {"token_end_byte": ~_same_tokens(a, b, "token_end_byte")}
    parts |= _columns_differ(a.sequence_columns, b.sequence_columns)
    parts |= {name: np.bincount(sequence_R[other], minlength=len(a)) > 0 for name, other in columns.items()}
    parts = {name: other_S & same_S for name, other_S in parts.items() if np.any(other_S & same_S)}
    for name, other_S in parts.items():
        found.other_parts[name] = found.other_parts.get(name, 0) + int(other_S.sum())
    for number in np.flatnonzero(np.any([~same_S, rows_S > 0, *parts.values()], axis=0)).tolist():
        found.sequences_different += 1
        found.other_tokens += not same_S[number]
        if int(shard_S[number]) not in found.shards:
            found.shards.append(int(shard_S[number]))
        if len(found.examples) < EXAMPLES:
            found.examples.append(
                SequenceDifference(
                    shard=int(shard_S[number]),
                    document=int(a.document[number]),
                    window_start=int(a.window_start[number]),
                    rows=int(rows_S[number]) if same_S[number] else None,
                    largest_logprob=float(largest_R[sequence_R == number].max(initial=0.0)),
                    parts=tuple(name for name, other_S in parts.items() if other_S[number]),
                )
            )
    return float(kl_R.sum())


def _same_tokens(a: SequenceBatch, b: SequenceBatch, *names: str) -> NDArray[np.bool_]:
    """Tell of each sequence [S] whether these arrays, on the token axis, are the same. Both may lack one."""
    same_S = np.ones(len(a), dtype=bool)
    for left, right in ((getattr(a, name), getattr(b, name)) for name in names):
        edges = zip(pairwise(a.token_offset.tolist()), pairwise(b.token_offset.tolist()), strict=True)
        if left is not None and right is not None:
            same_S &= [np.array_equal(left[slice(*at_a)], right[slice(*at_b)]) for at_a, at_b in edges]
        elif left is not right:
            same_S[:] = False
    return same_S


def _columns_differ(
    a: Mapping[str, NDArray[Any]] | None, b: Mapping[str, NDArray[Any]] | None
) -> dict[str, NDArray[np.bool_]]:
    """Tell of each value of the added columns that both have whether it differs. NaN is NaN."""
    pairs = [(name, a[name], b[name]) for name in a if name in b] if a and b else []
    return {f"column {name}": (left != right) & ~(np.isnan(left) & np.isnan(right)) for name, left, right in pairs}


class _Rows:
    """The chosen rows of a batch, and of the temperatures other than 1 these."""

    def __init__(self, batch: SequenceBatch, chosen: NDArray[np.bool_], temperatures: Sequence[float]) -> None:
        head_H, tail_C = np.repeat(chosen, batch.head_size), np.repeat(chosen, batch.tail_size)
        self.chosen = chosen
        self.head_size, self.tail_size = batch.head_size[chosen], batch.tail_size[chosen]
        self.head_ids, self.logprob = batch.head_ids[head_H], batch.logprob[head_H]
        self.samples = _in_order(batch.tail_ids[tail_C], batch.count[tail_C], self.tail_size)
        places = [batch.temperatures.index(value) for value in temperatures]
        values: list[NDArray[Any]] = []
        for item in NUMBERS:
            numbers = getattr(batch, item.name)
            if not item.by_temperature:
                values.append(numbers)
            elif numbers is not None:
                values.extend(numbers.T[places])
        self.numbers = np.stack([value[chosen] for value in values], axis=1)
        self.columns = {name: value[chosen] for name, value in (batch.row_columns or {}).items()}


def _in_order(ids_C: NDArray[np.uint32], count_C: NDArray[np.uint16], size_R: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return id and count of each sample as one number, the samples of a row in rising order of ids."""
    value_C = (ids_C.astype(np.int64) << 16) | count_C
    return value_C[np.lexsort((value_C, np.repeat(np.arange(len(size_R)), size_R)))]


def _entries_differ(
    a_N: NDArray[Any], size_a_R: NDArray[np.int32], b_N: NDArray[Any], size_b_R: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Tell of each row [R] whether its entries differ in number or value."""
    same_R = size_a_R == size_b_R
    unequal = a_N[np.repeat(same_R, size_a_R)] != b_N[np.repeat(same_R, size_b_R)]
    row_N = np.repeat(np.flatnonzero(same_R), size_a_R[same_R])
    differ: NDArray[np.bool_] = ~same_R | (np.bincount(row_N[unequal], minlength=len(same_R)) > 0)
    return differ


def _distances(a: _Rows, b: _Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return by row [R] the largest difference of log-probabilities of common ids, and KL over them and the rest."""
    rows = len(a.head_size)
    key_a, key_b = (_row_and_id(side) for side in (a, b))
    common, at_a, at_b = np.intersect1d(key_a, key_b, assume_unique=True, return_indices=True)
    row_N = common >> 32
    log_a, log_b = a.logprob[at_a].astype(np.float64), b.logprob[at_b].astype(np.float64)
    largest_R = np.zeros(rows)
    np.maximum.at(largest_R, row_N, np.abs(log_a - log_b))
    kl_R = np.bincount(row_N, np.exp(log_a) * (log_a - log_b), minlength=rows)
    rest_a, rest_b = (
        np.maximum(1.0 - np.bincount(row_N, np.exp(logprob), minlength=rows), 1e-12) for logprob in (log_a, log_b)
    )
    return largest_R, np.maximum(kl_R + rest_a * np.log(rest_a / rest_b), 0.0)


def _row_and_id(rows: _Rows) -> NDArray[np.int64]:
    row_H = np.repeat(np.arange(len(rows.head_size), dtype=np.int64), rows.head_size)
    return (row_H << 32) | rows.head_ids
