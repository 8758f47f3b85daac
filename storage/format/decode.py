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
from storage.format.arrays import OFFSETS, column_array
from storage.plan import Plan
from storage.rows import SequenceBatch
from storage.segments import cumsum_rows, row_starts
from storage.threads import Each

Task = Callable[[], None]
Work = list[Task]  # tasks that fill arrays, in any order, in threads or one after the other
Slices = Mapping[str, Sequence[NDArray[Any]]]  # stored values by array name, cut to a run of sequences, in pieces
VALUES_AT_ONCE = 1 << 16  # a few hundred kilobytes with what is made of them: they stay in the processor's cache


def decode_batch(
    plan: Plan, runs: Sequence[Slices], remap: NDArray[np.uint32], *, scaled: bool = True, each: Each = map
) -> SequenceBatch:
    """Join runs of sequences, each cut from a shard, and decode them.

    Args:
        runs: stored values by array name, as `OpenShard.sequences` cuts them. Offsets begin anywhere.
        remap: token id of each rank [V].
        scaled: False leaves log-probabilities as the codec gives them, before each head is scaled to its mass.
        each: runs the work on ids, even heads and tails, in threads or one after the other.

    Raises:
        ValueError: sizes contradict each other or a rank is outside the vocabulary.
    """
    edges = {name: _joined_offsets(_pieces(runs, name)) for name in OFFSETS}
    entropy = _joined(runs, "entropy", np.float32)
    head_size = _joined(runs, "head_size", np.int32, rows=len(entropy))
    tail_size = _joined(runs, "tail_size", np.int32, rows=len(entropy))
    _check_sizes(edges, head_size, tail_size)
    # Rows of samples alone have no head: everything is outside of it.
    tail_logit = _joined(runs, "tail_logit", np.float32, rows=len(entropy), absent=np.inf)
    codec, work = logprob_codec(plan.codecs["logprob"]), Work()
    scale_to = tail_logit if scaled and codec.renormalises else None
    logprob = _logprob(codec, _pieces(runs, "logprob"), head_size, scale_to, work=work)
    tail_ids = _tail_ids(remap, _joined(runs, "tail_ids", None), tail_size, work=work)
    head_ids = _ids(remap, _pieces(runs, "head_ids"), work=work)
    tokens = _ids(remap, _pieces(runs, "tokens"), work=work)
    list(each(_do, work))
    return SequenceBatch(
        tokens=tokens,
        token_offset=edges["token_offset"],
        row_offset=edges["row_offset"],
        head_offset=edges["head_offset"] if plan.target.k else np.zeros_like(edges["row_offset"]),
        tail_offset=edges["tail_offset"] if plan.target.draws else np.zeros_like(edges["row_offset"]),
        document=_joined(runs, "document", np.int64),
        window_start=_joined(runs, "window_start", np.int64),
        token_end_byte=_end_bytes(runs),
        has_row=_joined(runs, "has_row", np.bool_),
        head_size=head_size,
        tail_size=tail_size,
        head_ids=head_ids,
        logprob=logprob,
        tail_ids=tail_ids,
        count=_joined(runs, "count", np.uint16),
        tail_logit=tail_logit,
        logsumexp=_joined(runs, "logsumexp", np.float32),
        entropy=entropy,
        next_logprob=_joined(runs, "next_logprob", np.float32),
        draws=plan.target.draws,
        temperatures=plan.target.temperatures,
        tail_logit_T=_by_temperature(plan, runs, "tail_logit_T", len(entropy)),
        entropy_T=_by_temperature(plan, runs, "entropy_T", len(entropy)),
        row_columns=_columns(plan, runs, "row"),
        sequence_columns=_columns(plan, runs, "sequence"),
    )


def _columns(plan: Plan, runs: Sequence[Slices], axis: str) -> dict[str, NDArray[Any]] | None:
    """Return the added columns of an axis by name; None without any."""
    columns = {
        name: _joined(runs, column_array(name), np.dtype(about["dtype"]))
        for name, about in plan.columns.items()
        if about["axis"] == axis
    }
    return columns or None


def _pieces(runs: Sequence[Slices], name: str) -> list[NDArray[Any]]:
    """Return the pieces of an array from all runs; none if the plan has no such array."""
    return [piece for run in runs for piece in run.get(name, ())]


def _joined(runs: Sequence[Slices], name: str, dtype: Any, *, rows: int = 0, absent: float = 0) -> NDArray[Any]:
    """Concatenate an array over the runs, flat; `absent` [rows] if the plan has no such array.

    Without a dtype the result may be a view of the reader's cache; with one it never is.
    """
    pieces = [piece.reshape(-1) for piece in _pieces(runs, name)]
    if not pieces:
        return np.full(rows, absent, dtype)
    if dtype is None and len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces, dtype=dtype, casting="unsafe")


def _joined_offsets(pieces: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Return offsets from 0 over all runs, each of which has one piece."""
    sizes = [np.diff(piece.astype(np.int64, copy=False)) for piece in pieces]
    return row_starts(np.concatenate(sizes)) if sizes else np.zeros(1, np.int64)


def _check_sizes(
    edges: Mapping[str, NDArray[np.int64]], head_size: NDArray[np.int32], tail_size: NDArray[np.int32]
) -> None:
    for name, sizes in (("head_offset", head_size), ("tail_offset", tail_size)):
        starts = row_starts(sizes)[edges["row_offset"]]
        if len(edges[name]) > 1 and not np.array_equal(starts, edges[name]):
            raise ValueError(f"the row sizes do not add up to {name}")


def _do(task: Task) -> None:
    task()


def _ids(remap: NDArray[np.uint32], pieces: Sequence[NDArray[Any]], *, work: Work) -> NDArray[np.uint32]:
    """Return the token ids of ranks, flat; they are there once the work is done."""
    pieces = _merged([piece.reshape(-1) for piece in pieces], axis=0)
    edges = _edges([len(piece) for piece in pieces])
    ids = np.empty(edges[-1], np.uint32)
    work.extend(
        partial(_take, remap, piece, ids[edges[place] : edges[place + 1]]) for place, piece in enumerate(pieces)
    )
    return ids


def _tail_ids(
    remap: NDArray[np.uint32], deltas_C: NDArray[Any], tail_size_R: NDArray[np.int32], *, work: Work
) -> NDArray[np.uint32]:
    """Return the token ids of differences of ranks, [C]; they are there once the work is done."""
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


def _end_bytes(runs: Sequence[Slices]) -> NDArray[np.uint32] | None:
    return _joined(runs, "token_end_byte", np.uint32) if all("token_end_byte" in run for run in runs) else None


def _by_temperature(plan: Plan, runs: Sequence[Slices], name: str, rows: int) -> NDArray[np.float32] | None:
    """Return an array [rows, temperatures]; None without temperatures, or if the rows were not read."""
    if not plan.target.temperatures:
        return None
    values = np.concatenate([piece.T for piece in _pieces(runs, name)]).astype(np.float32)
    return values if values.ndim == 2 and len(values) == rows else None


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

    def fill(place: int) -> None:
        rows = slice(edges[place], edges[place + 1])
        logprob_KN = codec.decode_ranks(pieces[place])
        if tail_logit_R is not None:
            logprob_KN += _shift(np.exp(logprob_KN).sum(axis=0, dtype=np.float64), tail_logit_R[rows])
        logprob_RK[rows] = logprob_KN.T

    work.extend(partial(fill, place) for place in range(len(pieces)))
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
