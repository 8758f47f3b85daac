"""Cutting and joining `SequenceBatch`es, still in numpy: a part is views, a join copies.

Data path: store -> **sequences** -> packed micro-batches -> student.

Axis legend as in storage/rows.py: T tokens, S sequences, R rows, H head entries, C tail entries, X+1 offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from storage.errors import UsageError
from storage.rows import SequenceBatch

_OFFSETS = ("token_offset", "row_offset", "head_offset", "tail_offset")
_COLUMNS = ("row_columns", "sequence_columns")  # the parts come from one store, so they have the same ones
# Which offsets cut an array: by the axis that it lies on.
_AXIS_OF = {
    "tokens": "token_offset",
    "token_end_byte": "token_offset",
    "has_row": "token_offset",
    "head_size": "row_offset",
    "tail_size": "row_offset",
    "tail_logit": "row_offset",
    "logsumexp": "row_offset",
    "entropy": "row_offset",
    "next_logprob": "row_offset",
    "tail_logit_T": "row_offset",
    "entropy_T": "row_offset",
    "head_ids": "head_offset",
    "logprob": "head_offset",
    "tail_ids": "tail_offset",
    "count": "tail_offset",
}


def lengths(batch: SequenceBatch) -> NDArray[np.int64]:
    """Tokens of each sequence, int64 [S]."""
    return np.diff(batch.token_offset)


def part(batch: SequenceBatch, first: int, end: int) -> SequenceBatch:
    """Sequences first <= s < end of a batch, as views of its arrays."""
    cut = {name: getattr(batch, name) for name in _OFFSETS}
    changes: dict[str, object] = {name: offset[first : end + 1] - offset[first] for name, offset in cut.items()}
    for name, axis in _AXIS_OF.items():
        values = getattr(batch, name)
        if values is not None:
            changes[name] = values[cut[axis][first] : cut[axis][end]]
    changes["document"] = batch.document[first:end]
    changes["window_start"] = batch.window_start[first:end]
    rows = slice(cut["row_offset"][first], cut["row_offset"][end])
    for name, span in (("row_columns", rows), ("sequence_columns", slice(first, end))):
        columns = getattr(batch, name)
        changes[name] = None if columns is None else {key: values[span] for key, values in columns.items()}
    return replace(batch, **changes)  # type: ignore[arg-type]  # names and types come from the same dataclass


def join(parts: Sequence[SequenceBatch]) -> SequenceBatch:
    """All sequences of several batches, in order. `token_end_byte` survives only if every part has it."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, object] = {"draws": max(batch.draws for batch in parts), "temperatures": parts[0].temperatures}
    for item in fields(SequenceBatch):
        values = [getattr(batch, item.name) for batch in parts]
        if item.name in _OFFSETS:
            joined[item.name] = _chain(values)
        elif item.name in _COLUMNS and values[0] is not None:
            joined[item.name] = {name: np.concatenate([columns[name] for columns in values]) for name in values[0]}
        elif item.name not in joined:
            joined[item.name] = None if any(value is None for value in values) else np.concatenate(values)
    return SequenceBatch(**joined)  # type: ignore[arg-type]  # names and types come from the same dataclass


def pack(batch: SequenceBatch, tokens_per_batch: int) -> list[SequenceBatch]:
    """Parts of at most `tokens_per_batch` tokens each, filled greedily without changing the order.

    Raises:
        UsageError: a single sequence is longer than that.
    """
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


def _chain(offsets: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """One offset array over the concatenation: each begins where the one before it ends."""
    ends = np.cumsum([offset[-1] for offset in offsets])
    shifts = np.concatenate([[0], ends[:-1]])
    chained = [offset[:-1] + shift for offset, shift in zip(offsets, shifts, strict=True)]
    return np.concatenate([*chained, ends[-1:]])
