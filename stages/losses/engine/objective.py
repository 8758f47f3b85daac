"""What is compared with what: a divergence with its temperature, scales and tail policy, bound to a batch's teacher.

Shape suffixes: N rows of the batch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from stages.losses.divergences import Divergence
from stages.losses.engine.chunk import row_dtype
from stages.losses.engine.dense import DenseRows, ProjectedLogits, TeacherHead
from stages.losses.engine.kernel import Mix, RowKernel
from stages.losses.engine.rows import LogitRows
from stages.losses.engine.sparse import SparseRows
from stages.losses.engine.vocab import VocabShard
from stages.losses.tail import check_tail, prepare_teacher, resolve_tail
from stages.losses.targets import SparseTargets, check_distinct

Teacher: TypeAlias = SparseTargets | TeacherHead | Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A divergence and how both sides enter it.

    Attributes:
        divergence: what is measured.
        tail: a key of TAIL_POLICIES or None, for sparse rows.
        temperature: T of both sides; values and gradients carry T^2.
        logits_scale: factor on the student's logits; larger is sharper; no T^2 comes from it.
        target_logits_scale: factor on the teacher's logits.
    """

    divergence: Divergence
    tail: str | None = None
    temperature: float = 1.0
    logits_scale: float = 1.0
    target_logits_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "logits_scale", "target_logits_scale"):
            value = getattr(self, name)
            if not 0.0 < value <= sys.float_info.max:  # a whole number may be larger than any float
                raise ValueError(f"{name} is {value}, expected a finite number above 0")
        check_tail(self.tail, self.divergence)

    def mix(self, kd: float, ce: float, *, gradient_scale: float = 1.0) -> Mix:
        """Return the weights of the parts, with this objective's scales."""
        return Mix(
            kd=kd,
            ce=ce,
            kd_scale=self.logits_scale / self.temperature,
            value_scale=self.temperature**2,
            gradient_scale=gradient_scale,
        )

    def kernel(
        self,
        teacher: Teacher | None,
        labels_N: Tensor,
        *,
        keep_N: Tensor | None,
        shard: VocabShard,
        mix: Mix,
    ) -> RowKernel:
        """Return the row kernel for one batch.

        Args:
            teacher: sparse rows, dense logits [*, V] or a TeacherHead; None where mix.kd is 0.
            labels_N: labels of the rows that take part.
            keep_N: numbers of those rows, None for all.
            shard: the student's part of the vocabulary.
            mix: weights.

        Raises:
            ValueError: a teacher that does not fit the rows, the vocabulary or the tail policy.
        """
        if mix.kd == 0:
            return SparseRows(None, labels_N, self.divergence, mix)
        if teacher is None:
            raise ValueError(
                "the divergence has a weight above 0, but there is no teacher; only kd_ratio=0 goes without"
            )
        if isinstance(teacher, SparseTargets):
            rows = teacher if keep_N is None else teacher.rows(keep_N)
            return self._sparse(rows, labels_N, shard=shard, mix=mix)
        if self.tail is not None:
            raise ValueError(f"tail={self.tail!r} is for sparse rows; a dense teacher has no tail: leave it None")
        scale = self.target_logits_scale / self.temperature
        if isinstance(teacher, TeacherHead):
            local = teacher.local(shard)
            return DenseRows(ProjectedLogits(local, keep_N, shard.size), scale, labels_N, self.divergence, mix)
        logits = shard.slice_of(teacher.detach(), "the teacher")
        given = LogitRows(logits, keep_N=keep_N, columns=shard.size)
        return DenseRows(given.read, scale, labels_N, self.divergence, mix)

    def _sparse(self, targets: SparseTargets, labels_N: Tensor, *, shard: VocabShard, mix: Mix) -> SparseRows:
        strange_NE = (targets.head_NE | targets.sample_NE) & ((targets.ids_NE < 0) | (targets.ids_NE >= shard.total))
        if bool(strange_NE.any()):
            raise ValueError(
                f"the teacher's rows hold token id {int(targets.ids_NE[strange_NE][0])}, the student's vocabulary has "
                f"{shard.total} tokens; a store serves students with the teacher's own token ids only"
            )
        check_distinct(targets)
        temperature = self.temperature / self.target_logits_scale
        policy = resolve_tail(self.tail, self.divergence, draws=targets.draws, temperature=temperature)
        dtype = row_dtype(labels_N.device)
        teacher = prepare_teacher(targets, policy, temperature=temperature, labels_N=labels_N, dtype=dtype)
        return SparseRows(teacher, labels_N, self.divergence, mix)
