"""A smaller exact head: entries move from it into the tail, without a teacher, and the rows stay unbiased.

The mass of the tail grows by theirs, which is known. Samples stay what they were made to be, independent draws from
everything outside of the head: with r the old tail mass and r' the new one, each draw is kept with probability r / r'
and otherwise drawn anew among the entries that left, by their probabilities. A kept draw is a draw from the old tail,
so together they are draws from the new one.

Axis legend: R rows, K ranks of the widest head, M draws, P temperatures; H head entries, C tail entries.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.permutation import mix64
from storage.plan import TargetSpec
from storage.rows import SequenceBatch
from storage.segments import merge_draws, rank_in_row, row_starts, sigmoid

_ROWS_AT_ONCE = 1 << 22  # divided by entries x draws, so that memory stays bounded


def smaller_head(batch: SequenceBatch, target: TargetSpec, *, origin: str) -> SequenceBatch:
    """Return the batch with heads of at most `target.k` entries.

    Args:
        batch: sequences with larger heads.
        target: what the new store holds. Its seed is part of the key of the draws made anew.
        origin: id of the store that the batch is from, the other part of the key: a head that is made smaller twice
            must be given new random numbers, or those that decided which draws were kept decide again.
    """
    size_R = np.minimum(batch.head_size, target.k).astype(np.int32)
    kept_H = rank_in_row(batch.head_size) < target.k
    logprob_RK = _padded(batch.logprob, batch.head_size, -np.inf, target.k)
    tail_logit, left_R = _tail(logprob_RK, batch.tail_logit, target.k)
    smaller = replace(
        batch,
        head_size=size_R,
        head_offset=row_starts(size_R)[batch.row_offset],
        head_ids=batch.head_ids[kept_H],
        logprob=batch.logprob[kept_H],
        tail_logit=tail_logit,
        tail_logit_T=_tail_by_temperature(logprob_RK, batch, target.k),
    )
    return _with_samples(smaller, batch, left_R, k=target.k, key=_key(target.seed, origin)) if batch.draws else smaller


def _padded(values_H: NDArray[Any], size_R: NDArray[np.int32], filler: float, k: int) -> NDArray[np.float64]:
    """Return entries as a table [R, K] of more than k columns."""
    table = np.full((len(size_R), int(size_R.max(initial=k + 1))), filler)
    table[np.arange(table.shape[1]) < size_R[:, None]] = values_H
    return table


def _tail(
    logprob_RK: NDArray[np.float64], tail_logit_R: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return the new tail_logit [R], and the share of the new tail that left the head [R].

    Sums of what is inside and of what is outside, never 1 minus something: no digit of a small mass is lost.
    """
    old_R = sigmoid(tail_logit_R)
    left_R = np.exp(logprob_RK[:, k:]).sum(axis=1)
    inside_R = np.exp(logprob_RK[:, :k]).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        tail_logit = np.log(old_R + left_R) - np.log(inside_R)
        share_R = np.where(left_R > 0.0, left_R / (old_R + left_R), 0.0)
    return tail_logit.astype(np.float32), share_R


def _tail_by_temperature(logprob_RK: NDArray[np.float64], batch: SequenceBatch, k: int) -> NDArray[np.float32] | None:
    """Return tail_logit_T [R, P]: within the head, ratios at temperature T are those of p^(1/T)."""
    if batch.tail_logit_T is None:
        return None
    columns = []
    for temperature, tail_logit_R in zip(batch.temperatures, batch.tail_logit_T.T, strict=True):
        scaled_RK = logprob_RK / temperature
        largest_R1 = scaled_RK.max(axis=1, keepdims=True, initial=-np.inf)
        total_R1 = largest_R1 + np.log(np.exp(scaled_RK - largest_R1).sum(axis=1, keepdims=True))
        inside_R1 = -np.logaddexp(0.0, tail_logit_R.astype(np.float64))[:, None]
        columns.append(_tail(scaled_RK - total_R1 + inside_R1, tail_logit_R, k)[0])
    return np.stack(columns, axis=1)


def _with_samples(
    smaller: SequenceBatch, batch: SequenceBatch, left_R: NDArray[np.float64], *, k: int, key: np.uint64
) -> SequenceBatch:
    """Return the batch with samples of the larger tail."""
    width = max(1, int(batch.head_size.max(initial=0)) - k)
    step = max(1, _ROWS_AT_ONCE // (width * batch.draws))
    head, tail = row_starts(batch.head_size), row_starts(batch.tail_size)
    key_R = _row_keys(batch, key)
    ids: list[NDArray[np.int64]] = []
    for first in range(0, batch.rows, step):
        rows = slice(first, min(first + step, batch.rows))
        heads, tails = slice(head[rows.start], head[rows.stop]), slice(tail[rows.start], tail[rows.stop])
        logprob_RK = _padded(batch.logprob[heads], batch.head_size[rows], -np.inf, k)[:, k:]
        ids_RK = _padded(batch.head_ids[heads], batch.head_size[rows], 0, k)[:, k:].astype(np.int64)
        old_RM = _draws(batch.tail_ids[tails], batch.count[tails], batch.tail_size[rows], batch.draws)
        keep_RM, pick_RM = _uniform(key_R[rows], batch.draws)
        cumulative_RK = np.cumsum(np.exp(logprob_RK), axis=1)
        at_RM = (pick_RM[:, :, None] * cumulative_RK[:, None, -1:] >= cumulative_RK[:, None, :]).sum(axis=2)
        new_RM = np.take_along_axis(ids_RK, np.minimum(at_RM, ids_RK.shape[1] - 1), axis=1)
        ids.append(np.where(keep_RM < left_R[rows, None], new_RM, old_RM))
    return _counted(smaller, np.concatenate(ids) if ids else np.zeros((0, batch.draws), np.int64))


def _key(seed: int, origin: str) -> np.uint64:
    """Return the key of a conversion, set apart from those of extractions."""
    digest = hashlib.sha256(f"smaller_head:{seed}:{origin}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def _row_keys(batch: SequenceBatch, key: np.uint64) -> NDArray[np.uint64]:
    """Return a random number per row that depends on key, document and position alone."""
    token_R = np.flatnonzero(batch.has_row)
    sequence_R = batch.sequence_of_row
    position_R = batch.window_start[sequence_R] + token_R - batch.token_offset[sequence_R]
    document_key = mix64(batch.document[sequence_R].astype(np.uint64) ^ key)
    return mix64(document_key ^ position_R.astype(np.uint64))


def _uniform(key_R: NDArray[np.uint64], draws: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return two tables [R, M] of independent uniform numbers in [0, 1)."""
    numbers = mix64(key_R[:, None] ^ mix64(np.arange(2 * draws, dtype=np.uint64)))
    uniform = (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform[:, :draws], uniform[:, draws:]


def _draws(
    ids_C: NDArray[np.uint32], count_C: NDArray[np.uint16], size_R: NDArray[np.int32], draws: int
) -> NDArray[np.int64]:
    """Return the draws of each row one by one [R, M]; zeros in rows that had no tail, where none is kept."""
    row_C = np.repeat(np.arange(len(size_R)), size_R)
    drawn_R = np.bincount(row_C, weights=count_C, minlength=len(size_R)).astype(bool)
    table = np.zeros((len(size_R), draws), np.int64)
    table[drawn_R] = np.repeat(ids_C, count_C).reshape(-1, draws)
    return table


def _counted(batch: SequenceBatch, ids_RM: NDArray[np.int64]) -> SequenceBatch:
    """Return the batch with these draws as its samples: distinct ids of each row with counts. No tail, no samples."""
    drawn_RM = np.sort(ids_RM, axis=1).astype(np.uint32)
    ids, count, size_R = merge_draws(drawn_RM, empty_R=np.isneginf(batch.tail_logit))
    return replace(
        batch,
        tail_size=size_R,
        tail_offset=row_starts(size_R)[batch.row_offset],
        tail_ids=ids,
        count=count,
    )
