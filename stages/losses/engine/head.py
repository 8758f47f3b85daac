"""A model's output head: hidden states to logits, with the factor and the cap that some models put on them.

Shape suffixes: C rows of a chunk, D hidden width, V local vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def check_rule(*, softcap: float | None, logit_multiplier: float) -> None:
    """Raise ValueError for a cap or a factor that leaves no logits."""
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}, expected a finite number above 0, or None for no cap")
    if not (math.isfinite(logit_multiplier) and logit_multiplier != 0.0):
        raise ValueError(f"logit_multiplier is {logit_multiplier}, expected a finite number other than 0")


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputHead:
    """logits = softcap * tanh(logit_multiplier * (hidden weight^T + bias) / softcap), or without the cap.

    Attributes:
        weight_VD: [V, D] local real tokens, in the precision of the products.
        bias_V: [V].
        logit_multiplier: the model's own factor on logits.
        softcap: the model's own cap (Gemma 2).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_multiplier: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(
        cls,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        *,
        columns: int,
        dtype: torch.dtype,
        logit_multiplier: float,
        softcap: float | None,
    ) -> OutputHead:
        """Return the first `columns` tokens, cast once."""
        return cls(
            weight_VD=weight_VD[:columns].to(dtype),
            bias_V=None if bias_V is None else bias_V[:columns].to(dtype),
            logit_multiplier=logit_multiplier,
            softcap=softcap,
        )

    def fill(self, hidden_CD: Tensor, logits_CV: Tensor) -> None:
        """Write the logits of hidden_CD."""
        if self.bias_V is None:
            torch.mm(hidden_CD, self.weight_VD.t(), out=logits_CV)
        else:
            torch.addmm(self.bias_V, hidden_CD, self.weight_VD.t(), out=logits_CV)
        if self.softcap is not None:
            logits_CV.mul_(self.logit_multiplier / self.softcap).tanh_().mul_(self.softcap)
        elif self.logit_multiplier != 1.0:
            logits_CV.mul_(self.logit_multiplier)

    def slope(self, logits_CV: Tensor) -> Tensor | None:
        """Return d logits / d (logits before the cap) [C, V], None without a cap; take it before they change."""
        if self.softcap is None:
            return None
        return (logits_CV / self.softcap).square_().neg_().add_(1.0)
