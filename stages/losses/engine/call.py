"""What both autograd functions share: the plan of one call, its chunks, and handing gradients to autograd.

The gradient of a loss that is a sum over rows needs nothing that its forward pass does not hold. So each chunk of
logits is turned into its own gradient and consumed before the next chunk is made; backward only multiplies what was
kept by the incoming scalar. Where every row keeps its own loss, backward is given one number per row instead: logits
hold their gradient row by row as before, while a head, whose gradient is a sum over rows, is gone through again.

Shape suffixes: N rows that take part, C rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from stages.losses.engine.chunk import row_dtype
from stages.losses.engine.kernel import RowKernel, RowValues
from stages.losses.engine.placement import replicated
from stages.losses.engine.vocab import VocabShard

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile out: a loss is chunked by row counts that depend on data, and is matrix products mostly."""
    return cast(Callable[P, R], torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class LossParts(NamedTuple):
    """loss = weighted sum of kd and ce, differentiable; kd and ce, detached, are 0 where they were not computed.

    Scalars; with reduction="none" one number per row, 0 where the label is ignored.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor


@dataclass(frozen=True, kw_only=True)
class LossCall:
    """One call of a loss.

    Attributes:
        kernel: what happens to a chunk.
        keep_N: numbers of the rows that take part, None for all.
        rows: how many those are.
        total: what the sums are divided by.
        chunk_size: rows of logits held at once.
        shard: which part of the vocabulary is local.
        check: raise on a row whose loss is not finite.
        gradient: whether any gradient is wanted.
        late: divide gradients by total in backward only, after a loss scale came in: float16 would lose the small ones.
        lead: shape of the losses where every row keeps its own, ignored rows included; None: they are added up.
    """

    kernel: RowKernel
    keep_N: Tensor | None
    rows: int
    total: float
    chunk_size: int
    shard: VocabShard
    check: bool = False
    gradient: bool = True
    late: bool = False
    lead: torch.Size | None = None

    @property
    def gradient_total(self) -> float:
        """What gradients are divided by in the forward pass."""
        return 1.0 if self.late else self.total

    def spans(self, extra_buffers: int = 0) -> Iterator[slice]:
        """Yield the rows of each chunk, such that all buffers together hold at most chunk_size rows."""
        step = max(1, self.chunk_size // (self.kernel.buffers + extra_buffers))
        for start in range(0, self.rows, step):
            yield slice(start, min(start + step, self.rows))

    def rows_of(self, span: slice) -> slice | Tensor:
        """Return the numbers, among all rows of the batch, of the rows of a chunk."""
        return span if self.keep_N is None else self.keep_N[span]

    def check_finite(self, values: RowValues, span: slice) -> None:
        """Raise FloatingPointError naming the first row whose loss is not finite, if checking is on."""
        if not self.check:
            return
        wrong_C = ~(values.kd_C.isfinite() & values.ce_C.isfinite())
        if bool(wrong_C.any()):
            at = int(wrong_C.nonzero()[0])
            row = span.start + at if self.keep_N is None else int(self.keep_N[span.start + at])
            raise FloatingPointError(
                f"row {row}: divergence {float(values.kd_C[at])}, cross-entropy {float(values.ce_C[at])}, expected "
                "finite numbers; its logits or its teacher hold NaN, are all -inf, or rule out what the other believes"
            )


class Losses:
    """Divergence and cross-entropy while chunks come in: two sums, or two numbers per row of the batch."""

    def __init__(self, call: LossCall, device: torch.device) -> None:
        self._call = call
        rows = () if call.lead is None else (call.lead.numel(),)
        self.kd, self.ce = torch.zeros(2, *rows, dtype=row_dtype(device), device=device)

    def add(self, values: RowValues, span: slice) -> None:
        """Take in one chunk. Raises FloatingPointError for a row that is not finite, if checking is on."""
        self._call.check_finite(values, span)
        if self._call.lead is None:
            self.kd, self.ce = self.kd + values.kd_C.sum(), self.ce + values.ce_C.sum()
        else:
            rows_C = self._call.rows_of(span)
            self.kd[rows_C], self.ce[rows_C] = values.kd_C.to(self.kd.dtype), values.ce_C.to(self.ce.dtype)


def row_total(num_batch_labels: float | Tensor | None, rows: int) -> float:
    """Return what sums over rows are divided by; 1 where there is nothing to divide.

    Raises:
        ValueError: a total that is not finite and positive although there are rows.
    """
    if num_batch_labels is None or rows == 0:
        return float(max(rows, 1))
    total = float(replicated(num_batch_labels) if isinstance(num_batch_labels, Tensor) else num_batch_labels)
    if not 0 < total < math.inf:
        raise ValueError(
            f"num_batch_labels is {total}, but this call alone has {rows} valid labels; "
            "expected a finite number above 0"
        )
    return total


def finish(
    ctx: Any, call: LossCall, losses: Losses, gradients: list[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the gradients for backward and return loss, kd and ce, at least in float32."""
    # Attributes, because save_for_backward would copy tensors that are neither inputs nor outputs.
    ctx.gradients = gradients
    ctx.total, ctx.per_row = call.total / call.gradient_total, call.lead is not None
    kd, ce = losses.kd / call.total, losses.ce / call.total
    if call.lead is not None:
        kd, ce = kd.view(call.lead), ce.view(call.lead)
    mix = call.kernel.mix
    # A part of weight 0 is left out rather than multiplied: 0 * inf is NaN.
    loss = mix.kd * kd + mix.ce * ce if mix.kd and mix.ce else mix.kd * kd if mix.kd else mix.ce * ce
    wide = torch.promote_types(dtype, torch.float32)
    loss, kd, ce = loss.to(wide), kd.to(wide), ce.to(wide)
    ctx.mark_non_differentiable(kd, ce)
    ctx.set_materialize_grads(False)
    return loss, kd, ce


def scaled_gradients(ctx: Any, d_loss: Tensor | None) -> list[Tensor | None]:
    """Return the kept gradients, scaled: in place, and only once, unless the graph is kept for another backward."""
    gradients: list[Tensor | None] | None = ctx.gradients
    if gradients is None:
        raise RuntimeError(
            "this loss was already backpropagated and has given its gradients away; pass retain_graph=True to the "
            "first backward to call it twice"
        )
    refuse_second_derivative()
    if d_loss is None:
        return [None for _ in gradients]
    factor = d_loss / ctx.total
    if ctx.per_row:
        factor = factor.unsqueeze(-1)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return [None if gradient is None else (gradient * factor).to(gradient.dtype) for gradient in gradients]
    ctx.gradients = None
    if ctx.per_row or float(factor) != 1.0:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(factor)
    return gradients


def refuse_second_derivative() -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True: a loss that forms its gradient in the forward pass has no second derivative; call "
            "backward without it"
        )
