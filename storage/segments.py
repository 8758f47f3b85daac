"""Arithmetic on rows that lie in flat arrays: starts, draws, differences and running sums within rows.

Axis legend: R rows, N entries of all rows concatenated, H of heads, C of tails; `size_R` holds the entries of each row.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


def row_starts(size_R: NDArray[Any]) -> NDArray[np.int64]:
    """Return where each row begins, and the end of the last, from sizes of any integer type or marks: int64 [R+1]."""
    offset = np.zeros(len(size_R) + 1, dtype=np.int64)
    np.cumsum(size_R, out=offset[1:])
    return offset


def rank_in_row(size_R: NDArray[Any]) -> NDArray[np.int64]:
    """Return the place of each entry in its row, counted from 0: int64 [N]."""
    starts = row_starts(size_R)
    return np.arange(starts[-1]) - np.repeat(starts[:-1], size_R)


def interleave(
    head_H: NDArray[Any], head_size_R: NDArray[np.int32], tail_C: NDArray[Any], tail_size_R: NDArray[np.int32]
) -> NDArray[Any]:
    """Return the entries of all rows, each row's head before its tail: [H + C], in the type of the heads."""
    entries = np.empty(len(head_H) + len(tail_C), head_H.dtype)
    entries[np.arange(len(head_H)) + np.repeat(row_starts(tail_size_R)[:-1], head_size_R)] = head_H
    entries[np.arange(len(tail_C)) + np.repeat(row_starts(head_size_R)[1:], tail_size_R)] = tail_C
    return entries


def merge_draws(
    drawn_RM: NDArray[np.uint32], *, empty_R: NDArray[np.bool_]
) -> tuple[NDArray[np.uint32], NDArray[np.uint16], NDArray[np.int32]]:
    """Return distinct ids uint32 [N], how often each was drawn uint16 [N], and how many there are per row int32 [R].

    Ids rise within a row of `drawn_RM`; rows marked empty get none.
    """
    first_RM = np.ones(drawn_RM.shape, dtype=np.bool_)
    first_RM[:, 1:] = drawn_RM[:, 1:] != drawn_RM[:, :-1]
    # A run of equal ids ends where the next one begins, if not in its row then in the next.
    count_N = np.diff(np.flatnonzero(first_RM), append=first_RM.size)
    filled_RM = first_RM & ~empty_R[:, None]
    return drawn_RM[filled_RM], count_N[filled_RM[first_RM]].astype(np.uint16), filled_RM.sum(axis=1, dtype=np.int32)


def diff_rows(values_N: NDArray[Any], size_R: NDArray[np.int32]) -> NDArray[Any]:
    """Return the first value of each row, then differences [N], in the type of the input (which must not fall)."""
    out = values_N.copy()
    if len(values_N) == 0:
        return out
    out[1:] -= values_N[:-1]
    starts = row_starts(size_R)[:-1]
    starts = starts[size_R > 0]
    out[starts] = values_N[starts]
    return out


def cumsum_rows(deltas_N: NDArray[Any], size_R: NDArray[np.int32]) -> NDArray[Any]:
    """Undo `diff_rows`: running sums within each row [N], as unsigned integers that hold them.

    The running sum over all rows may wrap around; what a row adds to it does not.
    """
    narrow = deltas_N.dtype.itemsize <= 2 and size_R.max(initial=0) <= 1 << 16
    total: NDArray[Any] = np.cumsum(deltas_N, dtype=np.uint32 if narrow else np.uint64)
    if len(total) == 0:
        return total
    filled = size_R > 0
    start = row_starts(size_R)[:-1][filled]
    before = total[start - 1]
    before[:1] = 0
    total -= np.repeat(before, size_R[filled])
    return total


def sum_ranks(deltas_KR: NDArray[Any]) -> NDArray[Any]:
    """Undo `diff_rows` for rows that all have K entries, stored rank after rank: [K, R], in the type of the input.

    Raises:
        ValueError: a sum is beyond the largest number of that type.
    """
    sums_KR = deltas_KR.copy()
    for before, here in pairwise(sums_KR):
        np.add(before, here, out=here)
    if np.any(sums_KR[1:] < sums_KR[:-1]):
        raise ValueError(f"the codes of a row sum beyond {np.iinfo(sums_KR.dtype).max}")
    return sums_KR


def sigmoid(logit: NDArray[Any]) -> NDArray[np.float64]:
    """Return exp(x) / (1 + exp(x)), exact to the last digits on both sides: of `tail_logit` it is the tail's mass."""
    mass: NDArray[np.float64] = np.exp(-np.logaddexp(0.0, -logit.astype(np.float64)))
    return mass
