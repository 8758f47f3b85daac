"""The fused linear losses: hidden states and head weight in, loss out, one pass over the logits of each chunk.

Shape suffixes: N rows (tokens), D hidden width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from stages.losses.divergences import Divergence, make_divergence
from stages.losses.engine.call import LossCall, LossParts, eager, row_total
from stages.losses.engine.linear import FusedLinear
from stages.losses.engine.objective import Objective, Teacher
from stages.losses.engine.placement import by_vocabulary, is_placed, local_part, placed, replicated, vocab_group
from stages.losses.engine.rows import valid_rows
from stages.losses.engine.settings import Loss, Settings
from stages.losses.engine.vocab import VocabShard
from stages.losses.targets import SparseTargets

_DEFAULT_RATIO = 0.5


class FusedLinearKDLoss(Loss):
    """Divergence and cross-entropy from hidden states, without ever holding [N, V].

    loss = kd_ratio * KD + (1 - kd_ratio) * CE, or kd_loss_weight * KD + sft_loss_weight * CE. Both parts are sums over
    valid rows divided by `num_batch_labels`. Cross-entropy looks at the model's own logits; temperature and logits
    scales belong to the divergence alone.

    Under tensor parallelism the head is sharded over the vocabulary: a DTensor says so itself, a plain local shard
    needs `tp_group`. Every process of the group gets the whole loss and the whole gradient of hidden.

    Args:
        ignore_index: rows with this label take no part in either loss.
        temperature: T of both distributions; the divergence is multiplied by T^2. Stored rows answer for the
            temperatures that their plan names.
        chunk_size: rows of logits held at once, over all buffers of the student. The logits of a TeacherHead are as
            many rows again.
        divergence: a name of DIVERGENCES, with its parameter if wanted ("jsd(0.9)"), or a Divergence.
        tail: a key of TAIL_POLICIES, for sparse rows; None takes `sampled` for the forward KL at T=1 on rows with
            samples, else `bucket`.
        logits_scale: factor on the student's logits in the divergence; larger is sharper.
        target_logits_scale: factor on the teacher's logits; on stored rows s needs T = 1/s in the plan.
        kd_ratio: share of the divergence; 0 reads no targets, 1 forms no cross-entropy gradient.
        kd_coef: OpenRLHF's name for kd_ratio.
        kd_loss_weight: NeMo-Aligner's weight of the divergence, instead of kd_ratio; 1 where only the other is given.
        sft_loss_weight: NeMo-Aligner's weight of the cross-entropy; 0 where only the other is given.
        softcap: the model's own cap on logits, softcap * tanh(logits / softcap).
        logit_multiplier: the model's own factor on logits, before the cap.
        vocab_size: real tokens; head rows beyond are padding and take no part in either loss.
        tp_group: processes over which a plain head is sharded.
        check: raise FloatingPointError for a row whose loss is not finite (one synchronisation per chunk).
        reduction: "mean" or "sum" over valid rows, where the call gives no num_batch_labels; "none" keeps a loss per
            row, and backward goes through the head once more.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        chunk_size: int = 256,
        *,
        divergence: str | Divergence = "forward_kl",
        tail: str | None = None,
        logits_scale: float = 1.0,
        target_logits_scale: float = 1.0,
        kd_ratio: float = _DEFAULT_RATIO,
        kd_coef: float | None = None,
        kd_loss_weight: float | None = None,
        sft_loss_weight: float | None = None,
        softcap: float | None = None,
        logit_multiplier: float = 1.0,
        vocab_size: int | None = None,
        tp_group: dist.ProcessGroup | None = None,
        check: bool = False,
        reduction: str = "mean",
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}, expected at least 1 row")
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
            tp_group=tp_group,
            chunk_size=chunk_size,
            vocab_size=vocab_size,
            check=check,
            softcap=softcap,
            logit_multiplier=logit_multiplier,
        )
        super().__init__(objective, settings)
        self._weights = _fixed_weights(kd_loss_weight, sft_loss_weight)
        self._ratio = _one_ratio(kd_ratio, kd_coef, weights=self._weights)

    @property
    def kd_ratio(self) -> float | None:
        """Share of the divergence; None where both parts have fixed weights."""
        return self._ratio if self._weights is None else None

    @property
    def kd_loss_weight(self) -> float | None:
        """Fixed weight of the divergence; None where kd_ratio says it."""
        return None if self._weights is None else self._weights[0]

    @property
    def sft_loss_weight(self) -> float | None:
        """Fixed weight of the cross-entropy; None where kd_ratio says it."""
        return None if self._weights is None else self._weights[1]

    @eager
    def forward(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets: Teacher | None,
        labels_N: Tensor,
        num_batch_labels: float | Tensor | None = None,
        *,
        bias_V: Tensor | None = None,
        kd_ratio: float | None = None,
    ) -> LossParts:
        """Compute the loss of one batch.

        Args:
            hidden_ND: [N, D] last hidden states; their precision is that of the matrix products. A DTensor is gathered.
            weight_VD: [V, D] output head; cast once to that precision, its gradient has its own.
            targets: N sparse rows, a TeacherHead, or dense teacher logits [N, V]; may be None when kd_ratio is 0.
            labels_N: [N] the next token of each row.
            num_batch_labels: valid labels of the whole global batch; None leaves it to `reduction`.
            bias_V: [V] bias of the head, cut as the head is.
            kd_ratio: overrides the constructor's, for schedules.

        Returns:
            loss (differentiable), kd and ce (detached), each divided by num_batch_labels; scalars, or [N] where
            reduction is "none", with 0 at ignored rows.

        Raises:
            ValueError: shapes, labels, vocabularies or rows that do not fit.
        """
        _check_shapes(hidden_ND, weight_VD, targets=targets, labels_N=labels_N)
        device, settings = hidden_ND.device.type, self.settings
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        weight_VD = by_vocabulary(weight_VD, 0, "the head")
        group = vocab_group(weight_VD, 0) if is_placed(weight_VD) else settings.tp_group
        whole_ND = replicated(hidden_ND).to(dtype)
        local_VD, local_V = local_part(weight_VD), _local_bias(bias_V, weight_VD)
        with torch.autocast(device, enabled=False):
            labels_N = replicated(labels_N)
            shard = VocabShard.of(len(local_VD), labels_N, group=group, vocab_size=settings.vocab_size)
            lead = labels_N.shape if settings.per_row else None
            keep_N, labels_N = valid_rows(labels_N, ignore_index=settings.ignore_index, vocab_size=shard.total)
            mix = self.objective.mix(*self.mixing_weights(kd_ratio))
            call = LossCall(
                kernel=self.objective.kernel(targets, labels_N, keep_N=keep_N, shard=shard, mix=mix),
                keep_N=keep_N,
                rows=len(labels_N),
                total=row_total(settings.total(num_batch_labels), len(labels_N)),
                chunk_size=settings.chunk_size,
                shard=shard,
                check=settings.check,
                gradient=torch.is_grad_enabled(),
                late=dtype == torch.float16,
                lead=lead,
            )
            arguments = (whole_ND, local_VD, local_V, call, settings.logit_multiplier, settings.softcap)
            return LossParts(*FusedLinear.apply(*arguments))  # type: ignore[no-untyped-call]  # torch has no types for it

    def mixing_weights(self, kd_ratio: float | None) -> tuple[float, float]:
        """Return the weights of the divergence and of the cross-entropy."""
        if self._weights is not None:
            if kd_ratio is not None:
                raise ValueError(f"kd_ratio={kd_ratio} in the call, but this loss was built with two fixed weights")
            return self._weights
        ratio = self._ratio if kd_ratio is None else kd_ratio
        _check_ratio("kd_ratio", ratio)
        return ratio, 1.0 - ratio


class FusedLinearCrossEntropy(Loss):
    """Cross-entropy from hidden states without ever holding [N, V].

    Args:
        ignore_index: rows with this label take no part.
        logit_softcapping: the model's own cap on logits; 0: no cap.
        reduction: "sum" or "mean" over valid rows, where the call gives no num_label_tokens; "none" keeps a loss per
            row.
        chunk_size: rows of logits held at once.
        vocab_size: real tokens, where the head is padded.
        tp_group: processes over which a plain head is sharded.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        logit_softcapping: float = 0.0,
        reduction: str = "sum",
        *,
        chunk_size: int = 256,
        vocab_size: int | None = None,
        tp_group: dist.ProcessGroup | None = None,
    ) -> None:
        fused = FusedLinearKDLoss(
            ignore_index,
            chunk_size=chunk_size,
            kd_ratio=0.0,
            softcap=logit_softcapping or None,
            vocab_size=vocab_size,
            tp_group=tp_group,
            reduction=reduction,
        )
        super().__init__(fused.objective, fused.settings)
        self.fused = fused

    @property
    def logit_softcapping(self) -> float:
        """The model's own cap on logits; 0: no cap."""
        return self.softcap or 0.0

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        lm_weight: Tensor,
        num_label_tokens: float | Tensor | None = None,
        *,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return cross-entropy: a scalar, or [*] where reduction is "none".

        Args:
            hidden_states: [*, D] last hidden states.
            labels: [*] the next token of each position.
            lm_weight: [V, D] output head.
            num_label_tokens: what losses are divided by; None leaves it to `reduction`.
            bias: [V] bias of the head, cut as the head is.
        """
        labels, hidden = replicated(labels), replicated(hidden_states)
        hidden_ND = hidden.reshape(-1, hidden.shape[-1])
        parts: LossParts = self.fused(hidden_ND, lm_weight, None, labels.reshape(-1), num_label_tokens, bias_V=bias)
        return parts.loss.view(labels.shape) if self.settings.per_row else parts.loss


def _check_shapes(hidden_ND: Tensor, weight_VD: Tensor, *, targets: Teacher | None, labels_N: Tensor) -> None:
    rows = {"labels_N": labels_N.shape, "hidden_ND": hidden_ND.shape[:1]}
    if isinstance(targets, Tensor):
        rows["targets"] = targets.shape[:1]
    elif targets is not None:
        rows["targets"] = (targets.ids_NE if isinstance(targets, SparseTargets) else targets.hidden_ND).shape[:1]
    if hidden_ND.ndim != 2 or len(set(rows.values())) != 1:
        found = ", ".join(f"{name} {tuple(shape)}" for name, shape in rows.items())
        raise ValueError(f"rows do not fit: {found} (hidden is {tuple(hidden_ND.shape)}); flatten batches to [N, D]")
    if weight_VD.ndim != 2 or weight_VD.shape[1] != hidden_ND.shape[1]:
        raise ValueError(f"weight {tuple(weight_VD.shape)} does not fit hidden {tuple(hidden_ND.shape)}")


def _local_bias(bias_V: Tensor | None, weight_VD: Tensor) -> Tensor | None:
    """Return the part of the bias that belongs to the head's part here. Raises ValueError for another part."""
    if bias_V is None:
        return None
    local_V, columns = local_part(by_vocabulary(bias_V, 0, "the bias")), len(local_part(weight_VD))
    if local_V.shape != (columns,):
        raise ValueError(
            f"the bias is {placed(bias_V)} with shape {tuple(local_V.shape)} here, the head is {placed(weight_VD)} "
            f"with {columns} tokens here; cut the bias as the head is cut"
        )
    return local_V


def _one_ratio(kd_ratio: float, kd_coef: float | None, *, weights: tuple[float, float] | None) -> float:
    """Return kd_ratio, given under either name. Two settings of one thing are refused, not quietly ignored."""
    given = {} if kd_ratio == _DEFAULT_RATIO else {"kd_ratio": kd_ratio}
    if kd_coef is not None:
        given["kd_coef"] = kd_coef
    if weights is not None:
        given["kd_loss_weight and sft_loss_weight"] = weights[0]
    if len(given) > 1:
        raise ValueError(f"{', '.join(given)} all say how the losses are mixed; give one of them")
    name, ratio = ("kd_ratio", kd_ratio) if kd_coef is None else ("kd_coef", kd_coef)
    _check_ratio(name, ratio)
    return ratio


def _check_ratio(name: str, ratio: float) -> None:
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"{name} is {ratio}, allowed is 0 to 1")


def _fixed_weights(kd: float | None, sft: float | None) -> tuple[float, float] | None:
    if kd is None and sft is None:
        return None
    kd, sft = 1.0 if kd is None else kd, 0.0 if sft is None else sft
    if not (kd >= 0.0 and sft >= 0.0 and 0.0 < kd + sft < math.inf):
        raise ValueError(f"kd_loss_weight is {kd}, sft_loss_weight is {sft}; expected finite numbers >= 0, not both 0")
    return kd, sft
