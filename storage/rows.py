"""The data that crosses the border between the phases: sequences with their target rows, as flat numpy arrays.

Phase 1 fills a `SequenceBatch` per shard and hands it to the writer; the reader hands the same type to phase 2.

What there is to know of an array, its axis above all, stands beside its field and nowhere else. `ARRAYS` is the table
that cutting, joining, checking, encoding and decoding go through: to add an array, add a field here, its line in
FORMAT.md, and what computes it. Stores hold exactly the arrays of their format version, so it takes a new one.

Axis legend: T tokens, S sequences, R rows, H head entries, C tail entries (distinct sampled ids), all concatenated
over the batch; P temperatures; X+1 marks an offset array whose first value is 0 and last value the length of the axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Axis = Literal["token", "sequence", "sequence_edge", "row", "head", "tail"]
Stored = Literal["id", "uint", "real", "logprob", "bits", "uint32", "uint64"]
Owner = Literal["k", "draws", "temperatures", "end_bytes"]


@dataclass(frozen=True, kw_only=True)
class ArrayField:
    """What is known of an array of a batch.

    Attributes:
        name: of the field, and of the array in a shard.
        axis: on which it lies; sequence_edge has one place more than there are sequences.
        dtype: in memory.
        stored: its type in a shard, in the words of FORMAT.md; `logprob` is the codec's. Ids are stored as ranks, and
            those of tails as differences.
        only_with: what the plan's target, or the corpus, must have so that a store has the array; None: every store.
        absent: its values in a store without it; None: so is the whole field.
    """

    name: str
    axis: Axis
    dtype: type[np.generic]
    stored: Stored
    only_with: Owner | None
    absent: float | None

    @property
    def by_temperature(self) -> bool:
        """Whether there is a second axis, the temperatures."""
        return self.only_with == "temperatures"


def _on(
    axis: Axis, dtype: type[np.generic], stored: Stored, only_with: Owner | None = None, *, absent: float | None = 0
) -> dict[str, Any]:
    """Return the metadata of a field that is an array: the attributes of its `ArrayField`."""
    return {"axis": axis, "dtype": dtype, "stored": stored, "only_with": only_with, "absent": absent}


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

    # In the order in which a shard holds its arrays.
    tokens: NDArray[np.uint32] = field(metadata=_on("token", np.uint32, "id"))
    has_row: NDArray[np.bool_] = field(metadata=_on("token", np.bool_, "bits"))
    token_offset: NDArray[np.int64] = field(metadata=_on("sequence_edge", np.int64, "uint64"))
    row_offset: NDArray[np.int64] = field(metadata=_on("sequence_edge", np.int64, "uint64"))
    document: NDArray[np.int64] = field(metadata=_on("sequence", np.int64, "uint64"))
    window_start: NDArray[np.int64] = field(metadata=_on("sequence", np.int64, "uint32"))
    logsumexp: NDArray[np.float32] = field(metadata=_on("row", np.float32, "real"))
    entropy: NDArray[np.float32] = field(metadata=_on("row", np.float32, "real"))
    next_logprob: NDArray[np.float32] = field(metadata=_on("row", np.float32, "real"))
    token_end_byte: NDArray[np.uint32] | None = field(
        metadata=_on("token", np.uint32, "uint32", "end_bytes", absent=None)
    )
    head_offset: NDArray[np.int64] = field(metadata=_on("sequence_edge", np.int64, "uint64", "k"))
    head_size: NDArray[np.int32] = field(metadata=_on("row", np.int32, "uint", "k"))
    # Without a head, all mass is outside of it.
    tail_logit: NDArray[np.float32] = field(metadata=_on("row", np.float32, "real", "k", absent=np.inf))
    tail_offset: NDArray[np.int64] = field(metadata=_on("sequence_edge", np.int64, "uint64", "draws"))
    tail_size: NDArray[np.int32] = field(metadata=_on("row", np.int32, "uint", "draws"))
    tail_ids: NDArray[np.uint32] = field(metadata=_on("tail", np.uint32, "id", "draws"))
    count: NDArray[np.uint16] = field(metadata=_on("tail", np.uint16, "uint", "draws"))
    head_ids: NDArray[np.uint32] = field(metadata=_on("head", np.uint32, "id", "k"))
    logprob: NDArray[np.float32] = field(metadata=_on("head", np.float32, "logprob", "k"))
    tail_logit_T: NDArray[np.float32] | None = field(
        default=None, metadata=_on("row", np.float32, "real", "temperatures", absent=None)
    )
    entropy_T: NDArray[np.float32] | None = field(
        default=None, metadata=_on("row", np.float32, "real", "temperatures", absent=None)
    )
    draws: int = 0
    temperatures: tuple[float, ...] = ()
    row_columns: Mapping[str, NDArray[Any]] | None = field(default=None, metadata={"axis": "row"})
    sequence_columns: Mapping[str, NDArray[Any]] | None = field(default=None, metadata={"axis": "sequence"})

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


AXES: Mapping[str, Axis] = {item.name: item.metadata["axis"] for item in fields(SequenceBatch) if item.metadata}
ARRAYS = tuple(
    ArrayField(name=item.name, **item.metadata) for item in fields(SequenceBatch) if "dtype" in item.metadata
)
NUMBERS = tuple(item for item in ARRAYS if item.stored == "real")  # a row has one of each, or one per temperature
OFFSETS: Mapping[str, str] = {  # by the axis that they cut into sequences
    item.name.removesuffix("_offset"): item.name for item in ARRAYS if item.axis == "sequence_edge"
}


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
