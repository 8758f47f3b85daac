"""Random numbers that depend on what they are for and on nothing else.

A draw is keyed by (seed, document, position, draw number), so the samples of a position are the same in any batch,
chunk, shard or worker. A generator per shard or worker could not promise that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# splitmix64, Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 15 (mix64variant13).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def uniforms(
    seed: int, document_N: NDArray[np.int64], position_N: NDArray[np.int64], draws: int
) -> NDArray[np.float64]:
    """Return numbers in [0, 1), float64 [N, draws], one per document number, position in the document and draw."""
    state_N = _absorb(_absorb(_mix(np.array([seed], dtype=np.uint64)), document_N), position_N)
    hash_NM = _absorb(state_N[:, None], np.arange(draws, dtype=np.int64)[None, :])
    return (hash_NM >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _absorb(state: NDArray[np.uint64], value: NDArray[np.int64]) -> NDArray[np.uint64]:
    return _mix(state ^ _mix(value.astype(np.uint64)))


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit numbers one to one; arithmetic wraps around."""
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * _FIRST
    value = (value ^ (value >> np.uint64(27))) * _SECOND
    return value ^ (value >> np.uint64(31))
