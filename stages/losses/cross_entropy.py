"""Cross-entropy on logits that exist already, whole or sharded by vocabulary.

The constructors have the fields of NeMo-AutoModel's losses of the same names, in the same order.

Shape suffixes: V vocabulary; a leading star is any shape.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from stages.losses.divergences import ForwardKL
from stages.losses.engine.call import eager
from stages.losses.engine.logits import LogitSettings, logit_loss
from stages.losses.engine.objective import Objective


class MaskedCrossEntropy(nn.Module):
    """Cross-entropy over the labels that are not masked.

    Args:
        fp32_upcast: compute in float32; False keeps chunks in the logits' precision.
        ignore_index: positions with this label take no part.
        reduction: "sum" or "mean" over valid positions, where the call gives no num_label_tokens.
        chunk_size: rows computed at once; 0 chooses.
        vocab_size: real tokens, where the head is padded.
    """

    def __init__(
        self,
        fp32_upcast: bool = True,
        ignore_index: int = -100,
        reduction: str = "sum",
        *,
        chunk_size: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self.reduction = check_reduction(reduction)
        self.settings = LogitSettings(
            ignore_index=ignore_index, fp32_upcast=fp32_upcast, chunk_size=chunk_size, vocab_size=vocab_size
        )

    @property
    def ignore_index(self) -> int:
        """Positions with this label take no part. Read-only."""
        return self.settings.ignore_index

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        num_label_tokens: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a scalar.

        Args:
            logits: [*, V]; a DTensor sharded by vocabulary is not gathered.
            labels: [*], already the next token of each position.
            mask: [*], zero where a position takes no part.
            num_label_tokens: what the sum is divided by; None leaves it to `reduction`.
        """
        if mask is not None:
            labels = labels.masked_fill(mask == 0, self.settings.ignore_index)
        total = total_of(self.reduction, num_label_tokens)
        return _run(logits, labels, settings=self.settings, num_batch_labels=total)


class TEParallelCrossEntropy(nn.Module):
    """Cross-entropy on logits sharded over the vocabulary, without gathering them.

    The interface of Transformer Engine's parallel cross-entropy in plain torch: it runs on CPU as well.

    Args:
        ignore_index: positions with this label take no part.
        reduction: "sum" or "mean" over valid positions, where the call gives no num_label_tokens.
        tp_group: processes that hold the parts of plain logits; a DTensor says so itself.
        chunk_size: rows computed at once; 0 chooses.
        vocab_size: real tokens, where the head is padded.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "sum",
        tp_group: dist.ProcessGroup | None = None,
        *,
        chunk_size: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self.reduction = check_reduction(reduction)
        self.settings = LogitSettings(
            ignore_index=ignore_index, tp_group=tp_group, chunk_size=chunk_size, vocab_size=vocab_size
        )

    @property
    def ignore_index(self) -> int:
        """Positions with this label take no part. Read-only."""
        return self.settings.ignore_index

    def forward(self, logits: Tensor, labels: Tensor, num_label_tokens: float | Tensor | None = None) -> Tensor:
        """Return the loss, a scalar, the same on every process of the group.

        Args:
            logits: [*, V/tp] local shard, or a DTensor.
            labels: [*], already the next token of each position, whole ids.
            num_label_tokens: what the sum is divided by; None leaves it to `reduction`.
        """
        total = total_of(self.reduction, num_label_tokens)
        return _run(logits, labels, settings=self.settings, num_batch_labels=total)


def check_reduction(reduction: str) -> str:
    """Return the reduction, if it is one."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}, allowed are 'sum' and 'mean'")
    return reduction


def total_of(reduction: str, num_label_tokens: float | Tensor | None) -> float | Tensor | None:
    """Return what the sum over valid labels is divided by; None for their number."""
    return 1.0 if num_label_tokens is None and reduction == "sum" else num_label_tokens


@eager
def _run(
    logits: Tensor,
    labels: Tensor,
    *,
    settings: LogitSettings,
    num_batch_labels: float | Tensor | None,
) -> Tensor:
    return logit_loss(
        logits,
        None,
        labels,
        objective=Objective(divergence=ForwardKL()),
        weights=(0.0, 1.0),
        settings=settings,
        num_batch_labels=num_batch_labels,
    )
