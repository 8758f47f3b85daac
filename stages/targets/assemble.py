"""Sequences and their rows, computed in any order, become the batch that a shard stores.

Data path: target rows -> **SequenceBatch** -> StoreWriter. numpy only.

Axis legend: N rows, K candidates of the head, M draws, T tokens and S sequences of the batch, C distinct sampled ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from stages.corpus.tokenize import TokenWindow
from stages.targets.rows import TargetRows
from storage.plan import TargetSpec
from storage.rows import NUMBERS, SequenceBatch
from storage.segments import merge_draws, row_starts


def assemble(sequences: Sequence[TokenWindow], rows: TargetRows, target: TargetSpec) -> SequenceBatch:
    """Join sequences with their rows, which come in the order of the sequences and of their positions.

    Args:
        rows: one per position that wants one.
        target: what the rows hold.
    """
    rows_S = np.array([int(sequence.has_row.sum()) for sequence in sequences], dtype=np.int64)
    assert int(rows_S.sum()) == len(rows), "one row per wanted position"
    tail_ids_C, count_C, tail_size_N = merge_draws(rows.drawn, empty_R=np.isneginf(rows.tail_logit))
    row_offset = row_starts(rows_S)
    head_NK = np.arange(rows.head_ids.shape[1]) < rows.head_size[:, None]
    return SequenceBatch(
        tokens=_joined([sequence.tokens for sequence in sequences], np.uint32),
        token_offset=row_starts(np.array([len(sequence) for sequence in sequences], dtype=np.int64)),
        row_offset=row_offset,
        head_offset=row_starts(rows.head_size)[row_offset],
        tail_offset=row_starts(tail_size_N)[row_offset],
        document=np.array([sequence.document for sequence in sequences], dtype=np.int64),
        window_start=np.array([sequence.window_start for sequence in sequences], dtype=np.int64),
        token_end_byte=_joined([sequence.token_end_byte for sequence in sequences], np.uint32),
        has_row=_joined([sequence.has_row for sequence in sequences], np.bool_),
        head_size=rows.head_size,
        tail_size=tail_size_N,
        head_ids=rows.head_ids[head_NK],
        logprob=rows.logprob[head_NK],
        tail_ids=tail_ids_C,
        count=count_C,
        draws=target.draws,
        temperatures=target.temperatures,
        **{item.name: getattr(rows, item.name) for item in NUMBERS if target.temperatures or not item.by_temperature},
    )


def _joined(parts: list[NDArray[Any]], dtype: DTypeLike) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)
