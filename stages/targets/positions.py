"""Where rows belong: from sequences to the positions that get a row, and back to the order of documents.

Axis legend: N rows, B sequences of a batch, T tokens of its longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.corpus.tokenize import TokenWindow


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Where rows belong, and what follows there.

    Attributes:
        document: int64 [N], document numbers.
        position: int64 [N], index in the document's tokens of the position whose distribution the row is.
        next_token: int64 [N], id of the token that follows.
    """

    document: NDArray[np.int64]
    position: NDArray[np.int64]
    next_token: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, rows: slice) -> Positions:
        return Positions(document=self.document[rows], position=self.position[rows], next_token=self.next_token[rows])


def wanted_positions(sequences: Sequence[TokenWindow]) -> Positions:
    """Say where the rows of these sequences belong, sequence by sequence."""
    wanted = [(sequence, np.flatnonzero(sequence.has_row)) for sequence in sequences]
    return Positions(
        document=np.concatenate([np.full(len(found), sequence.document, np.int64) for sequence, found in wanted]),
        position=np.concatenate([sequence.window_start + found for sequence, found in wanted]),
        next_token=np.concatenate([sequence.tokens[found + 1].astype(np.int64) for sequence, found in wanted]),
    )


def wanted_mask(sequences: Sequence[TokenWindow]) -> Tensor:
    """Return mask_BT, bool: positions with a row; False in the padding."""
    mask_BT = np.zeros((len(sequences), max(len(sequence) for sequence in sequences)), dtype=np.bool_)
    for row, sequence in enumerate(sequences):
        mask_BT[row, : len(sequence)] = sequence.has_row
    return torch.from_numpy(mask_BT)


def document_order(sequences: Sequence[TokenWindow], computed: Sequence[int]) -> NDArray[np.int64]:
    """Return the order that brings rows, computed sequence by sequence as `computed` says, back to document order."""
    rows = [int(sequences[index].has_row.sum()) for index in computed]
    return np.argsort(np.repeat(np.array(computed, dtype=np.int64), rows), kind="stable")
