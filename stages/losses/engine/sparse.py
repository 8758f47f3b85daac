"""The row kernel for sparse teacher rows: values and logit gradients of KD and cross-entropy, one chunk at a time.

In place on the chunk: logits become probabilities with one softmax, probabilities become the gradient with at most one
multiplication per row, and the few entries that differ are overwritten. With the teacher's estimate p_hat the gradient
is q - p_hat. With outcomes (head entries and one bucket for the rest) the head is struck out first, so that the softmax
gives the student's distribution *within* the bucket and its logsumexp the bucket's mass, without any 1 - sum.

Shape suffixes: C rows of the chunk, E entry slots per row, V local vocabulary, N rows of the batch, B outcomes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.losses.divergences import Divergence
from stages.losses.engine.chunk import LogitChunk, ratio, scale_logits_, softmax_
from stages.losses.engine.kernel import Mix, RowValues
from stages.losses.tail import TeacherEntries


class _Entries(NamedTuple):
    """The entries of a chunk's rows: cell and locality of each slot, its id, its logit (0 on unused slots)."""

    cell_CE: Tensor
    here_CE: Tensor
    used_CE: Tensor
    ids_CE: Tensor
    logit_CE: Tensor

    @classmethod
    def find(cls, chunk: LogitChunk, ids_CE: Tensor, used_CE: Tensor) -> _Entries:
        cell_CE, here_CE = chunk.locate(ids_CE, used_CE)
        return cls(cell_CE, here_CE, used_CE, ids_CE, chunk.read(cell_CE, here_CE))


class _Part(NamedTuple):
    """Divergence of the rows, and its gradient for the scaled logits.

    The gradient is row_C times the chunk's numbers, except at the entries, where it is entry_CE. share_C makes the
    chunk's numbers into the student's probabilities over the whole vocabulary, q_CE are those at the entries, lse_C
    is the logsumexp of the scaled logits.
    """

    kd_C: Tensor
    row_C: Tensor
    entry_CE: Tensor
    share_C: Tensor
    q_CE: Tensor
    lse_C: Tensor


class SparseRows:
    """KD against sparse rows plus cross-entropy; the teacher may be absent when mix.kd is 0."""

    def __init__(self, teacher: TeacherEntries | None, labels_N: Tensor, divergence: Divergence, mix: Mix) -> None:
        self.teacher, self.labels_N, self.divergence, self.mix = teacher, labels_N, divergence, mix

    @property
    def buffers(self) -> int:
        """Buffers of vocabulary width: two where KD and cross-entropy look at differently scaled logits."""
        return 2 if self.mix.kd and self.mix.ce and self.mix.kd_scale != 1.0 else 1

    def __call__(self, chunk: LogitChunk, span: slice, *, gradient: bool) -> RowValues:
        """Return row losses of chunk.logits_CV, which becomes the gradient for it (or scratch, without `gradient`).

        Args:
            chunk: student logits of the rows.
            span: which rows of the batch they are.
            gradient: whether the gradient is wanted.
        """
        labels_C1 = self.labels_N[span].unsqueeze(-1)
        label = _Entries.find(chunk, labels_C1, torch.ones_like(labels_C1, dtype=torch.bool))
        if self.teacher is None or self.mix.kd == 0:
            # Without a divergence no teacher is read: kd_ratio 0 costs a softmax and one entry per row.
            return self._cross_entropy(chunk, label, gradient=gradient)
        teacher = _rows(self.teacher, span)
        entries = _Entries.find(chunk, teacher.ids_NE, teacher.used_NE)
        # Cross-entropy looks at the model's own logits: a temperature of the divergence must not change them.
        unscaled_CV = chunk.logits_CV.clone() if self.buffers == 2 else None
        u_CE, u_label_C = _scale(chunk, entries, label, self.mix.kd_scale)
        part = (
            self._outcomes(chunk, entries, u_CE, teacher)
            if teacher.log_p_NE is not None
            else _estimate(chunk, entries, u_CE, teacher, u_label_C)
        )
        row_C, entry_CE = part.row_C * self.mix.kd_gradient, part.entry_CE * self.mix.kd_gradient
        ce_C = torch.zeros_like(part.kd_C)
        ce_row_C = None
        if unscaled_CV is not None:
            # Two softmaxes: the cross-entropy's own, whose gradient is added to the divergence's below.
            local_C = softmax_(unscaled_CV)
            lse_C = chunk.shard.logsumexp(local_C)
            ce_C, ce_row_C = (
                lse_C - label.logit_CE.squeeze(-1),
                self.mix.ce_gradient * (local_C - lse_C).exp(),
            )
            entry_CE = entry_CE + self.mix.ce_gradient * (entries.logit_CE - lse_C.unsqueeze(-1)).exp()
        elif self.mix.kd_scale == 1.0:
            # One softmax serves both: the cross-entropy's value is there for nothing, its gradient is a multiple of q.
            ce_C = part.lse_C - label.logit_CE.squeeze(-1)
            row_C, entry_CE = (
                row_C + self.mix.ce_gradient * part.share_C,
                entry_CE + self.mix.ce_gradient * part.q_CE,
            )
        if gradient:
            # q - p_hat with weights that add up to one saves this pass over the logits: the chunk holds q already, and
            # sum p_hat is 1 but for the rounding of what is stored.
            total = self.mix.kd_gradient + (self.mix.ce_gradient if unscaled_CV is None else 0.0)
            known_unit = chunk.shard.group is None and self.teacher.unit_mass
            if not (known_unit and math.isclose(total, 1.0, rel_tol=1e-12)):
                chunk.logits_CV.mul_(row_C.unsqueeze(-1).to(chunk.logits_CV.dtype))
            if unscaled_CV is not None and ce_row_C is not None:
                chunk.logits_CV.addcmul_(unscaled_CV, ce_row_C.unsqueeze(-1).to(unscaled_CV.dtype))
            self._write_entries(chunk, entries, entry_CE, label, teacher.label_mass_N)
        return RowValues(part.kd_C * self.mix.value_scale, ce_C)

    def _outcomes(self, chunk: LogitChunk, entries: _Entries, u_CE: Tensor, teacher: TeacherEntries) -> _Part:
        """Compute any divergence over head entries and, if the teacher has one, the bucket for the rest."""
        assert teacher.log_p_NE is not None
        # With the head struck out, the softmax over the rest is the student's distribution within the bucket.
        chunk.write(entries.cell_CE, -torch.inf)
        local_C = softmax_(chunk.logits_CV)
        rest_C = chunk.shard.logsumexp(local_C)
        u_CE = u_CE.masked_fill(~entries.used_CE, -torch.inf)
        head_C = u_CE.logsumexp(-1)
        lse_C = torch.logaddexp(rest_C, head_C)
        if teacher.log_tail_N is None:
            # renormalize_both: the student too is normalised over the head; there is no bucket.
            log_p_CB, log_q_CB = teacher.log_p_NE, u_CE - head_C.unsqueeze(-1)
        else:
            # The bucket is one outcome more, behind those of the head. A stored tail of exactly 0 is one below the
            # resolution of its storage: as float32's smallest normal number it leaves reverse divergences finite. An
            # empty tail (k = V) stays empty.
            log_q_tail_C = rest_C - lse_C
            floor = math.log(torch.finfo(torch.float32).tiny)
            log_tail_C = torch.where(
                log_q_tail_C == -torch.inf, teacher.log_tail_N, teacher.log_tail_N.clamp_min(floor)
            )
            log_p_CB = torch.cat([teacher.log_p_NE, log_tail_C.unsqueeze(-1)], -1)
            log_q_CB = torch.cat([u_CE - lse_C.unsqueeze(-1), log_q_tail_C.unsqueeze(-1)], -1)
        q_CB = log_q_CB.exp()
        d_CB, h_CB = self.divergence.terms(log_p_CB, log_q_CB, log_p_CB.exp(), q_CB)
        gradient_CB = h_CB - q_CB * h_CB.sum(-1, keepdim=True)
        width = u_CE.shape[-1]
        within_C = ratio(local_C, rest_C)
        row_C = gradient_CB[:, width] * within_C if teacher.log_tail_N is not None else torch.zeros_like(lse_C)
        return _Part(
            # a divergence cannot be negative: what is below is rounding; a row with NaN has the value NaN
            kd_C=d_CB.sum(-1).clamp_min(0.0) + 0.0 * lse_C,
            row_C=row_C,
            entry_CE=gradient_CB[:, :width],
            share_C=ratio(local_C, lse_C),
            q_CE=(u_CE - lse_C.unsqueeze(-1)).exp(),
            lse_C=lse_C,
        )

    def _cross_entropy(self, chunk: LogitChunk, label: _Entries, *, gradient: bool) -> RowValues:
        """Compute cross-entropy alone."""
        local_C = softmax_(chunk.logits_CV)
        lse_C = chunk.shard.logsumexp(local_C)
        ce_C = lse_C - label.logit_CE.squeeze(-1)
        if gradient:
            # Alone and unweighted the chunk holds q already; a shard's softmax knows only its own columns.
            if chunk.shard.group is not None or self.mix.ce_gradient != 1.0:
                row_C1 = (self.mix.ce_gradient * (local_C - lse_C).exp()).unsqueeze(-1)
                chunk.logits_CV.mul_(row_C1.to(chunk.logits_CV.dtype))
            q_C1 = (label.logit_CE - lse_C.unsqueeze(-1)).exp()
            chunk.write(label.cell_CE, self.mix.ce_gradient * (q_C1 - 1.0))
        return RowValues(torch.zeros_like(ce_C), ce_C)

    def _write_entries(
        self,
        chunk: LogitChunk,
        entries: _Entries,
        entry_CE: Tensor,
        label: _Entries,
        label_mass_C: Tensor | None,
    ) -> None:
        """Overwrite the gradient at the entries and take the label's share off, also where it is not an entry."""
        taken_C1 = torch.full_like(label.logit_CE, self.mix.ce_gradient)
        if label_mass_C is not None:
            taken_C1 = taken_C1 + self.mix.kd_gradient * label_mass_C.unsqueeze(-1)
        hit_CE = entries.used_CE & (entries.ids_CE == label.ids_CE)
        chunk.write(entries.cell_CE, entry_CE - taken_C1 * hit_CE)
        cell_C1, here_C1 = chunk.locate(label.ids_CE, ~hit_CE.any(-1, keepdim=True))
        chunk.write(cell_C1, chunk.read_local(cell_C1, here_C1) - taken_C1)


def _estimate(chunk: LogitChunk, entries: _Entries, u_CE: Tensor, teacher: TeacherEntries, u_label_C: Tensor) -> _Part:
    """Compute sum p_hat (log p_hat - log q) over the vocabulary: its gradient is (sum p_hat) q - p_hat."""
    assert teacher.estimate_NE is not None
    assert teacher.negentropy_N is not None
    local_C = softmax_(chunk.logits_CV)
    lse_C = chunk.shard.logsumexp(local_C)
    mass_C = teacher.estimate_NE.sum(-1)
    # 0 * -inf: an entry without mass contributes nothing, whatever the student thinks of it
    kd_C = teacher.negentropy_N - (teacher.estimate_NE * u_CE).masked_fill_(teacher.estimate_NE == 0, 0.0).sum(-1)
    if teacher.label_mass_N is not None:
        # residual_to_label: the label outside of the head is an entry more, without a slot.
        mass_C = mass_C + teacher.label_mass_N
        kd_C = kd_C - (teacher.label_mass_N * u_label_C).masked_fill_(teacher.label_mass_N == 0, 0.0)
    q_CE = (u_CE - lse_C.unsqueeze(-1)).exp()
    share_C = ratio(local_C, lse_C)
    return _Part(
        kd_C=kd_C + mass_C * lse_C,
        row_C=mass_C * share_C,
        entry_CE=mass_C.unsqueeze(-1) * q_CE - teacher.estimate_NE,
        share_C=share_C,
        q_CE=q_CE,
        lse_C=lse_C,
    )


def _scale(chunk: LogitChunk, entries: _Entries, label: _Entries, scale: float) -> tuple[Tensor, Tensor]:
    """Scale the chunk's logits in place, and return those of the entries [C, E] and the label [C]."""
    if scale == 1.0:
        return entries.logit_CE, label.logit_CE.squeeze(-1)
    shift_C1 = scale_logits_(chunk.logits_CV, scale, chunk.shard)
    return (entries.logit_CE - shift_C1) * scale, ((label.logit_CE - shift_C1) * scale).squeeze(-1)


def _rows(teacher: TeacherEntries, span: slice) -> TeacherEntries:
    chosen: dict[str, Any] = {n: value[span] for n, value in vars(teacher).items() if isinstance(value, Tensor)}
    return replace(teacher, **chosen)
