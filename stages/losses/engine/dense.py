"""The row kernel for a teacher over the whole vocabulary, given as logits or as hidden states plus its head.

Every outcome is a vocabulary entry, so a divergence is a handful of elementwise operations. They run over a few rows
at a time: in float32, whatever the precision of the logits, on temporaries that stay in cache.

Shape suffixes: C rows of the chunk, R rows of a block, V local vocabulary, N rows of the batch, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from stages.losses.divergences import Divergence
from stages.losses.engine.chunk import BLOCK_ELEMENTS, LogitChunk, normalise_, ratio, row_dtype, scale_logits_, softmax_
from stages.losses.engine.head import OutputHead, check_rule
from stages.losses.engine.kernel import Mix, RowValues
from stages.losses.engine.placement import replicated
from stages.losses.engine.vocab import VocabShard


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherHead:
    """A dense teacher by its last hidden states and output head: its logits only ever exist one chunk at a time.

    Attributes:
        hidden_ND: [N, D_teacher] last hidden states, without gradient.
        weight_VD: [V, D_teacher] output head; under tensor parallelism the local shard or a DTensor.
        bias_V: [V] bias of the head.
        softcap: the teacher's own cap on logits.
        logit_multiplier: the teacher's own factor on logits, before the cap.
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    logit_multiplier: float = 1.0

    def __post_init__(self) -> None:
        check_rule(softcap=self.softcap, logit_multiplier=self.logit_multiplier)

    def local(self, shard: VocabShard) -> TeacherHead:
        """Return the part of the head whose tokens the student holds here, and whole hidden states."""
        weight_VD = shard.slice_of(self.weight_VD.detach().t(), "the teacher's head").t()
        bias_V = self.bias_V
        if bias_V is not None:
            bias_V = shard.slice_of(bias_V.detach(), "the teacher's bias")
        return replace(self, hidden_ND=replicated(self.hidden_ND.detach()), weight_VD=weight_VD, bias_V=bias_V)

    def head(self, columns: int, dtype: torch.dtype) -> OutputHead:
        """Return the first `columns` tokens of the head, in that precision."""
        return OutputHead.of(
            self.weight_VD.detach(),
            None if self.bias_V is None else self.bias_V.detach(),
            columns=columns,
            dtype=dtype,
            softcap=self.softcap,
            logit_multiplier=self.logit_multiplier,
        )


class ProjectedLogits:
    """Teacher logits made from hidden states, one chunk at a time."""

    def __init__(self, teacher: TeacherHead, keep_N: Tensor | None, columns: int) -> None:
        self.hidden_ND, self.keep_N = teacher.hidden_ND.detach(), keep_N
        self.head = teacher.head(columns, self.hidden_ND.dtype)
        self._buffer_CV: Tensor | None = None

    def __call__(self, span: slice) -> Tensor:
        """Return the logits of a chunk, valid until the next call: chunks share one buffer."""
        hidden_CD = self.hidden_ND[span if self.keep_N is None else self.keep_N[span]]
        if self._buffer_CV is None or len(self._buffer_CV) < len(hidden_CD):
            self._buffer_CV = hidden_CD.new_empty(len(hidden_CD), len(self.head.weight_VD))
        logits_CV = self._buffer_CV[: len(hidden_CD)]
        self.head.fill(hidden_CD, logits_CV)
        return logits_CV


class DenseRows:
    """KD against full-vocabulary teacher logits plus cross-entropy.

    Args:
        teacher: gives the teacher's logits [C, V] of some rows, local real columns, to be read only.
        teacher_scale: what they are multiplied with.
        labels_N: labels of the rows that take part.
        divergence: what is measured.
        mix: weights.
    """

    def __init__(
        self,
        teacher: Callable[[slice], Tensor],
        teacher_scale: float,
        labels_N: Tensor,
        divergence: Divergence,
        mix: Mix,
    ) -> None:
        self.teacher, self.teacher_scale, self.labels_N = teacher, teacher_scale, labels_N
        self.divergence, self.mix = divergence, mix

    @property
    def buffers(self) -> int:
        """The student's chunk; the teacher's, where it is made here, is as large and counts as the other side."""
        return 1

    def __call__(self, chunk: LogitChunk, span: slice, *, gradient: bool) -> RowValues:
        """Compute row losses; see RowKernel."""
        teacher_CV, labels_C = self.teacher(span), self.labels_N[span]
        step = len(labels_C)
        # On a CPU blocks stay in cache; elsewhere, and where each block would cost collectives, the whole chunk is one.
        if chunk.shard.group is None and chunk.logits_CV.device.type == "cpu":
            step = max(1, BLOCK_ELEMENTS // max(1, chunk.shard.size))
        blocks = []
        for start in range(0, len(labels_C), step):
            block = slice(start, start + step)
            log_q_RV = chunk.logits_CV[block].to(chunk.block_dtype, copy=True)
            log_p_RV = teacher_CV[block].to(chunk.block_dtype, copy=True)
            values, gradient_RV = self._block(log_q_RV, log_p_RV, labels_C[block], chunk.shard)
            blocks.append(values)
            if gradient:
                chunk.logits_CV[block] = gradient_RV
        return RowValues(torch.cat([values.kd_C for values in blocks]), torch.cat([values.ce_C for values in blocks]))

    def _block(
        self, log_q_RV: Tensor, log_p_RV: Tensor, labels_R: Tensor, shard: VocabShard
    ) -> tuple[RowValues, Tensor]:
        """Return losses of a few rows and their gradient, from both sides' logits, which are used up."""
        mix = self.mix
        label_R1, here_R1 = shard.local(labels_R.unsqueeze(-1))
        label_logit_R = torch.zeros(len(labels_R), dtype=row_dtype(labels_R.device), device=labels_R.device)
        if shard.size:  # a shard may hold nothing but padding
            label_logit_R += log_q_RV.gather(-1, label_R1).masked_fill_(~here_R1, 0.0).squeeze(-1)
        label_logit_R = shard.sum(label_logit_R)
        # Cross-entropy looks at the model's own logits, which a temperature of the divergence must not change.
        plain_RV = log_q_RV.clone() if mix.ce and mix.kd_scale != 1.0 else None
        ce_R = torch.zeros_like(label_logit_R)
        if mix.kd_scale != 1.0:
            scale_logits_(log_q_RV, mix.kd_scale, shard)
        q_RV, lse_R = normalise_(log_q_RV, shard)
        if self.teacher_scale != 1.0:
            scale_logits_(log_p_RV, self.teacher_scale, shard)
        p_RV, teacher_lse_R = normalise_(log_p_RV, shard)
        d_RV, h_RV = self.divergence.terms(log_p_RV, log_q_RV, p_RV, q_RV)
        # a row that holds NaN or rules out every token is not a distribution: its value is NaN
        kd_R = shard.sum(d_RV.sum(-1)).to(lse_R.dtype) + 0.0 * (teacher_lse_R + lse_R)
        sure = _Sure.find(q_RV, shard)
        gradient_RV = _through_softmax(h_RV, q_RV, divergence=self.divergence, shard=shard, sure=sure)
        gradient_RV.mul_(mix.kd_gradient)
        if plain_RV is not None:
            # A second softmax, for the cross-entropy alone.
            local_R = softmax_(plain_RV)
            lse_R = shard.logsumexp(local_R)
            gradient_RV.addcmul_(
                plain_RV, ratio(local_R, lse_R).unsqueeze(-1).to(plain_RV.dtype), value=mix.ce_gradient
            )
        elif mix.ce:
            # Unscaled, the divergence's q is the cross-entropy's too.
            gradient_RV.add_(q_RV, alpha=mix.ce_gradient)
        if mix.ce and shard.size:  # the one-hot label of q - 1(label), where its column is
            gradient_RV.scatter_add_(-1, label_R1, -mix.ce_gradient * here_R1.to(gradient_RV.dtype))
        if sure is not None:
            _balance_(gradient_RV, sure)
        # lse is that of the model's own logits here: the value comes for nothing even where its weight is 0.
        if mix.ce or mix.kd_scale == 1.0:
            ce_R = lse_R - label_logit_R
        # a divergence cannot be negative: what is below is rounding
        return RowValues(kd_R.clamp_min(0.0) * mix.value_scale, ce_R), gradient_RV


class _Sure(NamedTuple):
    """Which rows have an outcome with more than half of the student's mass, and its column (any, where none has)."""

    row_R1: Tensor
    column_R1: Tensor

    @classmethod
    def find(cls, q_RV: Tensor, shard: VocabShard) -> _Sure | None:
        """Return None without such rows. Under tensor parallelism too: their gradients lose digits there."""
        if shard.group is not None:
            return None
        row_R1 = q_RV.amax(-1, keepdim=True) > 0.5
        return cls(row_R1, _argmax(q_RV)) if bool(row_R1.any()) else None

    def write(self, values_RV: Tensor, value_R1: Tensor) -> None:
        """Overwrite the outcome in those rows."""
        before_R1 = values_RV.gather(-1, self.column_R1)
        values_RV.scatter_(-1, self.column_R1, torch.where(self.row_R1, value_R1, before_R1))


def _through_softmax(
    h_RV: Tensor, q_RV: Tensor, *, divergence: Divergence, shard: VocabShard, sure: _Sure | None
) -> Tensor:
    """Return dD/du = h - q * sum h, in place on h.

    Where one outcome m has nearly all of the student's mass, h_m and q_m * sum h agree in all their digits. Any
    constant times q may be added to h, so h_m is made zero first, but for its rounding.
    """
    if divergence.linear:  # h = -p, and its sum is -1
        return h_RV.add_(q_RV)
    if sure is not None:
        # Take off the multiple of q that makes h_m zero.
        level_R1 = h_RV.gather(-1, sure.column_R1) / q_RV.gather(-1, sure.column_R1)
        h_RV.addcmul_(q_RV, level_R1.masked_fill(~sure.row_R1, 0.0), value=-1.0)
    return h_RV.addcmul_(q_RV, shard.sum(h_RV.sum(-1)).unsqueeze(-1), value=-1.0)


def _balance_(gradient_RV: Tensor, sure: _Sure) -> None:
    """Make the gradient of a sure outcome what the others leave: a row adds up to zero, and q - p has few digits."""
    sure.write(gradient_RV, torch.zeros_like(gradient_RV[:, :1]))
    sure.write(gradient_RV, -gradient_RV.sum(-1, keepdim=True))


def _argmax(values_RV: Tensor) -> Tensor:
    """Return the column of a largest value of each row, [R, 1]: the best block, then the best of it.

    argmax over long rows is eight times slower than a maximum on CPU.
    """
    width, size = values_RV.shape[1], 128
    whole = width - width % size
    if whole < 8 * size:  # short rows: two steps would cost more than they save
        return values_RV.argmax(-1, keepdim=True)
    blocks_RB = values_RV[:, :whole].view(len(values_RV), -1, size).amax(-1)
    start_R1 = blocks_RB.argmax(-1, keepdim=True) * size
    column_RS = start_R1 + torch.arange(size, device=values_RV.device)
    column_R1 = start_R1 + values_RV.gather(-1, column_RS).argmax(-1, keepdim=True)
    if whole == width:  # no columns are left behind the last block
        return column_R1
    rest_R1 = whole + values_RV[:, whole:].argmax(-1, keepdim=True)
    better_R1 = values_RV.gather(-1, rest_R1) > values_RV.gather(-1, column_R1)
    return torch.where(better_R1, rest_R1, column_R1)
