"""Rounding what was rounded before, to the same numbers.

Readers scale each decoded head to its exact mass. So values that come back from a codec lie a little beside the points
that it rounds to, and in about one row of 200 an entry would fall to another point when it is rounded again. A
conversion that changes something else should not change such rows: here they are moved back, by no more than it takes.

Axis legend: R rows, H head entries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from storage.codecs import LogprobCodec
from storage.decode import scale_heads
from storage.segments import row_starts
from storage.validate import MASS_TOLERANCE

_MOST_DISTANCES = 64
_WAY_BACK = (0.1, 0.2, 0.3, 0.4, 0.6)  # parts of the way, tried in turn: the least move changes the least mass


def settle(
    codec: LogprobCodec,
    logprob_H: NDArray[np.float32],
    head_size_R: NDArray[np.int32],
    tail_logit_R: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return values [H] that the codec stores so that a reader gets `logprob_H` again, which a reader has given.

    A row for which that fails is returned as it is, and will be rounded anew.
    """
    settled_H = logprob_H.copy()
    if not codec.renormalises or len(logprob_H) == 0:
        return settled_H
    moved_R = ~_all(_same(_reread(codec, logprob_H, head_size_R, tail_logit_R), logprob_H), head_size_R)
    if not np.any(moved_R):
        return settled_H
    moved_H = np.repeat(moved_R, head_size_R)
    settled_H[moved_H] = _settled(codec, logprob_H[moved_H], head_size_R[moved_R], tail_logit_R[moved_R])
    return settled_H


def _settled(
    codec: LogprobCodec, value_H: NDArray[np.float32], size_R: NDArray[np.int32], tail_logit_R: NDArray[np.float32]
) -> NDArray[np.float32]:
    point_H = codec.decode(codec.encode(value_H, size_R), size_R)
    origin_H = _origin(codec, value_H, size_R, tail_logit_R)
    settled_H = value_H.copy()
    left_R = np.ones(len(size_R), dtype=bool)
    for part in _WAY_BACK:
        nearer_H = np.where(origin_H != point_H, value_H + np.float32(part) * (origin_H - value_H), value_H)
        good_R = left_R & _all(_same(_reread(codec, nearer_H, size_R, tail_logit_R), value_H), size_R)
        good_R &= _is_legal(nearer_H, value_H, size_R)
        good_H = np.repeat(good_R, size_R)
        settled_H[good_H] = nearer_H[good_H]
        left_R &= ~good_R
    return settled_H


def _origin(
    codec: LogprobCodec, value_H: NDArray[np.float32], size_R: NDArray[np.int32], tail_logit_R: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the points [H] that the reader moved to `value_H`, all entries of a row by the same distance.

    The distance is at most the mean error of the head, and any distance closer to it than half a step leads to the
    right points: so a few are tried. Entries of rows where none fits are returned as they are.
    """
    bound_H, p_H = codec.error_bound(value_H), np.exp(value_H.astype(np.float64))
    starts = row_starts(size_R)[:-1]
    reach_R = np.add.reduceat(bound_H * p_H, starts) / np.maximum(np.add.reduceat(p_H, starts), 1e-300)
    step_R = np.minimum.reduceat(bound_H, starts) / 2.0
    origin_H = value_H.copy()
    left_R = np.ones(len(size_R), dtype=bool)
    for number in range(min(_MOST_DISTANCES, int(np.ceil(2.0 * np.max(reach_R / step_R, initial=0.0))))):
        for sign in (-1.0, 1.0):
            shift_H = np.repeat(sign * number * step_R, size_R)
            point_H = codec.decode(codec.encode((value_H - shift_H).astype(np.float32), size_R), size_R)
            good_R = left_R & _all(_same(scale_heads(point_H, size_R, tail_logit_R), value_H), size_R)
            good_H = np.repeat(good_R, size_R)
            origin_H[good_H] = point_H[good_H]
            left_R &= ~good_R
    return origin_H


def _reread(
    codec: LogprobCodec, value_H: NDArray[np.float32], size_R: NDArray[np.int32], tail_logit_R: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return what a reader gets for these values."""
    return scale_heads(codec.decode(codec.encode(value_H, size_R), size_R), size_R, tail_logit_R)


def _is_legal(
    nearer_H: NDArray[np.float32], value_H: NDArray[np.float32], size_R: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Tell of each row whether it still falls, and has its mass to the tolerance of `validate.py`."""
    starts = row_starts(size_R)[:-1]
    rises_H = np.concatenate([[False], np.diff(nearer_H) > 0.0])
    rises_H[starts] = False
    change_R = np.add.reduceat(np.exp(nearer_H.astype(np.float64)) - np.exp(value_H.astype(np.float64)), starts)
    return _all(~rises_H, size_R) & (np.abs(change_R) < 0.99 * MASS_TOLERANCE)


def _all(good_H: NDArray[np.bool_], size_R: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Tell of each row whether all of its entries are good."""
    bad_R = np.bincount(np.repeat(np.arange(len(size_R)), size_R)[~good_H], minlength=len(size_R))
    good_R: NDArray[np.bool_] = bad_R == 0
    return good_R


def _same(a_H: NDArray[np.float32], b_H: NDArray[np.float32]) -> NDArray[np.bool_]:
    return np.isclose(a_H, b_H, rtol=1e-6, atol=1e-6)
