"""One optimizer step, and one validation: the arithmetic between batches and weights.

Data path: step of micro-batches -> **loss, gradients, weights** -> numbers for the metrics. Losses are sums over target
rows divided by the rows of the whole step, so that the size of the micro-batches changes nothing but memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.batches.microbatch import MicroBatch
from stages.batches.steps import Step
from stages.input_files import unchanged
from stages.losses import FusedLinearKDLoss, LossParts, SparseTargets, TeacherHead
from stages.parallel.tensors import clip_gradients, is_finite
from stages.student.model import Student
from stages.teacher.live import LiveTeacher
from stages.training.optimizer import set_learning_rate
from storage.errors import NumericsError
from storage.faults import fault_point


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Means per target row, in nats (a tempered divergence times its T^2). None: this part was not computed."""

    loss: float
    kd: float | None
    ce: float | None


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What is minimised: (1 - kd_ratio) * cross-entropy + kd_ratio * divergence, in one pass over the head.

    Attributes:
        student, loss: the model that learns, and the fused loss over its head.
        kd_ratio: share of the divergence; 0 reads no targets, 1 computes no cross-entropy.
        teacher: of an online run; None: the teacher's rows come with the micro-batches, or kd_ratio is 0.
    """

    student: Student
    loss: FusedLinearKDLoss
    kd_ratio: float
    teacher: LiveTeacher | None = None

    @property
    def length_borders(self) -> tuple[int, ...]:
        """Lengths, rising, whose two sides never share a micro-batch: those of the student and of the live teacher."""
        of_teacher = () if self.teacher is None else self.teacher.length_borders
        return tuple(sorted({*self.student.length_borders, *of_teacher}))

    def parts(self, batch: MicroBatch, rows: int) -> LossParts:
        """Compute the losses of one micro-batch, summed over its rows and divided by `rows`.

        Raises:
            NumericsError: the loss checks its rows, and one is not finite.
        """
        batch = batch.to(self.student.device)
        try:
            parts: LossParts = self.loss(
                self.student.hidden(batch),
                self.student.weight_VD,
                self.targets(batch),
                batch.labels_N,
                rows,
                bias_V=self.student.bias_V,
                kd_ratio=self.kd_ratio,
            )
        except FloatingPointError as error:
            raise _numerics(f"the loss of a row is not finite: {error}", "loss") from error
        return parts

    def targets(self, batch: MicroBatch) -> SparseTargets | TeacherHead | None:
        """Return what the student is compared with: stored rows, or what the live teacher makes of the same tokens."""
        return batch.targets if self.teacher is None else self.teacher.rows(batch)

    def watched(self) -> AbstractContextManager[None]:
        """Check before and after the block that the files of a live teacher, whose weights may be mapped, are the same.

        Raises:
            IdentityError, StorageUnavailableError: one was changed, or is gone.
        """
        return unchanged(*(() if self.teacher is None else self.teacher.files))

    def losses(self, sums: Tensor) -> Losses:
        """Name the sums [loss, kd, ce] over micro-batches."""
        loss, kd, ce = sums.tolist()
        return Losses(loss=loss, kd=None if self.kd_ratio == 0.0 else kd, ce=None if self.kd_ratio == 1.0 else ce)


def optimizer_step(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    step: Step,
    *,
    lr: float,
    clip_norm: float | None,
    number: int,
    riders: Tensor | None = None,
) -> tuple[Losses, float]:
    """Accumulate the gradient over the step's micro-batches, clip it, and move the weights.

    Args:
        optimizer: over the student's parameters; its gradients must be empty, and are empty afterwards.
        lr: learning rate of this step.
        clip_norm: largest norm of the gradient; None: no clipping.
        number: of the step, counted from 1; for messages.
        riders: float32 [N] on the student's device, what this process has to tell the others: summed in place over
            all of them, in the reduction that the norm needs anyway.

    Returns:
        The losses, and the norm of the gradient before clipping.

    Raises:
        NumericsError: loss or gradient is not finite.
        IdentityError, StorageUnavailableError: a file of the live teacher was changed, or is gone.
        The weights have not moved.
    """
    sums = torch.zeros(3, device=learner.student.device)
    with learner.watched():
        for batch in step.batches:
            parts = learner.parts(batch, step.rows)
            parts.loss.backward()  # type: ignore[no-untyped-call]
            sums += torch.stack(parts).detach()
    losses = learner.losses(sums)
    _require_finite("loss", losses.loss, number)
    parameters = [parameter for parameter in learner.student.model.parameters() if parameter.requires_grad]
    norm = clip_gradients(parameters, math.inf if clip_norm is None else clip_norm, riders)
    _require_finite("norm of the gradient", norm, number)
    set_learning_rate(optimizer, lr)
    fault_point("optimizer-step")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses, norm


@torch.no_grad()
def validate(learner: Learner, batches: Sequence[MicroBatch], *, number: int) -> Losses:
    """Compute the same losses over held-out micro-batches, without dropout and without moving anything.

    Args:
        number: of the last step done; for messages.

    Raises:
        NumericsError: the loss is not finite.
        IdentityError, StorageUnavailableError: as `optimizer_step`.
    """
    model = learner.student.model
    rows = sum(batch.rows for batch in batches)
    model.train(mode=False)
    sums = torch.zeros(3, device=learner.student.device)
    with learner.watched():
        for batch in batches:
            sums += torch.stack(learner.parts(batch, rows))
    model.train()
    losses = learner.losses(sums)
    if not math.isfinite(losses.loss):
        raise _numerics(f"the held-out loss is {losses.loss} after step {number}", f"step {number}")
    return losses


@torch.no_grad()
def require_finite_weights(model: nn.Module, number: int) -> None:
    """Check the weights before they are saved: a step may move them out of range although its gradient was finite.

    Raises:
        NumericsError: a weight is NaN or infinite after step `number`.
    """
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            what = f"{name} has a weight that is NaN or infinite after step {number}; it is not saved"
            raise _numerics(what, f"step {number}")


def _require_finite(name: str, value: float, number: int) -> None:
    if not math.isfinite(value):
        raise _numerics(f"the {name} is {value} at step {number}; the weights have not moved", f"step {number}")


def _numerics(what: str, where: str) -> NumericsError:
    return NumericsError(
        what,
        where=where,
        fix="lower the learning rate, warm up longer, or set dtype: float32: in a new run directory if this one "
        "has a checkpoint, which belongs to the settings it was made with",
    )
