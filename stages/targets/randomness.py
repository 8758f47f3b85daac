"""Random numbers that depend on what they are for and on nothing else.

A draw is keyed by (seed, document, position, draw number), so the samples of a position are the same in any batch,
chunk, shard or worker. A generator per shard or worker could not promise that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from storage.permutation import mix64


def uniforms(
    seed: int, document_N: NDArray[np.int64], position_N: NDArray[np.int64], draws: int
) -> NDArray[np.float64]:
    """Return numbers in [0, 1), float64 [N, draws], one per document number, position in the document and draw."""
    state_N = _absorb(_absorb(mix64(np.array([seed], dtype=np.uint64)), document_N), position_N)
    hash_NM = _absorb(state_N[:, None], np.arange(draws, dtype=np.int64)[None, :])
    return (hash_NM >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _absorb(state: NDArray[np.uint64], value: NDArray[np.int64]) -> NDArray[np.uint64]:
    return mix64(state ^ mix64(value.astype(np.uint64)))
