"""Logits become target rows: the one border where torch tensors turn into numpy arrays.

Data path: logits chunk -> **target rows** -> SequenceBatch -> store.

Axis legend: N rows, V tokens of the vocabulary, K candidates of the head, M draws, P temperatures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.targets.entries import draw, tail_blocks, top_entries, uniforms
from stages.targets.positions import Positions
from storage.errors import NumericsError, UsageError
from storage.plan import TargetSpec
from storage.rows import NUMBERS


@dataclass(frozen=True, kw_only=True)
class TargetRows:
    """Rows of one kind. Heads are padded to a common width K; the number of draws M is constant.

    Attributes:
        head_ids: uint32 [N, K], probability falling; meaningless from column head_size on.
        logprob: float32 [N, K], likewise.
        head_size: int32 [N], entries of each head.
        drawn: uint32 [N, M], sampled tail ids with repetition, rising within a row; meaningless where tail_logit
            is -inf.
        tail_logit, logsumexp, entropy, next_logprob: float32 [N], as in `SequenceBatch`.
        tail_logit_T, entropy_T: float32 [N, P], the same at each of the P temperatures of the plan.
    """

    head_ids: NDArray[np.uint32]
    logprob: NDArray[np.float32]
    head_size: NDArray[np.int32]
    drawn: NDArray[np.uint32]
    tail_logit: NDArray[np.float32]
    logsumexp: NDArray[np.float32]
    entropy: NDArray[np.float32]
    next_logprob: NDArray[np.float32]
    tail_logit_T: NDArray[np.float32]
    entropy_T: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.entropy)

    def take(self, order_N: NDArray[np.int64]) -> TargetRows:
        """Return these rows in another order."""
        return TargetRows(**{item.name: getattr(self, item.name)[order_N] for item in fields(self)})

    @classmethod
    def empty(cls, target: TargetSpec) -> TargetRows:
        """Return no rows, in the right shapes."""
        no_number, none_by_temperature = np.zeros(0, np.float32), np.zeros((0, len(target.temperatures)), np.float32)
        return cls(
            head_ids=np.zeros((0, target.k), np.uint32),
            logprob=np.zeros((0, target.k), np.float32),
            head_size=np.zeros(0, np.int32),
            drawn=np.zeros((0, target.draws), np.uint32),
            **{item.name: none_by_temperature if item.by_temperature else no_number for item in NUMBERS},
        )

    @classmethod
    def concatenate(cls, blocks: list[TargetRows]) -> TargetRows:
        """Join rows in order."""
        return cls(
            **{item.name: np.concatenate([getattr(block, item.name) for block in blocks]) for item in fields(cls)}
        )


def fixed_rows(logits_NV: Tensor, at: Positions, target: TargetSpec) -> TargetRows:
    """Return rows with heads of k entries, which may be none, and `draws` samples of what is outside of the head.

    Args:
        logits_NV: float32, overwritten.
        at: where the rows belong.
        target: what is kept.
    """
    return _rows(logits_NV, at, target, lambda prob_NK, outside_N: torch.full(prob_NK.shape[:1], target.k))


def mass_rows(logits_NV: Tensor, at: Positions, target: TargetSpec) -> TargetRows:
    """Return rows with the least number of most probable tokens that together have mass p: at least 1, at most k.

    Arguments as for `fixed_rows`.
    """
    assert target.p is not None, "the plan of this kind has p"
    mass = target.p

    def size(prob_NK: Tensor, outside_N: Tensor) -> Tensor:
        # Head against tail, each a sum of its own terms: near p = 1 a sum of the head alone is 1 but for rounding.
        head_NK = prob_NK.cumsum(-1)[:, :-1]
        tail_NK = outside_N[:, None] + prob_NK.flip(-1).cumsum(-1).flip(-1)[:, 1:]
        return 1 + (tail_NK * mass > head_NK * (1.0 - mass)).sum(-1)

    return _rows(logits_NV, at, target, size)


def require_k(k: int, vocab_size: int, *, key: str = "k") -> None:
    """Refuse heads longer than the vocabulary. Raises UsageError naming `key`."""
    if k > vocab_size:
        raise UsageError(
            f"k = {k} is more than the vocabulary of {vocab_size} tokens",
            where=key,
            fix=f"set {key} to at most {vocab_size}",
        )


def _rows(
    logits_NV: Tensor, at: Positions, target: TargetSpec, head_size: Callable[[Tensor, Tensor], Tensor]
) -> TargetRows:
    """Return rows with heads of the sizes int64 [N] that `head_size` gives.

    It is given the k greatest probabilities of each row, [N, K], and the sum of all others, [N], both float64.
    """
    vocab_size = logits_NV.shape[1]
    require_k(target.k, vocab_size)
    next_N1 = torch.from_numpy(at.next_token).to(logits_NV.device)[:, None]
    next_logit_N = logits_NV.gather(1, next_N1)[:, 0]
    logit_NK, ids_NK = top_entries(logits_NV, max(target.k, 1))

    # Relative to the greatest logit. exp(-1000) is 0 in any precision, and 0 * -1000 is 0 where 0 * -inf is not.
    shifted_NV = logits_NV.sub_(logit_NK[:, :1]).clamp_(min=-1000.0 * max((1.0, *target.temperatures)))
    prob_NV = torch.softmax(shifted_NV, dim=-1)
    # The greatest probability is at least 1/V and equals exp(0 - logsumexp of the shifted logits).
    log_sum_N = -prob_NV.gather(1, ids_NK[:, :1])[:, 0].log()
    _refuse_nan(log_sum_N, at)
    logsumexp_N = logit_NK[:, 0] + log_sum_N

    logit_NK, ids_NK = logit_NK[:, : target.k], ids_NK[:, : target.k]
    at_T = [_at_temperature(shifted_NV, t, ids_NK) for t in target.temperatures]
    # A plain sum: a batched dot product would round differently for different numbers of rows.
    entropy_N = log_sum_N - shifted_NV.mul_(prob_NV).sum(-1)
    prob_NK = prob_NV.gather(1, ids_NK).cpu().double()
    tail_NGB, mass_NG = tail_blocks(prob_NV.scatter_(1, ids_NK, 0.0))
    size_N = head_size(prob_NK, mass_NG[:, -1])
    head_NK = torch.arange(target.k) < size_N[:, None]
    uniform_NM = torch.from_numpy(uniforms(target.seed, at.document, at.position, target.draws))
    drawn_NM = draw(tail_NGB, mass_NG, uniform_NM).sort(-1).values

    return TargetRows(
        head_ids=ids_NK.cpu().numpy().astype(np.uint32),
        logprob=_float32(logit_NK - logsumexp_N[:, None]),
        head_size=size_N.numpy().astype(np.int32),
        drawn=drawn_NM.numpy().astype(np.uint32),
        tail_logit=_float32(_tail_logit(prob_NK, mass_NG[:, -1], head_NK)),
        logsumexp=_float32(logsumexp_N),
        entropy=_float32(entropy_N),
        next_logprob=_float32(next_logit_N - logsumexp_N),
        tail_logit_T=_columns([_tail_logit(weight_NK, rest_N, head_NK) for weight_NK, rest_N, _ in at_T], len(at)),
        entropy_T=_columns([entropy_N for *_, entropy_N in at_T], len(at)),
    )


def _at_temperature(shifted_NV: Tensor, temperature: float, ids_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of softmax(shifted / T) the values at `ids_NK`, the sum of all others [N], and the entropy [N].

    Args:
        shifted_NV: logits relative to the greatest of the row.
        temperature: T.
        ids_NK: the candidates of the head, falling.
    """
    weight_NV = torch.softmax(shifted_NV / temperature, dim=-1)
    weight_NK = weight_NV.gather(1, ids_NK)
    log_sum_N = -weight_NK[:, 0].log()
    entropy_N = log_sum_N - (weight_NV * shifted_NV).sum(-1) / temperature
    return weight_NK.cpu(), weight_NV.scatter_(1, ids_NK, 0.0).sum(-1).cpu(), entropy_N


def _tail_logit(prob_NK: Tensor, outside_N: Tensor, head_NK: Tensor) -> Tensor:
    """Return log(r / (1 - r)) [N] of the mass r outside of the head, each sum over its own terms.

    Masses below float32's range (1e-38) count as none: -inf, and no draws.

    Args:
        prob_NK: probabilities of the candidates.
        outside_N: the sum of all others.
        head_NK: which candidates are in the head.
    """
    tail_N = outside_N + prob_NK.masked_fill(head_NK, 0.0).sum(-1)
    return tail_N.log() - prob_NK.masked_fill(~head_NK, 0.0).sum(-1).log()


def _refuse_nan(log_sum_N: Tensor, at: Positions) -> None:
    """Refuse rows whose sum is NaN: a NaN or +inf anywhere makes it so, and so does a row of -inf."""
    bad_N = ~torch.isfinite(log_sum_N)
    if bad_N.any():
        row = int(bad_N.nonzero()[0, 0])
        raise NumericsError(
            "the teacher's logits hold NaN or infinity",
            where=f"document {at.document[row]}, position {at.position[row]}",
            fix="try dtype: float32; if it persists, the weights themselves are broken",
        )


def _float32(values: Tensor) -> NDArray[np.float32]:
    return values.float().cpu().numpy()


def _columns(values: list[Tensor], rows: int) -> NDArray[np.float32]:
    """Return one column per tensor [N]: float32 [N, P]."""
    return np.stack([_float32(value_N) for value_N in values], axis=1) if values else np.zeros((rows, 0), np.float32)
