"""The data that crosses the border between the phases: sequences with their target rows, as flat numpy arrays.

Phase 1 fills a `SequenceBatch` per shard and hands it to the writer; the reader hands the same type to phase 2.

Axis legend: T tokens, S sequences, R rows, H head entries, C tail entries (distinct sampled ids), all concatenated
over the batch; P temperatures; X+1 marks an offset array whose first value is 0 and last value the length of the axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Sequences and their target rows in CSR form. A row is the teacher's distribution over the *next* token.

    Attributes:
        tokens: uint32 [T], token ids of all sequences, concatenated.
        token_offset, row_offset, head_offset, tail_offset: int64 [S+1], where each sequence begins on each axis.
        document: int64 [S], number of the document the sequence was cut from.
        window_start: int64 [S], index in the document's tokens of the sequence's first token.
        token_end_byte: uint32 [T], end of each token in the document's UTF-8 text; None for ready token ids.
        has_row: bool [T], whether the position has a row; the rows of a sequence are its True positions in order.
            False at the last token of each sequence: its next token is not in `tokens`.
        head_size: int32 [R], exact head entries of each row.
        tail_size: int32 [R], distinct sampled ids of each row.
        head_ids: uint32 [H], token ids, teacher probability falling within a row.
        logprob: float32 [H], teacher log-probability at temperature 1 (natural logarithm).
        tail_ids: uint32 [C], token ids outside the head, each once per row.
        count: uint16 [C], how often the id was drawn; sums to `draws` per row (0 where the tail is empty).
        tail_logit: float32 [R], log(r / (1 - r)) of the mass r outside the head; -inf and +inf are legal.
        logsumexp: float32 [R], so that logit = logprob + logsumexp.
        entropy: float32 [R], teacher entropy at temperature 1, nats.
        next_logprob: float32 [R], teacher log-probability of the token that follows.
        draws: tail samples per row; 0 for exact kinds.
        temperatures: the P temperatures other than 1 for which the rows hold the next two, rising.
        tail_logit_T: float32 [R, P], tail_logit at each temperature; None without temperatures, or if rows were read
            without targets.
        entropy_T: float32 [R, P], teacher entropy at each temperature, nats; None likewise.
        row_columns, sequence_columns: values that a conversion added, by name, [R] and [S]; None without. Zeros in
            rows that were read without targets.
    """

    tokens: NDArray[np.uint32]
    token_offset: NDArray[np.int64]
    row_offset: NDArray[np.int64]
    head_offset: NDArray[np.int64]
    tail_offset: NDArray[np.int64]
    document: NDArray[np.int64]
    window_start: NDArray[np.int64]
    token_end_byte: NDArray[np.uint32] | None
    has_row: NDArray[np.bool_]
    head_size: NDArray[np.int32]
    tail_size: NDArray[np.int32]
    head_ids: NDArray[np.uint32]
    logprob: NDArray[np.float32]
    tail_ids: NDArray[np.uint32]
    count: NDArray[np.uint16]
    tail_logit: NDArray[np.float32]
    logsumexp: NDArray[np.float32]
    entropy: NDArray[np.float32]
    next_logprob: NDArray[np.float32]
    draws: int = 0
    temperatures: tuple[float, ...] = ()
    tail_logit_T: NDArray[np.float32] | None = None
    entropy_T: NDArray[np.float32] | None = None
    row_columns: Mapping[str, NDArray[Any]] | None = None
    sequence_columns: Mapping[str, NDArray[Any]] | None = None

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.document)

    @property
    def rows(self) -> int:
        """Number of target rows."""
        return len(self.head_size)

    @property
    def sequence_of_row(self) -> NDArray[np.int64]:
        """Number of the sequence that each row belongs to, int64 [R]."""
        return np.repeat(np.arange(len(self)), np.diff(self.row_offset))


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a shard holds.

    Attributes:
        sequences, tokens, rows, head_entries, tail_entries: lengths of its axes.
        head_mass: mean over rows of the teacher's mass in the head, rounded to six digits; 0 without rows.
    """

    sequences: int
    tokens: int
    rows: int
    head_entries: int
    tail_entries: int
    head_mass: float
