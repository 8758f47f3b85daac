"""Cutting and joining `SequenceBatch`es, still in numpy: a part is views, a join copies.

Data path: store -> **sequences** -> packed micro-batches -> student.

Axis legend as in storage/rows.py: T tokens, S sequences, R rows, H head entries, C tail entries, X+1 offsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import UsageError
from storage.rows import AXES, OFFSETS, Axis, SequenceBatch
from storage.segments import row_starts


def lengths(batch: SequenceBatch) -> NDArray[np.int64]:
    """Return the tokens of each sequence, int64 [S]."""
    return np.diff(batch.token_offset)


def part(batch: SequenceBatch, first: int, end: int) -> SequenceBatch:
    """Return sequences first <= s < end of a batch, as views of its arrays."""
    changes: dict[str, Any] = {}
    spans = {"sequence": slice(first, end)}
    for axis, name in OFFSETS.items():
        offset = getattr(batch, name)
        changes[name] = offset[first : end + 1] - offset[first]
        spans[axis] = slice(offset[first], offset[end])
    changes |= {name: _cut(getattr(batch, name), spans[axis]) for name, axis in AXES.items() if axis in spans}
    return replace(batch, **changes)


def _cut(values: Any, span: slice) -> Any:
    """Cut an array, or columns by name."""
    if isinstance(values, Mapping):
        return {column: array[span] for column, array in values.items()}
    return None if values is None else values[span]


def join(parts: Sequence[SequenceBatch]) -> SequenceBatch:
    """Join all sequences of several batches, in order. `token_end_byte` survives only if every part has it."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {
        name: _chain(axis, [getattr(batch, name) for batch in parts]) for name, axis in AXES.items()
    }
    return SequenceBatch(**joined, draws=max(batch.draws for batch in parts), temperatures=parts[0].temperatures)


def _chain(axis: Axis, values: list[Any]) -> Any:
    """Concatenate arrays, or columns by name: the parts come from one store, so they have the same ones."""
    if any(value is None for value in values):
        return None
    if isinstance(values[0], Mapping):
        return {column: np.concatenate([columns[column] for columns in values]) for column in values[0]}
    if axis == "sequence_edge":
        return row_starts(np.concatenate([offset[1:] - offset[:-1] for offset in values]))
    return np.concatenate(values)


def pack(batch: SequenceBatch, tokens_per_batch: int, length_borders: Sequence[int] = ()) -> list[SequenceBatch]:
    """Cut a batch into parts of at most `tokens_per_batch` tokens, filled greedily without changing the order.

    Args:
        length_borders: lengths, rising; sequences on two sides of one are packed apart, the shorter side first.

    Raises:
        UsageError: a single sequence is longer than that.
    """
    side_S = np.searchsorted(length_borders, lengths(batch))
    if len(sides := np.unique(side_S)) > 1:
        apart = ([part(batch, at, at + 1) for at in np.flatnonzero(side_S == side).tolist()] for side in sides)
        return [packed for parts in apart for packed in pack(join(parts), tokens_per_batch)]
    bounds, filled = [0], 0
    for index, length in enumerate(lengths(batch).tolist()):
        if length > tokens_per_batch:
            raise UsageError(
                f"document {batch.document[index]} has a sequence of {length} tokens, "
                f"a micro-batch holds at most {tokens_per_batch}",
                where="tokens_per_batch",
                fix=f"set tokens_per_batch to at least {length}; the store's window is the longest that can occur",
            )
        if filled + length > tokens_per_batch:
            bounds.append(index)
            filled = 0
        filled += length
    bounds.append(len(batch))
    return [part(batch, first, end) for first, end in pairwise(bounds)]
