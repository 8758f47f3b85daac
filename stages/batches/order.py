"""The order in which training sees the sequences of a store: stateless, endless, one integer long.

Data path: seed, epoch -> **order** -> sequence indices -> store. Position p of the order is sequence
`permutation[seed, p // n](p % n)`, so that a cursor alone says where training stands, whatever the micro-batch size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.permutation import Permutation


@dataclass(frozen=True, kw_only=True)
class Order:
    """Every sequence once per epoch, each epoch in another order.

    Attributes:
        sequences: sequences in the store's split, n.
        seed: the run's; another seed, another order.
        digest: of the store (or of its frozen set of shards): another set of sequences, another order.
    """

    sequences: int
    seed: int
    digest: str

    def take(self, cursor: int, count: int) -> NDArray[np.int64]:
        """Return sequence indices at positions cursor <= p < cursor + count, int64 [count]."""
        epochs, within = np.divmod(np.arange(cursor, cursor + count, dtype=np.int64), self.sequences)
        parts = [
            Permutation(self.sequences, self.seed, int(epoch), digest=self.digest)(within[epochs == epoch])
            for epoch in np.unique(epochs)
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
