"""Stored values of sequences become rows again: the other half of `encode.py`.

Data path: open shards -> slices of stored values -> **`SequenceBatch`**. Everything here is whole-array arithmetic on
what a call asked for; nothing is decoded that was not asked for.

Axis legend: S sequences, R rows, H head entries, C tail entries, K ranks of an even head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.codecs import LogprobCodec, logprob_codec
from storage.format.arrays import column_array
from storage.plan import Plan
from storage.rows import ARRAYS, NUMBERS, OFFSETS, ArrayField, SequenceBatch
from storage.segments import cumsum_rows, row_starts
from storage.threads import Each

Task = Callable[[], None]
Work = list[Task]  # tasks that fill arrays, in any order, in threads or one after the other
Slices = Mapping[str, Sequence[NDArray[Any]]]  # stored values by array name, cut to a run of sequences, in pieces
VALUES_AT_ONCE = 1 << 16  # a few hundred kilobytes with what is made of them: they stay in the processor's cache


def decode_batch(
    plan: Plan,
    runs: Sequence[Slices],
    remap: NDArray[np.uint32],
    *,
    targets: bool = True,
    scaled: bool = True,
    each: Each = map,
) -> SequenceBatch:
    """Join runs of sequences, each cut from a shard, and decode them.

    Args:
        runs: stored values by array name, as `OpenShard.sequences` cuts them. Offsets begin anywhere.
        remap: token id of each rank [V].
        targets: whether the runs have the content of rows.
        scaled: False leaves log-probabilities as the codec gives them, before each head is scaled to its mass.
        each: runs the work on ids, even heads and tails, in threads or one after the other.

    Raises:
        ValueError: arrays contradict each other or the plan, a rank is outside the vocabulary, or a number is NaN.
    """
    found = _offsets(runs)
    for item in ARRAYS:
        if item.name not in found and item.stored not in ("id", "logprob"):
            found[item.name] = _plain(item, runs, rows=int(found["row_offset"][-1]))
    _check_positions(found)
    if targets:
        _check_rows(plan, found)
    codec, work = logprob_codec(plan.codecs["logprob"]), Work()
    scale_to = found["tail_logit"] if scaled and codec.renormalises else None
    for item in reversed(ARRAYS):  # threads begin with what takes longest: the log-probabilities
        if item.name in found:
            continue
        pieces = _pieces(runs, item.name)
        if item.stored == "logprob":
            found[item.name] = _logprob(codec, pieces, found["head_size"], scale_to, work=work)
        elif item.axis == "tail":
            found[item.name] = _tail_ids(remap, pieces, found["tail_size"], work=work)
        else:
            found[item.name] = _ids(remap, pieces, work=work)
    list(each(_do, work))
    return SequenceBatch(
        **found,
        draws=plan.target.draws,
        temperatures=plan.target.temperatures,
        row_columns=_columns(plan, runs, "row"),
        sequence_columns=_columns(plan, runs, "sequence"),
    )


def _columns(plan: Plan, runs: Sequence[Slices], axis: str) -> dict[str, NDArray[Any]] | None:
    """Return the added columns of an axis by name; None without any."""
    columns = {
        name: _joined(_pieces(runs, column_array(name)), np.dtype(about["dtype"]))
        for name, about in plan.columns.items()
        if about["axis"] == axis
    }
    return columns or None


def _pieces(runs: Sequence[Slices], name: str) -> list[NDArray[Any]]:
    """Return the pieces of an array from all runs; none if the plan has no such array."""
    return [piece for run in runs for piece in run.get(name, ())]


def _joined(pieces: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    """Concatenate the pieces of an array, flat. The result is never a view of the reader's cache."""
    return np.concatenate([piece.reshape(-1) for piece in pieces], dtype=dtype, casting="unsafe")


def _offsets(runs: Sequence[Slices]) -> dict[str, Any]:
    """Return all offsets from 0 over all runs, by name; 0 everywhere if there are no heads, or no samples."""
    sizes = {
        name: [np.diff(piece.astype(np.int64, copy=False)) for piece in _pieces(runs, name)]
        for name in OFFSETS.values()
    }
    sequences = sum(len(size) for size in sizes["row_offset"])
    return {name: row_starts(np.concatenate(each or [np.zeros(sequences, np.int64)])) for name, each in sizes.items()}


def _plain(item: ArrayField, runs: Sequence[Slices], *, rows: int) -> NDArray[Any] | None:
    """Return the values of an array that need no decoding; its default values if the plan has no such array."""
    pieces = _pieces(runs, item.name)
    if item.absent is None and not all(item.name in run for run in runs):
        return None
    if not pieces:
        return np.full(rows if item.axis == "row" else 0, item.absent, item.dtype)
    if item.by_temperature:
        # [P, N] each; if the rows were not read, nothing.
        values = np.concatenate([piece.T for piece in pieces]).astype(item.dtype)
        return values if values.ndim == 2 and len(values) == rows else None
    return _joined(pieces, item.dtype)


def _check_positions(found: Mapping[str, NDArray[Any]]) -> None:
    """Check that the rows of each sequence are where `has_row` says, never at its last token."""
    starts, has_row = found["token_offset"], found["has_row"]
    if not np.array_equal(row_starts(has_row)[starts], found["row_offset"]):
        raise ValueError("has_row and row_offset disagree")
    last = starts[1:][np.diff(starts) > 0] - 1
    if np.any(has_row[last]):
        raise ValueError("the last token of a sequence has a row")


def _check_rows(plan: Plan, found: Mapping[str, Any]) -> None:
    """Check what rows state of themselves against the plan and each other, before anything is computed from it."""
    rows, draws = found["row_offset"], plan.target.draws
    for part, most in (("head", plan.target.k), ("tail", draws)):
        size, most = found[f"{part}_size"], min(most, plan.vocab_size)
        least = min(most, 1) if part == "head" else 0
        if len(size) and not least <= size.min() <= size.max() <= most:
            raise ValueError(f"{part}_size goes from {size.min()} to {size.max()}; it may be {least} to {most}")
        if not np.array_equal(row_starts(size)[rows], found[f"{part}_offset"]):
            raise ValueError(f"the row sizes do not add up to {part}_offset")
    drawn = found["tail_size"] > 0
    if np.any(found["count"] == 0):
        raise ValueError("a count is 0")
    if np.any(_sums(found["count"], found["tail_size"])[drawn] != draws):
        raise ValueError(f"counts do not add up to {draws} draws")
    if draws and np.any(~drawn & (found["tail_logit"] > -np.inf)):
        raise ValueError("a row has tail mass but no samples")
    for item in NUMBERS:
        if found[item.name] is not None and np.any(np.isnan(found[item.name])):
            raise ValueError(f"{item.name} is NaN")


def _sums(values_N: NDArray[Any], size_R: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the sum of the entries of each row, int64 [R]."""
    total = row_starts(values_N)
    starts = row_starts(size_R)
    sums: NDArray[np.int64] = total[starts[1:]] - total[starts[:-1]]
    return sums


def _do(task: Task) -> None:
    task()


def _ids(remap: NDArray[np.uint32], pieces: Sequence[NDArray[Any]], *, work: Work) -> NDArray[np.uint32]:
    """Return the token ids of ranks, flat; they are there once the work is done."""
    pieces = _merged([piece.reshape(-1) for piece in pieces], axis=0)
    edges = _edges([len(piece) for piece in pieces])
    ids = np.empty(edges[-1], np.uint32)
    work.extend(
        partial(_take, remap, piece, ids[edges[index] : edges[index + 1]]) for index, piece in enumerate(pieces)
    )
    return ids


def _tail_ids(
    remap: NDArray[np.uint32], pieces: Sequence[NDArray[Any]], tail_size_R: NDArray[np.int32], *, work: Work
) -> NDArray[np.uint32]:
    """Return the token ids of differences of ranks, [C]; they are there once the work is done."""
    deltas_C = pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint16), *pieces])
    ids_C = np.empty(len(deltas_C), np.uint32)
    work.append(lambda: _take(remap, cumsum_rows(deltas_C, tail_size_R), ids_C))
    return ids_C


def _take(remap: NDArray[np.uint32], ranks: NDArray[Any], ids: NDArray[np.uint32]) -> None:
    largest = int(ranks.max(initial=0))
    if largest >= len(remap):
        raise ValueError(f"rank {largest} lies outside the vocabulary of {len(remap)}")
    remap.take(ranks, out=ids, mode="clip")  # other modes write to a buffer first


def _merged(pieces: Sequence[NDArray[Any]], *, axis: int) -> list[NDArray[Any]]:
    """Join neighbours until they hold enough values to be worth the calls that each piece takes."""
    groups: list[list[NDArray[Any]]] = []
    for piece in pieces:
        if not groups or sum(part.size for part in groups[-1]) >= VALUES_AT_ONCE:
            groups.append([])
        groups[-1].append(piece)
    return [group[0] if len(group) == 1 else np.concatenate(group, axis=axis) for group in groups]


def _edges(sizes: Sequence[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))


def _logprob(
    codec: LogprobCodec,
    pieces: Sequence[NDArray[Any]],
    head_size_R: NDArray[np.int32],
    tail_logit_R: NDArray[np.float32] | None,
    *,
    work: Work,
) -> NDArray[np.float32]:
    """Decode the heads of all runs, [H], and scale them to the mass outside of these tails, once the work is done.

    Shards of even heads hold their codes as [K, R], others as [H].
    """
    if pieces and all(piece.ndim == 2 for piece in pieces):
        return _even_heads(codec, pieces, head_size_R, tail_logit_R, work=work)
    codes_H = np.concatenate([piece.T.reshape(-1) for piece in pieces]) if pieces else np.zeros(0, codec.dtype)
    logprob_H = codec.decode(codes_H, head_size_R)
    return logprob_H if tail_logit_R is None else scale_heads(logprob_H, head_size_R, tail_logit_R)


def _even_heads(
    codec: LogprobCodec,
    pieces: Sequence[NDArray[Any]],
    head_size_R: NDArray[np.int32],
    tail_logit_R: NDArray[np.float32] | None,
    *,
    work: Work,
) -> NDArray[np.float32]:
    """Decode pieces [K, n] whose columns are all the rows."""
    pieces = _merged(pieces, axis=1)
    k = len(pieces[0])
    if np.any(head_size_R != k):
        raise ValueError(f"a head does not have the {k} entries of its shard")
    edges = _edges([piece.shape[1] for piece in pieces])
    logprob_RK = np.empty((len(head_size_R), k), np.float32)

    def fill(index: int) -> None:
        rows = slice(edges[index], edges[index + 1])
        logprob_KN = codec.decode_ranks(pieces[index])
        if tail_logit_R is not None:
            logprob_KN += _shift(np.exp(logprob_KN).sum(axis=0, dtype=np.float64), tail_logit_R[rows])
        logprob_RK[rows] = logprob_KN.T

    work.extend(partial(fill, index) for index in range(len(pieces)))
    return logprob_RK.reshape(-1)


def scale_heads(
    logprob_H: NDArray[np.float32], head_size_R: NDArray[np.int32], tail_logit_R: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Shift each head so that its probabilities sum to 1 - r, with r = sigmoid(tail_logit).

    Rows without a head, with r = 1, or whose head underflows, are left alone.
    """
    mass_R = np.zeros(len(head_size_R))
    filled = head_size_R > 0
    if np.any(filled):
        p_H = np.exp(logprob_H).astype(np.float64)
        mass_R[filled] = np.add.reduceat(p_H, row_starts(head_size_R)[:-1][filled])
    return logprob_H + np.repeat(_shift(mass_R, tail_logit_R), head_size_R)


def _shift(mass_R: NDArray[np.float64], tail_logit_R: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what to add to the log-probabilities of a head of this mass to make it 1 - r; 0 for an empty head."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shift_R = -np.logaddexp(0.0, tail_logit_R.astype(np.float64)) - np.log(mass_R)
    return np.where(np.isfinite(shift_R), shift_R, 0.0).astype(np.float32)
