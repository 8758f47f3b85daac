"""The fused linear losses: hidden states and head weight in, loss out, one pass over the logits of each chunk.

Shape suffixes: N rows (tokens), D hidden width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stages.losses.cross_entropy import check_reduction, total_of
from stages.losses.divergences import Divergence, make_divergence
from stages.losses.engine.call import LossCall, LossParts, eager, row_total
from stages.losses.engine.head import check_rule
from stages.losses.engine.linear import FusedLinear
from stages.losses.engine.objective import Objective, Teacher
from stages.losses.engine.rows import valid_rows
from stages.losses.engine.vocab import VocabShard, check_vocab_size, local_part, replicated, vocab_group
from stages.losses.targets import SparseTargets

_DEFAULT_RATIO = 0.5


class FusedLinearKDLoss(nn.Module):
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
    ) -> None:
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}, expected at least 1 row")
        check_rule(softcap=softcap, logit_multiplier=logit_multiplier)
        check_vocab_size(vocab_size)
        self.objective = Objective(
            divergence=make_divergence(divergence),
            tail=tail,
            temperature=temperature,
            logits_scale=logits_scale,
            target_logits_scale=target_logits_scale,
        )
        self.weights = _fixed_weights(kd_loss_weight, sft_loss_weight)
        self.kd_ratio = _one_ratio(kd_ratio, kd_coef, weights=self.weights)
        self.ignore_index, self.chunk_size, self.check = ignore_index, chunk_size, check
        self.softcap, self.logit_multiplier = softcap, logit_multiplier
        self.vocab_size, self.tp_group = vocab_size, tp_group

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
            hidden_ND: [N, D] last hidden states; their precision is that of the matrix products.
            weight_VD: [V, D] output head; cast once to that precision, its gradient has its own.
            targets: N sparse rows, a TeacherHead, or dense teacher logits [N, V]; may be None when kd_ratio is 0.
            labels_N: [N] the next token of each row.
            num_batch_labels: valid labels of the whole global batch; None takes those of this call.
            bias_V: [V] bias of the head.
            kd_ratio: overrides the constructor's, for schedules.

        Returns:
            loss (differentiable), kd and ce (detached), each divided by num_batch_labels.

        Raises:
            ValueError: shapes, labels, vocabularies or rows that do not fit.
        """
        _check_shapes(hidden_ND, weight_VD, targets=targets, labels_N=labels_N)
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        group = vocab_group(weight_VD, 0) or self.tp_group
        whole_ND = replicated(hidden_ND).to(dtype)
        local_VD, local_V = local_part(weight_VD), None if bias_V is None else local_part(bias_V)
        with torch.autocast(device, enabled=False):
            labels_N = local_part(labels_N)
            shard = VocabShard.of(len(local_VD), labels_N, group=group, vocab_size=self.vocab_size)
            keep_N, labels_N = valid_rows(labels_N, ignore_index=self.ignore_index, vocab_size=shard.total)
            mix = self.objective.mix(*self.mixing_weights(kd_ratio))
            call = LossCall(
                kernel=self.objective.kernel(targets, labels_N, keep_N=keep_N, shard=shard, mix=mix),
                keep_N=keep_N,
                rows=len(labels_N),
                total=row_total(num_batch_labels, len(labels_N)),
                chunk_size=self.chunk_size,
                shard=shard,
                check=self.check,
                gradient=torch.is_grad_enabled(),
                late=dtype == torch.float16,
            )
            arguments = (whole_ND, local_VD, local_V, call, self.logit_multiplier, self.softcap)
            return LossParts(*FusedLinear.apply(*arguments))  # type: ignore[no-untyped-call]  # torch has no types for it

    def mixing_weights(self, kd_ratio: float | None) -> tuple[float, float]:
        """Return the weights of the divergence and of the cross-entropy."""
        if self.weights is not None:
            if kd_ratio is not None:
                raise ValueError(f"kd_ratio={kd_ratio} in the call, but this loss was built with two fixed weights")
            return self.weights
        ratio = self.kd_ratio if kd_ratio is None else kd_ratio
        _check_ratio("kd_ratio", ratio)
        return ratio, 1.0 - ratio


class FusedLinearCrossEntropy(nn.Module):
    """Cross-entropy from hidden states without ever holding [N, V].

    Args:
        ignore_index: rows with this label take no part.
        logit_softcapping: the model's own cap on logits; 0: no cap.
        reduction: "sum" or "mean" over valid rows, where the call gives no num_label_tokens.
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
        super().__init__()
        self.reduction = check_reduction(reduction)
        self.fused = FusedLinearKDLoss(
            ignore_index,
            chunk_size=chunk_size,
            kd_ratio=0.0,
            softcap=logit_softcapping or None,
            vocab_size=vocab_size,
            tp_group=tp_group,
        )

    @property
    def ignore_index(self) -> int:
        """Positions with this label take no part. Read-only."""
        return self.fused.ignore_index

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        lm_weight: Tensor,
        num_label_tokens: float | Tensor | None = None,
        *,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return cross-entropy, a scalar.

        Args:
            hidden_states: [*, D] last hidden states.
            labels: [*] the next token of each position.
            lm_weight: [V, D] output head.
            num_label_tokens: what the sum is divided by; None leaves it to `reduction`.
            bias: [V] bias of the head.
        """
        total = total_of(self.reduction, num_label_tokens)
        hidden_ND = hidden_states.reshape(-1, hidden_states.shape[-1])
        parts: LossParts = self.fused(hidden_ND, lm_weight, None, labels.reshape(-1), total, bias_V=bias)
        return parts.loss


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
