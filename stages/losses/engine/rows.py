"""Which rows of a batch take part in a loss, and how logits of any leading shape are read row by row.

Shape suffixes: N rows of the batch, C rows of a chunk, V local vocabulary; a leading star is any shape.
"""

from __future__ import annotations

import torch
from torch import Tensor


def valid_rows(labels_N: Tensor, *, ignore_index: int, vocab_size: int) -> tuple[Tensor | None, Tensor]:
    """Return the numbers of the rows that take part (None for all), and their labels in int64.

    Raises:
        ValueError: labels that are not integers, or one that is not a token.
    """
    if labels_N.dtype == torch.bool or labels_N.is_floating_point():
        raise ValueError(f"labels are {labels_N.dtype}, expected token ids of an integer type")
    labels_N = labels_N.long()
    valid_N = labels_N != ignore_index
    keep_N = None if bool(valid_N.all()) else valid_N.nonzero().squeeze(-1)
    kept_N = labels_N if keep_N is None else labels_N[keep_N]
    wrong_N = (kept_N < 0) | (kept_N >= vocab_size)
    if bool(wrong_N.any()):
        at = int(wrong_N.nonzero()[0])
        row = at if keep_N is None else int(keep_N[at])
        raise ValueError(
            f"row {row}: label {int(kept_N[at])} is neither ignore_index ({ignore_index}) nor one of the "
            f"{vocab_size} tokens"
        )
    return keep_N, kept_N


class LogitRows:
    """Rows of logits [*, V], counted over all leading dimensions, without copying the whole.

    Args:
        logits: [*, V], of any strides.
        keep_N: numbers of the rows that take part, None for all.
        columns: leading columns that are real tokens.
    """

    def __init__(self, logits: Tensor, *, keep_N: Tensor | None, columns: int) -> None:
        self._lead, self._columns, self._keep_N = logits.shape[:-1], columns, keep_N
        self._logits = logits
        if logits.is_contiguous():
            self._logits = logits.view(self._lead.numel(), logits.shape[-1])
            self._lead = self._logits.shape[:1]

    def _index(self, span: slice) -> tuple[slice | Tensor, ...]:
        if len(self._lead) == 1:
            return (span if self._keep_N is None else self._keep_N[span],)
        flat_C = torch.arange(span.start, span.stop, device=self._logits.device)
        return torch.unravel_index(flat_C if self._keep_N is None else self._keep_N[span], self._lead)

    def read(self, span: slice) -> Tensor:
        """Return [C, V]; a view where the rows are neighbours in memory."""
        return self._logits[(*self._index(span), slice(self._columns))]

    def write(self, span: slice, value_CV: Tensor) -> None:
        """Overwrite those rows' real columns."""
        self._logits[(*self._index(span), slice(self._columns))] = value_CV.to(self._logits.dtype)
