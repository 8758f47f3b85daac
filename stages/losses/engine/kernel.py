"""What a row kernel is: the seam between the mathematics of a loss and the loop over chunks.

Shape suffixes: C rows of a chunk, V local vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from stages.losses.engine.chunk import LogitChunk


class RowValues(NamedTuple):
    """Loss of each row [C]; zeros for a part that was not computed."""

    kd_C: Tensor
    ce_C: Tensor


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How the parts of the loss add up.

    Attributes:
        kd: weight of the divergence; 0 computes none.
        ce: weight of the cross-entropy on the labels; 0 computes none, unless its value comes for nothing.
        kd_scale: what logits are multiplied with in the divergence, logits_scale / T.
        value_scale: T^2, which keeps gradient magnitudes independent of T.
        gradient_scale: factor on all gradients, but not on values.
    """

    kd: float
    ce: float
    kd_scale: float = 1.0
    value_scale: float = 1.0
    gradient_scale: float = 1.0

    @property
    def kd_gradient(self) -> float:
        """d(weighted divergence)/d(logit) per d(divergence)/d(scaled logit)."""
        return self.kd * self.value_scale * self.kd_scale * self.gradient_scale

    @property
    def ce_gradient(self) -> float:
        """d(weighted cross-entropy)/d(logit) per d(cross-entropy)/d(logit)."""
        return self.ce * self.gradient_scale


class RowKernel(Protocol):
    """Computes the row losses of a chunk of logits, and overwrites the logits with their gradient."""

    mix: Mix

    @property
    def buffers(self) -> int:
        """Buffers of vocabulary width that the kernel and its chunk hold together."""

    def __call__(self, chunk: LogitChunk, span: slice, *, gradient: bool) -> RowValues:
        """Return row losses of chunk.logits_CV, which becomes the gradient for it (or scratch, without `gradient`).

        Args:
            chunk: student logits of the rows.
            span: which of the rows that take part they are.
            gradient: whether the gradient is wanted.
        """
