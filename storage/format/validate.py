"""What must hold of a batch before it becomes a shard, and after it has been read back: the invariants of rows.

Data path: `SequenceBatch` -> **check_batch** -> encode. Every message names the document of the offending row.

Axis legend: T tokens, S sequences, R rows, H head entries, C tail entries; _T alone marks values by temperature.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.codecs import logprob_codec
from storage.codecs.exact import ROUNDING
from storage.errors import NumericsError
from storage.format.arrays import array_lengths
from storage.plan import Plan, ShardSpec
from storage.rows import ARRAYS, NUMBERS, OFFSETS, SequenceBatch
from storage.segments import row_starts, sigmoid

LARGEST_HALF = 65504.0
MASS_TOLERANCE = 5e-3  # float16 tail mass, teachers in low precision
_BLOCK_VALUES = 1 << 22  # ids compared at once


def check_batch(plan: Plan, spec: ShardSpec, batch: SequenceBatch) -> None:
    """Check that a batch is a whole, consistent shard of a plan.

    Raises:
        NumericsError: NaN, or an infinity where none is legal.
        ValueError: shapes, counts, order, ids or documents contradict each other or the plan.
    """
    _check_shapes(batch)
    _check_columns(plan, batch)
    _check_offsets(batch)
    _check_documents(plan, spec, batch)
    _check_rows(plan, batch)
    _check_numbers(batch)
    _check_reach(plan, batch)
    _check_ids(plan, batch)


def _lengths(batch: SequenceBatch) -> dict[str, int]:
    return array_lengths(
        sequences=len(batch),
        tokens=len(batch.tokens),
        rows=batch.rows,
        head=len(batch.head_ids),
        tail=len(batch.tail_ids),
    )


def _check_shapes(batch: SequenceBatch) -> None:
    """Check that every array has the length of its axis. An array that the batch lacks is None."""
    lengths = _lengths(batch)
    for item in ARRAYS:
        wanted: tuple[int, ...] = (lengths[item.axis],)
        if item.by_temperature:
            wanted = (*wanted, len(batch.temperatures)) if batch.temperatures else ()
        elif item.absent is None and getattr(batch, item.name) is None:
            wanted = ()
        shape = np.shape(getattr(batch, item.name))  # of None: ()
        if shape != wanted:
            many = f" and {len(batch.temperatures)} temperatures" if item.by_temperature else ""
            raise ValueError(f"{item.name} has shape {shape}, not {wanted}: axis {item.axis}{many}")


def _check_columns(plan: Plan, batch: SequenceBatch) -> None:
    """Check that added columns are those of the plan, of its types, with a value per row or sequence."""
    for axis, columns, length in (
        ("row", batch.row_columns or {}, batch.rows),
        ("sequence", batch.sequence_columns or {}, len(batch)),
    ):
        wanted = {name: about["dtype"] for name, about in plan.columns.items() if about["axis"] == axis}
        found = {name: column.dtype.name for name, column in columns.items()}
        if found != wanted:
            raise ValueError(f"the batch has {axis} columns {found}, the plan {wanted}")
        for name, column in columns.items():
            if column.shape != (length,):
                raise ValueError(f"column {name} has shape {column.shape}; there are {length} values of axis {axis}")


def _check_offsets(batch: SequenceBatch) -> None:
    lengths = _lengths(batch)
    for axis, name in OFFSETS.items():
        offset, length = getattr(batch, name), lengths[axis]
        if offset[0] != 0 or offset[-1] != length or np.any(np.diff(offset) < 0):
            raise ValueError(f"{name} must rise from 0 to {length}; it goes from {offset[0]} to {offset[-1]}")
    for name, size, offset in (
        ("head", batch.head_size, batch.head_offset),
        ("tail", batch.tail_size, batch.tail_offset),
    ):
        if np.any(size < 0):
            raise ValueError(f"{name}_size is negative")
        wrong = np.flatnonzero(row_starts(size)[batch.row_offset] != offset)
        if len(wrong):
            sequence = min(int(wrong[0]), len(batch)) - 1
            raise ValueError(f"{name}_size and {name}_offset disagree{_of_sequence(batch, sequence)}")


def _check_documents(plan: Plan, spec: ShardSpec, batch: SequenceBatch) -> None:
    for document in np.unique(batch.document).tolist():  # not all that the shard could hold, which may be very many
        inside = spec.first_document <= document < spec.end_document
        if not inside or plan.heldout.holds_out(document) != (spec.split == "heldout"):
            raise ValueError(
                f"document {document} is not one of shard {spec.index} "
                f"({spec.split}, {spec.first_document} to {spec.end_document - 1})"
            )
    behind = np.diff(batch.document) < 0
    same = np.diff(batch.document) == 0
    wrong = np.flatnonzero(behind | (same & (np.diff(batch.window_start) <= 0)))
    if len(wrong):
        raise ValueError(f"sequences are not in order of document and window{_of_sequence(batch, int(wrong[0]) + 1)}")
    if np.any(batch.window_start < 0):
        raise ValueError("window_start is negative")


def _check_rows(plan: Plan, batch: SequenceBatch) -> None:
    """Check that rows are where has_row says, sizes obey the plan, and draws add up."""
    marked = row_starts(batch.has_row)[batch.token_offset]
    wrong = np.flatnonzero(marked != batch.row_offset)
    if len(wrong):
        raise ValueError(f"has_row and row_offset disagree{_of_sequence(batch, int(wrong[0]) - 1)}")
    filled = np.flatnonzero(np.diff(batch.token_offset) > 0)
    last = batch.token_offset[1:][filled] - 1
    wrong = filled[batch.has_row[last]]
    if len(wrong):
        raise ValueError(f"the last token of a sequence has a row{_of_sequence(batch, int(wrong[0]))}")
    if batch.draws != plan.target.draws:
        raise ValueError(f"the batch has {batch.draws} draws per row, the plan {plan.target.draws}")
    if batch.temperatures != plan.target.temperatures:
        raise ValueError(f"the batch has temperatures {batch.temperatures}, the plan {plan.target.temperatures}")
    largest = min(plan.target.k, plan.vocab_size)
    _refuse(batch, batch.head_size > largest, f"head_size exceeds k = {largest}")
    _refuse(batch, batch.head_size < min(largest, 1), f"a row of kind {plan.target.kind} has no head")
    drawn = np.bincount(np.repeat(np.arange(batch.rows), batch.tail_size), weights=batch.count, minlength=batch.rows)
    expected = np.where(batch.tail_size > 0, batch.draws, 0)
    _refuse(batch, drawn != expected, f"counts do not add up to {batch.draws} draws")
    _refuse_entry(batch, batch.count == 0, batch.tail_size, "a count is 0")
    _refuse(
        batch,
        (batch.tail_size == 0) & (batch.tail_logit > -np.inf) & (batch.draws > 0),
        "a row has tail mass but no samples",
    )


def _check_numbers(batch: SequenceBatch) -> None:
    for item in NUMBERS:
        places = [f" at temperature {at}" for at in batch.temperatures] if item.by_temperature else [""]
        columns = np.atleast_2d(getattr(batch, item.name).T) if places else ()
        for where, values_R in zip(places, columns, strict=True):
            _refuse(batch, np.isnan(values_R), f"{item.name} is NaN{where}", NumericsError)
    for name in ("logsumexp", "entropy"):
        too_large = ~(np.abs(getattr(batch, name)) <= LARGEST_HALF)
        _refuse(batch, too_large, f"{name} is beyond {LARGEST_HALF:.0f}", NumericsError)
    _refuse(batch, batch.next_logprob > ROUNDING, "next_logprob is positive", NumericsError)
    _refuse(batch, batch.entropy < -ROUNDING, "entropy is negative", NumericsError)
    if batch.entropy_T is not None:
        for at, entropy in zip(batch.temperatures, batch.entropy_T.T, strict=True):
            legal = (entropy >= -ROUNDING) & (entropy <= LARGEST_HALF)
            _refuse(batch, ~legal, f"entropy_T is negative or not a number at temperature {at}", NumericsError)
    _refuse_entry(batch, ~np.isfinite(batch.logprob), batch.head_size, "logprob is not finite", NumericsError)
    _refuse_entry(batch, batch.logprob > ROUNDING, batch.head_size, "logprob is positive", NumericsError)
    _check_mass(batch)
    rising = np.concatenate([[False], np.diff(batch.logprob) > 0]) if len(batch.logprob) else np.zeros(0, bool)
    rising[row_starts(batch.head_size)[:-1][batch.head_size > 0]] = False
    _refuse_entry(batch, rising, batch.head_size, "logprob rises within a row")


def _check_mass(batch: SequenceBatch) -> None:
    """Check that head and tail mass add up to 1: readers scale the head by the tail's."""
    row_H = np.repeat(np.arange(batch.rows), batch.head_size)
    mass_R = np.bincount(row_H, weights=np.exp(batch.logprob.astype(np.float64)), minlength=batch.rows)
    total_R = mass_R + sigmoid(batch.tail_logit)
    _refuse(batch, np.abs(total_R - 1.0) > MASS_TOLERANCE, "head and tail mass do not add up to 1", NumericsError)


def _check_reach(plan: Plan, batch: SequenceBatch) -> None:
    """Check that heads that end before k entries reach the p of the plan, up to how a codec rounds their tail's mass.

    A converted store may hold what the codec of its origin had rounded further away: there it is not asked.
    """
    p = plan.target.p
    if p is None or plan.derived_from is not None:
        return
    most = math.log1p(-p) - math.log(p) + ROUNDING if p < 1.0 else -math.inf
    # Rounding keeps order and changes nothing the second time, so this holds of a batch before and after it.
    round_numbers = logprob_codec(plan.codecs["logprob"]).round_numbers
    tail_logit = round_numbers(batch.tail_logit).astype(np.float32)
    short = tail_logit > round_numbers(np.array([most], np.float32)).astype(np.float32)
    ended = batch.head_size < min(plan.target.k, plan.vocab_size)
    _refuse(batch, short & ended, f"the head has fewer than {plan.target.k} entries and does not reach mass {p}")


def _check_ids(plan: Plan, batch: SequenceBatch) -> None:
    for name in (item.name for item in ARRAYS if item.stored == "id"):
        ids = getattr(batch, name)
        for extreme in (int(ids.min()), int(ids.max())) if len(ids) else ():
            if not 0 <= extreme < plan.vocab_size:
                raise ValueError(f"{name} holds id {extreme}; the vocabulary has {plan.vocab_size} tokens")
    if batch.rows == 0:
        return
    width = max(1, int(batch.head_size.max()) + int(batch.tail_size.max()))
    step = max(1, _BLOCK_VALUES // width)
    for first in range(0, batch.rows, step):
        rows = slice(first, min(first + step, batch.rows))
        table = np.sort(np.concatenate([_padded(batch, "head", rows), _padded(batch, "tail", rows)], axis=1), axis=1)
        repeated = np.zeros(batch.rows, dtype=bool)
        repeated[rows] = np.any((table[:, 1:] == table[:, :-1]) & (table[:, 1:] < plan.vocab_size), axis=1)
        _refuse(batch, repeated, "an id occurs twice in a row")


def _padded(batch: SequenceBatch, part: str, rows: slice) -> NDArray[np.uint32]:
    """Return the ids of some rows as a table; the padding lies above every id."""
    size: NDArray[Any] = getattr(batch, f"{part}_size")
    ids: NDArray[np.uint32] = getattr(batch, f"{part}_ids")
    starts = row_starts(size)
    table = np.full((rows.stop - rows.start, int(size.max())), np.iinfo(np.uint32).max, dtype=np.uint32)
    inside = np.arange(table.shape[1]) < size[rows, None]
    table[inside] = ids[starts[rows.start] : starts[rows.stop]]
    return table


def _refuse(batch: SequenceBatch, bad_R: NDArray[np.bool_], what: str, error: type[Exception] = ValueError) -> None:
    if np.any(bad_R):
        row = int(np.argmax(bad_R))
        sequence = int(np.searchsorted(batch.row_offset, row, side="right")) - 1
        raise error(f"{what}{_of_sequence(batch, sequence)}, row {row - int(batch.row_offset[sequence])}")


def _refuse_entry(
    batch: SequenceBatch,
    bad_N: NDArray[np.bool_],
    size_R: NDArray[np.int32],
    what: str,
    error: type[Exception] = ValueError,
) -> None:
    if np.any(bad_N):
        bad_R = np.zeros(batch.rows, dtype=bool)
        bad_R[np.searchsorted(row_starts(size_R), int(np.argmax(bad_N)), side="right") - 1] = True
        _refuse(batch, bad_R, what, error)


def _of_sequence(batch: SequenceBatch, sequence: int) -> str:
    return f": document {int(batch.document[sequence])}, window at {int(batch.window_start[sequence])}"
