"""Student logits that exist already to a loss, chunk by chunk; beside them only their own gradient is held.

Shape suffixes: C rows of a chunk, V local vocabulary; a leading star is any shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stages.losses.engine.call import LossCall, Losses, finish, row_total, scaled_gradients
from stages.losses.engine.chunk import LogitChunk
from stages.losses.engine.objective import Objective
from stages.losses.engine.placement import by_vocabulary, is_placed, local_part, replicated, vocab_group
from stages.losses.engine.rows import LogitRows, valid_rows
from stages.losses.engine.settings import Settings
from stages.losses.engine.vocab import VocabShard
from stages.losses.targets import SparseTargets

# Memory of one chunk where chunk_size leaves it to us: small enough to stay in a shared cache.
_CHUNK_BYTES = 1 << 24


class FromLogits(torch.autograd.Function):
    """logits [*, V] -> loss, kd, ce."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: LossCall, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses; the gradient is formed here, in the logits' precision, from chunks in that of `dtype`."""
        gradient = call.gradient and ctx.needs_input_grad[0]
        source = LogitRows(logits, keep_N=call.keep_N, columns=call.shard.size)
        d_logits = logits.new_zeros(logits.shape) if gradient else None
        target = None if d_logits is None else LogitRows(d_logits, keep_N=call.keep_N, columns=call.shard.size)
        chunk: LogitChunk | None = None
        losses = Losses(call, logits.device)
        for span in call.spans():
            chunk = chunk or LogitChunk(span.stop, call.shard, dtype, logits.device)
            chunk.use(span.stop - span.start)
            chunk.logits_CV.copy_(source.read(span))
            losses.add(call.kernel(chunk, span, gradient=gradient), span)
            if target is not None:
                target.write(span, chunk.logits_CV)
        return finish(ctx, call, losses, [d_logits], logits.dtype)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the kept gradient times what comes in, a scalar or one number per row."""
        return *scaled_gradients(ctx, d_loss), None, None


def logit_loss(
    student_logits: Tensor,
    teacher: Tensor | SparseTargets | None,
    labels: Tensor,
    *,
    objective: Objective,
    weights: tuple[float, float],
    settings: Settings,
    num_batch_labels: float | Tensor | None,
) -> Tensor:
    """Return weighted divergence and cross-entropy of logits [*, V] against labels [*]: a scalar, or [*].

    Raises:
        ValueError: shapes, labels, vocabularies or rows that do not fit.
    """
    _check_shapes(student_logits, teacher, labels)
    student_logits = by_vocabulary(student_logits, -1, "the student's logits")
    group = vocab_group(student_logits, -1) if is_placed(student_logits) else settings.tp_group
    logits, labels_N = local_part(student_logits), replicated(labels).reshape(-1)
    with torch.autocast(logits.device.type, enabled=False):
        shard = VocabShard.of(logits.shape[-1], labels_N, group=group, vocab_size=settings.vocab_size)
        keep_N, labels_N = valid_rows(labels_N, ignore_index=settings.ignore_index, vocab_size=shard.total)
        total = row_total(settings.total(num_batch_labels), len(labels_N))
        wide = torch.promote_types(logits.dtype, torch.float32)
        # A dense teacher is compared block by block in float32 in any case.
        dtype = logits.dtype if isinstance(teacher, Tensor) or not settings.fp32_upcast else wide
        late = logits.dtype == torch.float16
        mix = objective.mix(*weights, gradient_scale=1.0 if late else 1.0 / total)
        call = LossCall(
            kernel=objective.kernel(teacher, labels_N, keep_N=keep_N, shard=shard, mix=mix),
            keep_N=keep_N,
            rows=len(labels_N),
            total=total,
            chunk_size=settings.chunk_size or max(1, _CHUNK_BYTES // (max(1, shard.widest) * dtype.itemsize)),
            shard=shard,
            check=settings.check,
            gradient=torch.is_grad_enabled(),
            late=late,
            lead=labels.shape if settings.per_row else None,
        )
        parts = FromLogits.apply(logits, call, dtype)  # type: ignore[no-untyped-call]  # torch does not annotate it
        loss: Tensor = parts[0]
        return loss


def _check_shapes(student: Tensor, teacher: Tensor | SparseTargets | None, labels: Tensor) -> None:
    if student.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(student.shape)} and labels {tuple(labels.shape)} do not fit: expected [*, V], [*]"
        )
    if isinstance(teacher, SparseTargets) and len(teacher) != labels.numel():
        raise ValueError(f"{len(teacher)} teacher rows do not fit {labels.numel()} labels {tuple(labels.shape)}")
    if isinstance(teacher, Tensor) and teacher.shape[:-1] != labels.shape:
        raise ValueError(f"teacher {tuple(teacher.shape)} and labels {tuple(labels.shape)} do not fit")
