"""KDLoss: a divergence between student logits that exist already and a teacher.

A superset of the KDLoss of NeMo-AutoModel and OpenRLHF: their fields come first, with the same names and defaults.

Shape suffixes: V vocabulary; a leading star is any shape.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from stages.losses.divergences import Divergence, make_divergence
from stages.losses.engine.call import eager
from stages.losses.engine.logits import logit_loss
from stages.losses.engine.objective import Objective
from stages.losses.engine.settings import Loss, Settings
from stages.losses.targets import SparseTargets


class KDLoss(Loss):
    """Divergence between teacher and student over valid rows.

    Args:
        ignore_index: rows with this label take no part.
        temperature: T of both distributions; value and gradient are multiplied by T^2 (Hinton et al. 2015).
        fp32_upcast: compute in float32; False keeps chunks in the logits' precision (row sums are float32 anyway).
        tp_group: processes over which plain logits are sharded by vocabulary; a DTensor says so itself.
        chunk_size: rows computed at once; 0 chooses about 16 MiB. Whatever it is, nothing of size [tokens, vocab] is
            kept beside the logits' own gradient.
        divergence: a name of DIVERGENCES, with its parameter if wanted ("jsd(0.9)"), or a Divergence.
        tail: a key of TAIL_POLICIES, for sparse rows; None takes `sampled` for the forward KL at T=1 on rows with
            samples, else `bucket`.
        logits_scale: factor on the student's logits; larger is sharper.
        target_logits_scale: factor on the teacher's logits.
        vocab_size: real tokens; columns beyond are padding on both sides.
        check: raise FloatingPointError for a row whose loss is not finite (one synchronisation per chunk).
        reduction: "mean" or "sum" over valid rows, where the call gives no num_batch_labels; "none" keeps a loss per
            row.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: dist.ProcessGroup | None = None,
        chunk_size: int = 0,
        *,
        divergence: str | Divergence = "forward_kl",
        tail: str | None = None,
        logits_scale: float = 1.0,
        target_logits_scale: float = 1.0,
        vocab_size: int | None = None,
        check: bool = False,
        reduction: str = "mean",
    ) -> None:
        objective = Objective(
            divergence=make_divergence(divergence),
            tail=tail,
            temperature=temperature,
            logits_scale=logits_scale,
            target_logits_scale=target_logits_scale,
        )
        settings = Settings(
            ignore_index=ignore_index,
            reduction=reduction,
            fp32_upcast=fp32_upcast,
            tp_group=tp_group,
            chunk_size=chunk_size,
            vocab_size=vocab_size,
            check=check,
        )
        super().__init__(objective, settings)

    @eager
    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | SparseTargets,
        labels: Tensor,
        num_batch_labels: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss: a scalar, or [*] per row, where reduction is "none", with 0 at ignored rows.

        Args:
            student_logits: [*, V]; under tensor parallelism [*, V/tp] or a DTensor.
            teacher_logits: of the same shape, without gradient; or sparse rows, one per position of the leading
                shape in its order.
            labels: [*], already the next token of each position; ignore_index is excluded.
            num_batch_labels: valid labels over the accumulation window and all data-parallel processes: the loss is
                sum / num_batch_labels, and so is each row's; None leaves it to `reduction`.

        Raises:
            TypeError: a teacher that is neither logits nor sparse rows.
            ValueError: shapes, labels, vocabularies or rows that do not fit.
        """
        if not isinstance(teacher_logits, Tensor | SparseTargets):
            raise TypeError(
                f"teacher_logits is a {type(teacher_logits).__name__}, expected a tensor or SparseTargets; "
                "a TeacherHead goes with FusedLinearKDLoss"
            )
        return logit_loss(
            student_logits,
            teacher_logits,
            labels,
            objective=self.objective,
            weights=(1.0, 0.0),
            settings=self.settings,
            num_batch_labels=num_batch_labels,
        )
