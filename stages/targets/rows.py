"""Logits become target rows: the one border where torch tensors turn into numpy arrays.

Data path: logits chunk -> **target rows** -> SequenceBatch -> store.

Axis legend: N rows, V tokens of the vocabulary, K head entries, M draws.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.targets.head import top_entries
from stages.targets.positions import Positions
from stages.targets.randomness import uniforms
from stages.targets.tail import draw, tail_blocks
from storage.errors import NumericsError, UsageError
from storage.plan import TargetSpec


@dataclass(frozen=True, kw_only=True)
class TargetRows:
    """Rows of one kind with a constant number of head entries K and draws M.

    Attributes:
        head_ids: uint32 [N, K], probability falling.
        logprob: float32 [N, K].
        drawn: uint32 [N, M], sampled tail ids with repetition, rising within a row; meaningless where tail_logit
            is -inf.
        tail_logit, logsumexp, entropy, next_logprob: float32 [N], as in `SequenceBatch`.
    """

    head_ids: NDArray[np.uint32]
    logprob: NDArray[np.float32]
    drawn: NDArray[np.uint32]
    tail_logit: NDArray[np.float32]
    logsumexp: NDArray[np.float32]
    entropy: NDArray[np.float32]
    next_logprob: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.entropy)

    def take(self, order_N: NDArray[np.int64]) -> TargetRows:
        """Return these rows in another order."""
        return TargetRows(**{item.name: getattr(self, item.name)[order_N] for item in fields(self)})

    @classmethod
    def empty(cls, target: TargetSpec) -> TargetRows:
        """Return no rows, in the right shapes."""
        scalars = {name: np.zeros(0, np.float32) for name in ("tail_logit", "logsumexp", "entropy", "next_logprob")}
        return cls(
            head_ids=np.zeros((0, target.k), np.uint32),
            logprob=np.zeros((0, target.k), np.float32),
            drawn=np.zeros((0, target.draws), np.uint32),
            **scalars,
        )

    @classmethod
    def concatenate(cls, blocks: list[TargetRows]) -> TargetRows:
        """Join rows in order."""
        return cls(
            **{item.name: np.concatenate([getattr(block, item.name) for block in blocks]) for item in fields(cls)}
        )


def topk_rows(logits_NV: Tensor, at: Positions, target: TargetSpec) -> TargetRows:
    """Return rows that hold the exact head only, from float32 logits, which are overwritten."""
    return _rows(logits_NV, at, target, draws=0)


def hybrid_rows(logits_NV: Tensor, at: Positions, target: TargetSpec) -> TargetRows:
    """Return rows that hold the exact head and `target.draws` samples of the tail. The logits are overwritten."""
    return _rows(logits_NV, at, target, draws=target.draws)


def _rows(logits_NV: Tensor, at: Positions, target: TargetSpec, *, draws: int) -> TargetRows:
    vocab_size = logits_NV.shape[1]
    if target.k > vocab_size:
        raise UsageError(
            f"k = {target.k} is more than the vocabulary of {vocab_size} tokens",
            where="target.k",
            fix=f"set target.k to at most {vocab_size}",
        )
    next_N1 = torch.from_numpy(at.next_token).to(logits_NV.device)[:, None]
    next_logit_N = logits_NV.gather(1, next_N1)[:, 0]
    logit_NK, ids_NK = top_entries(logits_NV, target.k)

    # Relative to the greatest logit. exp(-1000) is 0 in any precision, and 0 * -1000 is 0 where 0 * -inf is not.
    shifted_NV = logits_NV.sub_(logit_NK[:, :1]).clamp_(min=-1000.0)
    prob_NV = torch.softmax(shifted_NV, dim=-1)
    # The greatest probability is at least 1/V and equals exp(0 - logsumexp of the shifted logits).
    log_sum_N = -prob_NV.gather(1, ids_NK[:, :1])[:, 0].log()
    _refuse_nan(log_sum_N, at)
    logsumexp_N = logit_NK[:, 0] + log_sum_N
    # A plain sum: a batched dot product would round differently for different numbers of rows.
    entropy_N = log_sum_N - shifted_NV.mul_(prob_NV).sum(-1)

    head_mass_N = prob_NV.gather(1, ids_NK).cpu().double().sum(-1)
    tail_NGB, mass_NG = tail_blocks(prob_NV.scatter_(1, ids_NK, 0.0))
    # Masses below float32's range (1e-38) count as none: -inf, and no draws.
    tail_logit_N = mass_NG[:, -1].log() - head_mass_N.log()
    uniform_NM = torch.from_numpy(uniforms(target.seed, at.document, at.position, draws))
    drawn_NM = draw(tail_NGB, mass_NG, uniform_NM).sort(-1).values

    return TargetRows(
        head_ids=ids_NK.cpu().numpy().astype(np.uint32),
        logprob=_float32(logit_NK - logsumexp_N[:, None]),
        drawn=drawn_NM.numpy().astype(np.uint32),
        tail_logit=_float32(tail_logit_N),
        logsumexp=_float32(logsumexp_N),
        entropy=_float32(entropy_N),
        next_logprob=_float32(next_logit_N - logsumexp_N),
    )


def _refuse_nan(log_sum_N: Tensor, at: Positions) -> None:
    """A NaN or +inf anywhere in a row makes its sum NaN, and so does a row of -inf."""
    bad_N = ~torch.isfinite(log_sum_N)
    if bad_N.any():
        row = int(bad_N.nonzero()[0, 0])
        raise NumericsError(
            "the teacher's logits hold NaN or infinity",
            where=f"document {at.document[row]}, position {at.position[row]}",
            fix="try teacher.dtype: float32; if it persists, the weights themselves are broken",
        )


def _float32(values: Tensor) -> NDArray[np.float32]:
    return values.float().cpu().numpy()
