"""Hidden states and output head to a loss, chunk by chunk, gradients formed on the way: nothing is [tokens, vocab].

Shape suffixes: N rows, D hidden width, V local vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stages.losses.engine.call import LossCall, Losses, finish, refuse_second_derivative, scaled_gradients
from stages.losses.engine.chunk import LogitChunk
from stages.losses.engine.head import OutputHead

# Tokens whose low-precision product is held at once while it is added to a float32 weight gradient: a sum of two
# precisions makes a temporary of full size.
_GRADIENT_BLOCK = 8192


class FusedLinear(torch.autograd.Function):
    """hidden [N, D], weight [V, D], bias [V] -> loss, kd, ce."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        call: LossCall,
        logit_multiplier: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses. All gradients are formed here, unless every row keeps its own loss."""
        make_head = partial(
            OutputHead.of,
            columns=call.shard.size,
            dtype=hidden_ND.dtype,
            logit_multiplier=logit_multiplier,
            softcap=softcap,
        )
        head = make_head(weight_VD, bias_V)
        if call.lead is not None:
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
            ctx.call, ctx.make_head = call, make_head
            return finish(ctx, call, _losses(hidden_ND, head, call), [], hidden_ND.dtype)
        gradients = _Gradients(ctx, hidden_ND, weight_VD, bias_V, call)
        losses = _losses(hidden_ND, head, call, gradients)
        return finish(ctx, call, losses, gradients.finish(call), hidden_ND.dtype)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the kept gradients times the incoming scalar, or form them from one number per row."""
        if not ctx.per_row:
            return *scaled_gradients(ctx, d_loss), None, None, None
        refuse_second_derivative()
        if d_loss is None:
            return (None,) * 6
        hidden_ND, weight_VD, bias_V = ctx.saved_tensors
        call, head = ctx.call, ctx.make_head(weight_VD, bias_V)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            gradients = _Gradients(ctx, hidden_ND, weight_VD, bias_V, call, d_rows_N=d_loss / ctx.total)
            _losses(hidden_ND, head, call, gradients)
            return *gradients.finish(call), None, None, None


def _losses(hidden_ND: Tensor, head: OutputHead, call: LossCall, gradients: _Gradients | None = None) -> Losses:
    """Go through all chunks: return the losses, and add to the gradients where there are any."""
    wanted = gradients is not None and gradients.wanted
    chunk: LogitChunk | None = None
    losses = Losses(call, hidden_ND.device)
    for span in call.spans(extra_buffers=0 if head.softcap is None else 1):
        chunk = chunk or LogitChunk(span.stop, call.shard, hidden_ND.dtype, hidden_ND.device)
        chunk.use(span.stop - span.start)
        rows_C = call.rows_of(span)
        hidden_CD = hidden_ND[rows_C]
        head.fill(hidden_CD, chunk.logits_CV)
        slope_CV = head.slope(chunk.logits_CV) if wanted else None
        losses.add(call.kernel(chunk, span, gradient=wanted), span)
        if gradients is not None and wanted:
            if slope_CV is not None:
                chunk.logits_CV.mul_(slope_CV)
                slope_CV = None  # the next chunk's would be made beside it
            gradients.add(chunk.logits_CV, hidden_CD, head, rows_C, first=span.start == 0)
    return losses


class _Gradients:
    """Gradients of hidden, weight and bias while chunks come in; those that nobody wants are None.

    `d_rows_N` is what comes in for each row, where every row keeps its own loss.
    """

    def __init__(
        self,
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        call: LossCall,
        *,
        d_rows_N: Tensor | None = None,
    ) -> None:
        self.d_rows_N = d_rows_N
        hidden, weight, bias = (call.gradient and needed for needed in ctx.needs_input_grad[:3])
        self.wanted = hidden or weight or bias
        self.columns, self.total = call.shard.size, call.gradient_total
        self.hidden_ND = torch.zeros_like(hidden_ND) if hidden else None
        # The first chunk overwrites real tokens: zeroing them would cost a pass over the whole weight.
        self.weight_VD = torch.empty_like(weight_VD, dtype=_sum_dtype(weight_VD)) if weight else None
        if self.weight_VD is not None:
            self.weight_VD[self.columns if call.rows else 0 :].zero_()
        self.bias_V = torch.zeros_like(bias_V, dtype=_sum_dtype(bias_V)) if bias and bias_V is not None else None

    def add(
        self, d_logits_CV: Tensor, hidden_CD: Tensor, head: OutputHead, rows_C: slice | Tensor, *, first: bool
    ) -> None:
        """Take in the gradient of one chunk's logits, which is scaled in place where rows keep their own losses."""
        if self.d_rows_N is not None:
            d_logits_CV.mul_(self.d_rows_N[rows_C].unsqueeze(-1))
        factor = head.logit_multiplier / self.total
        if self.hidden_ND is not None:
            self.hidden_ND[rows_C] = torch.mm(d_logits_CV, head.weight_VD).mul_(factor)
        if self.weight_VD is not None:
            _add_outer(self.weight_VD[: self.columns], d_logits_CV, hidden_CD, factor, first=first)
        if self.bias_V is not None:
            self.bias_V[: self.columns] += d_logits_CV.sum(0).mul_(factor)

    def finish(self, call: LossCall) -> list[Tensor | None]:
        """Return the gradients; that of hidden is summed over the processes that hold parts of the vocabulary."""
        if self.hidden_ND is not None and call.shard.group is not None:
            dist.all_reduce(self.hidden_ND, group=call.shard.group)
        return [self.hidden_ND, self.weight_VD, self.bias_V]


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    """Return the precision in which gradients are summed over tokens: float16 would overflow before the division."""
    return torch.float32 if parameter.dtype == torch.float16 else parameter.dtype


def _add_outer(d_weight_VD: Tensor, d_logits_CV: Tensor, hidden_CD: Tensor, factor: float, *, first: bool) -> None:
    """Set or add d_weight (+)= factor * d_logits^T hidden, in the gradient's own precision.

    A bfloat16 gradient is rounded once per chunk. That is unbiased while a chunk is more than 2^-9 of the whole, for
    some hundred thousand tokens at the default chunk size; a float32 weight under bfloat16 hidden states rounds less.
    """
    if d_weight_VD.dtype == d_logits_CV.dtype:
        d_weight_VD.addmm_(d_logits_CV.t(), hidden_CD, beta=0.0 if first else 1.0, alpha=factor)
        return
    # A sum over rows that is not divided yet may be beyond float16.
    dtype = torch.float32 if d_logits_CV.dtype == torch.float16 else d_logits_CV.dtype
    for start in range(0, len(d_weight_VD), _GRADIENT_BLOCK):
        block = slice(start, start + _GRADIENT_BLOCK)
        product_VD = torch.mm(d_logits_CV[:, block].t().to(dtype), hidden_CD.to(dtype))
        if first:
            torch.mul(product_VD, factor, out=d_weight_VD[block])
        else:
            d_weight_VD[block].add_(product_VD, alpha=factor)
