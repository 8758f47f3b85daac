"""Differences and running sums within the rows of a flat array: what delta coding needs.

Axis legend: R rows, N entries of all rows concatenated; `size_R` holds the entries of each row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def row_starts(size_R: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return where each row begins, and the end of the last: int64 [R+1]."""
    offset = np.zeros(len(size_R) + 1, dtype=np.int64)
    np.cumsum(size_R, out=offset[1:])
    return offset


def constant_size(size_R: NDArray[np.int32]) -> int | None:
    """Return the size that all rows share, or None if they differ or there is no entry at all."""
    if len(size_R) == 0 or size_R[0] == 0 or np.any(size_R != size_R[0]):
        return None
    return int(size_R[0])


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


def cumsum_rows(deltas_N: NDArray[Any], size_R: NDArray[np.int32]) -> NDArray[np.int64]:
    """Undo `diff_rows`: running sums within each row, int64 [N]."""
    k = constant_size(size_R)
    if k is not None:
        return np.cumsum(deltas_N.reshape(-1, k), axis=1, dtype=np.int64).reshape(-1)
    total = np.cumsum(deltas_N, dtype=np.int64)
    if len(total) == 0:
        return total
    before = np.concatenate([[0], total])[row_starts(size_R)[:-1]]
    within: NDArray[np.int64] = total - np.repeat(before, size_R)
    return within
