"""Stored values of sequences become rows again: the other half of `shard.py`.

Data path: open shards -> slices of stored values -> **`SequenceBatch`**. Everything here is whole-array arithmetic on
what a call asked for; nothing is decoded that was not asked for.

Axis legend: S sequences, R rows, H head entries, C tail entries, K ranks of an even head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.arrays import OFFSETS, column_array
from storage.codecs import LogprobCodec, logprob_codec
from storage.plan import Plan
from storage.rows import SequenceBatch
from storage.segments import cumsum_rows, row_starts

Slices = Mapping[str, NDArray[Any]]  # stored values by array name, cut to a run of sequences


def decode_batch(plan: Plan, runs: Sequence[Slices], remap: NDArray[np.uint32]) -> SequenceBatch:
    """Join runs of sequences, each cut from a shard, and decode them.

    Args:
        plan: of the store.
        runs: stored values by array name, as `OpenShard.sequences` cuts them. Offsets begin anywhere.
        remap: token id of each rank [V].

    Raises:
        ValueError: sizes contradict each other or a rank is outside the vocabulary.
    """
    edges = {name: _joined_offsets([run[name] for run in runs if name in run]) for name in OFFSETS}
    entropy = _joined(runs, "entropy", np.float32)
    head_size = _joined(runs, "head_size", np.int32, rows=len(entropy))
    tail_size = _joined(runs, "tail_size", np.int32, rows=len(entropy))
    _check_sizes(edges, head_size, tail_size)
    # Rows of samples alone have no head: everything is outside of it.
    tail_logit = _joined(runs, "tail_logit", np.float32, rows=len(entropy), absent=np.inf)
    return SequenceBatch(
        tokens=_ids(remap, _joined(runs, "tokens", None)),
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
        head_ids=_ids(remap, _joined(runs, "head_ids", None)),
        logprob=_logprob(logprob_codec(plan.codecs["logprob"]), runs, head_size, tail_logit),
        tail_ids=_ids(remap, cumsum_rows(_joined(runs, "tail_ids", None), tail_size)),
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
    """Return the added columns of an axis by name; None if there are none."""
    columns = {
        name: _joined(runs, column_array(name), np.dtype(about["dtype"]))
        for name, about in plan.columns.items()
        if about["axis"] == axis
    }
    return columns or None


def _joined(runs: Sequence[Slices], name: str, dtype: Any, *, rows: int = 0, absent: float = 0) -> NDArray[Any]:
    """Concatenate an array over the runs, flat; `absent` [rows] if the plan has no such array.

    Without a dtype the result may be a view of the reader's cache; with one it never is.
    """
    parts = [run[name].reshape(-1) for run in runs if name in run]
    if not parts:
        return np.full(rows, absent, dtype)
    if dtype is None and len(parts) == 1:
        return parts[0]
    return np.concatenate(parts, dtype=dtype, casting="unsafe")


def _joined_offsets(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    sizes = [np.diff(part.astype(np.int64)) for part in parts]
    return row_starts(np.concatenate(sizes)) if sizes else np.zeros(1, np.int64)


def _check_sizes(
    edges: Mapping[str, NDArray[np.int64]], head_size: NDArray[np.int32], tail_size: NDArray[np.int32]
) -> None:
    for name, sizes in (("head_offset", head_size), ("tail_offset", tail_size)):
        starts = row_starts(sizes)[edges["row_offset"]]
        if len(edges[name]) > 1 and not np.array_equal(starts, edges[name]):
            raise ValueError(f"the row sizes do not add up to {name}")


def _ids(remap: NDArray[np.uint32], ranks: NDArray[Any]) -> NDArray[np.uint32]:
    try:
        return remap.take(ranks)
    except IndexError as error:
        raise ValueError(f"rank {int(ranks.max())} lies outside the vocabulary of {len(remap)}") from error


def _end_bytes(runs: Sequence[Slices]) -> NDArray[np.uint32] | None:
    return _joined(runs, "token_end_byte", np.uint32) if all("token_end_byte" in run for run in runs) else None


def _by_temperature(plan: Plan, runs: Sequence[Slices], name: str, rows: int) -> NDArray[np.float32] | None:
    """Return an array [rows, temperatures]; None without temperatures, or if the rows were not read."""
    if not plan.target.temperatures:
        return None
    values = np.concatenate([run[name].T for run in runs]).astype(np.float32)
    return values if values.ndim == 2 and len(values) == rows else None


def _logprob(
    codec: LogprobCodec, runs: Sequence[Slices], head_size_R: NDArray[np.int32], tail_logit_R: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Decode the heads of all runs, [H]. Shards of even heads hold their codes as [K, R], others as [H]."""
    parts = [run["logprob"] for run in runs if "logprob" in run]
    if parts and all(part.ndim == 2 for part in parts):
        return _even_heads(codec, np.concatenate(parts, axis=1), head_size_R, tail_logit_R)
    codes_H = np.concatenate([part.T.reshape(-1) for part in parts]) if parts else np.zeros(0, codec.dtype)
    logprob_H = codec.decode(codes_H, head_size_R)
    return scale_heads(logprob_H, head_size_R, tail_logit_R) if codec.renormalises else logprob_H


def _even_heads(
    codec: LogprobCodec,
    codes_KR: NDArray[Any],
    head_size_R: NDArray[np.int32],
    tail_logit_R: NDArray[np.float32],
) -> NDArray[np.float32]:
    if np.any(head_size_R != len(codes_KR)):
        raise ValueError(f"a head does not have the {len(codes_KR)} entries of its shard")
    logprob_KR = codec.decode_ranks(codes_KR)
    if codec.renormalises:
        logprob_KR += _shift(np.exp(logprob_KR).sum(axis=0, dtype=np.float64), tail_logit_R)
    return np.ascontiguousarray(logprob_KR.T).reshape(-1)


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
    """What to add to the log-probabilities of a head of this mass so that it has mass 1 - r; 0 where there is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shift_R = -np.logaddexp(0.0, tail_logit_R.astype(np.float64)) - np.log(mass_R)
    return np.where(np.isfinite(shift_R), shift_R, 0.0).astype(np.float32)
