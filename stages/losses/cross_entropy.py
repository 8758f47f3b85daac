"""Cross-entropy on logits that exist already, whole or sharded by vocabulary.

The constructors have the fields of NeMo-AutoModel's losses of the same names, in the same order.

Shape suffixes: V vocabulary; a leading star is any shape.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from stages.losses.divergences import ForwardKL
from stages.losses.engine.call import eager
from stages.losses.engine.logits import logit_loss
from stages.losses.engine.objective import Objective
from stages.losses.engine.placement import replicated
from stages.losses.engine.settings import Loss, Settings


class MaskedCrossEntropy(Loss):
    """Cross-entropy over the labels that are not masked.

    Args:
        fp32_upcast: compute in float32; False keeps chunks in the logits' precision.
        ignore_index: positions with this label take no part.
        reduction: "sum" or "mean" over valid positions, where the call gives no num_label_tokens; "none" keeps a loss
            per position.
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
        settings = Settings(
            ignore_index=ignore_index,
            reduction=reduction,
            fp32_upcast=fp32_upcast,
            chunk_size=chunk_size,
            vocab_size=vocab_size,
        )
        super().__init__(Objective(divergence=ForwardKL()), settings)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        num_label_tokens: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss: a scalar, or [*] where reduction is "none", with 0 at positions that take no part.

        Args:
            logits: [*, V]; a DTensor is not gathered.
            labels: [*], already the next token of each position.
            mask: [*], zero where a position takes no part.
            num_label_tokens: what losses are divided by; None leaves it to `reduction`.
        """
        return _cross_entropy(self, logits, labels, mask, num_label_tokens)


class TEParallelCrossEntropy(Loss):
    """Cross-entropy on logits sharded over the vocabulary, without gathering them.

    The interface of Transformer Engine's parallel cross-entropy in plain torch: it runs on CPU as well.

    Args:
        ignore_index: positions with this label take no part.
        reduction: "sum" or "mean" over valid positions, where the call gives no num_label_tokens; "none" keeps a loss
            per position.
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
        settings = Settings(
            ignore_index=ignore_index,
            reduction=reduction,
            tp_group=tp_group,
            chunk_size=chunk_size,
            vocab_size=vocab_size,
        )
        super().__init__(Objective(divergence=ForwardKL()), settings)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        num_label_tokens: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss, the same on every process of the group: a scalar, or [*] where reduction is "none".

        Args:
            logits: [*, V/tp] local shard, or a DTensor.
            labels: [*], already the next token of each position, whole ids.
            mask: [*], zero where a position takes no part.
            num_label_tokens: what losses are divided by; None leaves it to `reduction`.
        """
        return _cross_entropy(self, logits, labels, mask, num_label_tokens)


@eager
def _cross_entropy(
    loss: Loss, logits: Tensor, labels: Tensor, mask: Tensor | None, num_label_tokens: float | Tensor | None
) -> Tensor:
    if mask is not None:
        if mask.shape != labels.shape:
            raise ValueError(f"mask {tuple(mask.shape)} and labels {tuple(labels.shape)} do not fit")
        labels = replicated(labels).masked_fill(replicated(mask) == 0, loss.ignore_index)
    return logit_loss(
        logits,
        None,
        labels,
        objective=loss.objective,
        weights=(0.0, 1.0),
        settings=loss.settings,
        num_batch_labels=num_label_tokens,
    )
