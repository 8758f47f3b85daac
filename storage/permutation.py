"""The global order of an epoch: a bijection of range(n) that is computed, not stored.

Data path: position in the epoch -> **Permutation** -> sequence number -> `StoreReader.read`. The order depends on the
number of sequences, seed, epoch and set of shards, never on world size, workers or prefetch; the cursor of a run is one
integer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
_LARGEST = 2**62


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64 bits: the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). Same shape as the input."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Permutation:
    """A keyed bijection of range(n), by a Feistel network and cycle walking (Black, Rogaway, CT-RSA 2002).

    The network permutes the smallest range 4**b >= n; results outside of range(n) are sent through it again, fewer
    than four times on average.

    Args:
        n: number of items.
        seed: a new order for each.
        epoch: a new order for each.
        digest: of the store, so that another set of shards gets another order.
    """

    def __init__(self, n: int, seed: int, epoch: int, digest: str = "") -> None:
        if not 0 <= n <= _LARGEST:
            raise ValueError(f"n is {n}; it must lie between 0 and 2**62")
        self.n = n
        self._bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2) if n else 1)
        self._mask = np.uint64((1 << int(self._bits)) - 1)
        key = hashlib.sha512(f"topk_distill:{n}:{seed}:{epoch}:{digest}".encode()).digest()
        self._keys = np.frombuffer(key, dtype="<u8")[:ROUNDS].astype(np.uint64)

    def __len__(self) -> int:
        """Return n."""
        return self.n

    def __call__(self, positions: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the items at these positions of the order, int64, same shape.

        Raises:
            IndexError: a position is outside of range(n).
        """
        given = np.asarray(positions, dtype=np.int64)
        if given.size and (int(given.min()) < 0 or int(given.max()) >= self.n):
            raise IndexError(f"positions {given.min()} to {given.max()}; the order has {self.n}")
        values = self._network(given.astype(np.uint64).reshape(-1))
        outside = np.flatnonzero(values >= np.uint64(self.n))
        while len(outside):
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= np.uint64(self.n)]
        return values.astype(np.int64).reshape(given.shape)

    def _network(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix64(right ^ key) & self._mask)
        return (left << self._bits) | right
