"""One packed micro-batch as torch tensors. The only border from numpy to torch, and the only place that shifts labels.

Data path: parts of a store -> **micro-batches** -> student and loss.

Shape suffixes: T tokens, N target rows (positions with a label), E entries per row; 1T is a batch of one row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.batches.sequences import lengths
from stages.losses.targets import SparseTargets
from storage.rows import SequenceBatch
from storage.segments import interleave, rank_in_row


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """Whole sequences laid end to end in one row; the model must keep them apart by `positions_1T`.

    Attributes:
        tokens_1T: int64 token ids.
        positions_1T: int64, counting from 0 again at the start of each sequence. Handed to the model as position_ids
            *without* an attention mask: a mask, even of ones, switches the separation of sequences off.
        labels_T: int64, the next token where the position has a target row, `ignore_index` elsewhere.
        rows_N: int64, positions that have a target row, rising; `labels_T[rows_N]` are never `ignore_index`.
        targets: the teacher's rows at `rows_N`, in that order; None when no targets were asked for.
    """

    tokens_1T: Tensor
    positions_1T: Tensor
    labels_T: Tensor
    rows_N: Tensor
    targets: SparseTargets | None

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.labels_T.shape[0]

    @property
    def rows(self) -> int:
        """Number of target rows."""
        return self.rows_N.shape[0]

    @property
    def labels_N(self) -> Tensor:
        """The next token of each target row."""
        return self.labels_T[self.rows_N]

    def to(self, device: torch.device) -> MicroBatch:
        """Return the same micro-batch on another device."""
        return replace(
            self,
            tokens_1T=self.tokens_1T.to(device, non_blocking=True),
            positions_1T=self.positions_1T.to(device, non_blocking=True),
            labels_T=self.labels_T.to(device, non_blocking=True),
            rows_N=self.rows_N.to(device, non_blocking=True),
            targets=None if self.targets is None else self.targets.to(device),
        )


def to_microbatch(batch: SequenceBatch, *, with_targets: bool, ignore_index: int = -100) -> MicroBatch:
    """Pack all sequences of `batch` into one row.

    Args:
        batch: sequences with their target rows.
        with_targets: False leaves the teacher's rows unread; labels are the same either way.
        ignore_index: label of positions without a target row.
    """
    position_T = rank_in_row(lengths(batch))
    token_T = batch.tokens.astype(np.int64)
    # The shift: position i predicts token i+1. The last token of a sequence never has a row (storage/rows.py), so
    # what `roll` brings there from the next sequence is never used.
    label_T = np.where(batch.has_row, np.roll(token_T, -1), ignore_index)
    return MicroBatch(
        tokens_1T=torch.from_numpy(token_T).unsqueeze(0),
        positions_1T=torch.from_numpy(position_T).unsqueeze(0),
        labels_T=torch.from_numpy(label_T),
        rows_N=torch.from_numpy(np.flatnonzero(batch.has_row).astype(np.int64)),
        targets=to_targets(batch) if with_targets else None,
    )


def to_targets(batch: SequenceBatch) -> SparseTargets:
    """Return the teacher's rows of a batch as the losses take them."""
    return SparseTargets.from_ragged(
        ids=interleave(batch.head_ids, batch.head_size, batch.tail_ids, batch.tail_size),
        row_entries=batch.head_size + batch.tail_size,
        head_size=batch.head_size,
        logprob=batch.logprob,
        count=batch.count,
        tail_logit=batch.tail_logit,
        draws=batch.draws,
        entropy=batch.entropy,
        next_logprob=batch.next_logprob,
        tail_logit_by_temperature=_by_temperature(batch, batch.tail_logit_T),
        entropy_by_temperature=_by_temperature(batch, batch.entropy_T),
    )


def _by_temperature(batch: SequenceBatch, values_RP: NDArray[np.float32] | None) -> dict[float, NDArray[np.float32]]:
    """Return columns of an array over rows and temperatures, by temperature."""
    return {} if values_RP is None else dict(zip(batch.temperatures, values_RP.T, strict=True))
