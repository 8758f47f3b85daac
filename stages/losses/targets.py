"""Sparse teacher rows as torch tensors: what stages/batches hands to a loss.

A row is the teacher's distribution over one next token: an exact head in falling order, then distinct tail samples with
their draw counts, then padding. The tensors are rectangular, because rows of one store have nearly constant size.

Shape suffixes: N rows, E entry slots per row, M flat entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = Tensor | npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseTargets:
    """Teacher rows, padded to a rectangle.

    Padding: a slot that is neither head (column < head_size) nor a sample (count > 0) is padding. Losses find slots by
    those two facts alone and send every other slot to a scratch cell outside the logits, so the id in a padding slot
    (0 as built here) can never be read or written, whatever it is.

    The ids of a row's head and samples are distinct: a loss writes one number per id. `from_ragged` merges samples that
    were drawn twice; rows that hold an id twice are refused by the losses.

    Attributes:
        ids_NE: int64 token ids; head first, in falling order of probability, then distinct tail samples.
        logprob_NE: float32 teacher log-probability at T=1 of head entries, renormalised so that sum exp = 1 - r;
            -inf elsewhere.
        head_size_N: int64 number of head entries.
        count_NE: int32 number of draws of each tail sample; 0 on head and padding.
        draws: tail draws per row, M in p_hat(v) = r * count(v) / M; 0 when the rows hold no samples.
        tail_logit_N: float32 log(r / (1 - r)) with r the teacher's mass outside the head; +-inf are legal.
        entropy_N: teacher entropy at T=1 in nats. Needed for the value of the sampled forward KL, not for gradients.
        next_logprob_N: teacher log-probability of the token that follows; no loss reads it.
        sample_logprob_NE: teacher log-probability at T=1 of the tail samples, -inf elsewhere; needed for sampled
            targets at T != 1.
        tail_logit_by_temperature: T -> tail_logit_N at that temperature.
        entropy_by_temperature: T -> entropy_N at that temperature.
    """

    ids_NE: Tensor
    logprob_NE: Tensor
    head_size_N: Tensor
    count_NE: Tensor
    draws: int
    tail_logit_N: Tensor
    entropy_N: Tensor | None = None
    next_logprob_N: Tensor | None = None
    sample_logprob_NE: Tensor | None = None
    tail_logit_by_temperature: Mapping[float, Tensor] = field(default_factory=dict)
    entropy_by_temperature: Mapping[float, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.ids_NE.shape[0]
        by_temperature = [*self.tail_logit_by_temperature.items(), *self.entropy_by_temperature.items()]
        for name, value in [
            *_columns(self).items(),
            *((f"by temperature, T={t:g}", v) for t, v in by_temperature),
        ]:
            wanted = self.ids_NE.shape if name.endswith("_NE") else (rows,)
            if tuple(value.shape) != tuple(wanted):
                raise ValueError(
                    f"SparseTargets.{name} has shape {tuple(value.shape)}, expected {tuple(wanted)} "
                    f"(ids_NE has shape {tuple(self.ids_NE.shape)})"
                )
        if self.draws < 0:
            raise ValueError(f"SparseTargets.draws is {self.draws}; it counts draws per row and cannot be negative")

    def __len__(self) -> int:
        return self.ids_NE.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the rows live."""
        return self.ids_NE.device

    @property
    def head_NE(self) -> Tensor:
        """Mask of head slots, bool [N, E]."""
        columns_E = torch.arange(self.ids_NE.shape[1], device=self.device)
        return columns_E < self.head_size_N.unsqueeze(1)

    @property
    def sample_NE(self) -> Tensor:
        """Mask of tail-sample slots, bool [N, E]."""
        return self.count_NE > 0

    def rows(self, index: slice | Tensor) -> SparseTargets:
        """Return the selected rows: a slice gives views, an int64 or bool tensor copies."""
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str) -> SparseTargets:
        """Return the same rows on another device."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> SparseTargets:
        changed: dict[str, Any] = {name: change(value) for name, value in _columns(self).items()}
        return replace(
            self,
            **changed,
            tail_logit_by_temperature={t: change(v) for t, v in self.tail_logit_by_temperature.items()},
            entropy_by_temperature={t: change(v) for t, v in self.entropy_by_temperature.items()},
        )

    @classmethod
    def from_ragged(
        cls,
        *,
        ids: Array,
        head_size: Array,
        logprob: Array,
        count: Array,
        tail_logit: Array,
        row_entries: Array | None = None,
        row_offset: Array | None = None,
        draws: int = 0,
        entropy: Array | None = None,
        next_logprob: Array | None = None,
        sample_logprob: Array | None = None,
        tail_logit_by_temperature: Mapping[float, Array] | None = None,
        entropy_by_temperature: Mapping[float, Array] | None = None,
    ) -> SparseTargets:
        """Pad flat rows, as a store holds them, to a rectangle.

        Args:
            ids: [M] token ids of all rows, each row's head first.
            head_size: [N] head entries of each row.
            logprob: [sum head_size] log-probabilities of head entries.
            count: [M - sum head_size] draw counts of tail samples. A repeated id is merged, its counts added.
            tail_logit: [N] log(r / (1 - r)).
            row_entries: [N] entries of each row; or give row_offset.
            row_offset: [N + 1] where each row begins on the entry axis.
            draws: tail draws per row; every row with samples must add up to it.
            entropy: [N] in nats.
            next_logprob: [N].
            sample_logprob: [M - sum head_size], aligned with count.
            tail_logit_by_temperature: T -> [N].
            entropy_by_temperature: T -> [N].

        Raises:
            ValueError: lengths that do not fit each other, or counts that do not add up to draws.
        """
        head_N, ids_M = _long(head_size), _long(ids)
        if (row_entries is None) == (row_offset is None):
            raise ValueError("SparseTargets.from_ragged takes exactly one of row_entries and row_offset")
        entries_N = _long(row_entries) if row_entries is not None else _long(row_offset).diff()
        tails = {"count": count, "sample_logprob": sample_logprob}
        _check_lengths(ids_M, entries_N, head_N=head_N, heads={"logprob": logprob}, tails=tails)
        rows, width = len(entries_N), int(entries_N.max()) if len(entries_N) else 0
        row_M = torch.repeat_interleave(torch.arange(rows), entries_N)
        column_M = torch.arange(len(ids_M)) - (entries_N.cumsum(0) - entries_N)[row_M]
        tail_M = column_M >= head_N[row_M]

        def scatter(values: Array, where_M: Tensor, *, fill: float, dtype: torch.dtype) -> Tensor:
            grid_NE = torch.full((rows, width), fill, dtype=dtype)
            grid_NE[row_M[where_M], column_M[where_M]] = torch.as_tensor(values).to(dtype)
            return grid_NE

        everywhere_M = torch.ones_like(tail_M)
        targets = cls(
            ids_NE=scatter(ids_M, everywhere_M, fill=0, dtype=torch.int64),
            logprob_NE=scatter(logprob, ~tail_M, fill=-torch.inf, dtype=torch.float32),
            head_size_N=head_N,
            count_NE=scatter(_long(count), tail_M, fill=0, dtype=torch.int32),
            draws=draws,
            tail_logit_N=_float(tail_logit),
            entropy_N=None if entropy is None else _float(entropy),
            next_logprob_N=None if next_logprob is None else _float(next_logprob),
            sample_logprob_NE=None
            if sample_logprob is None
            else scatter(sample_logprob, tail_M, fill=-torch.inf, dtype=torch.float32),
            tail_logit_by_temperature={t: _float(v) for t, v in (tail_logit_by_temperature or {}).items()},
            entropy_by_temperature={t: _float(v) for t, v in (entropy_by_temperature or {}).items()},
        )
        _check_draws(targets)
        return _merge_repeated_samples(targets)

    @classmethod
    def from_logits(
        cls,
        logits_NV: Tensor,
        k: int,
        *,
        draws: int = 0,
        generator: torch.Generator | None = None,
        temperatures: tuple[float, ...] = (),
    ) -> SparseTargets:
        """Make rows from dense teacher logits, in float64 inside. For tests and small experiments: a store's rows
        come from stages/targets.

        Args:
            logits_NV: [N, V].
            k: head size, 0 for rows of samples only.
            draws: tail samples drawn per row, with replacement, from the teacher outside the head.
            generator: source of the draws.
            temperatures: also keep tail_logit and entropy at these T, and sample_logprob if there are draws.
        """
        logprob_NV = logits_NV.detach().double().log_softmax(-1)
        head_NK, ids_NK = logprob_NV.topk(k, dim=-1)
        rows = len(logprob_NV)
        tail_logit_N, entropy_N, tail_NV = _moments(logprob_NV, ids_NK)
        ids_NE, count_NE = ids_NK, torch.zeros(rows, k, dtype=torch.int32, device=ids_NK.device)
        if draws:
            has_tail_N1 = torch.isfinite(tail_NV).any(-1, keepdim=True)
            weight_NV = torch.where(has_tail_N1, tail_NV.softmax(-1), 1.0)
            drawn_NM = torch.multinomial(weight_NV, draws, replacement=True, generator=generator)
            ids_NE = torch.cat([ids_NK, drawn_NM], -1)
            count_NE = torch.cat([count_NE, has_tail_N1.int().expand(rows, draws)], -1)
        at = {t: _moments((logprob_NV / t).log_softmax(-1), ids_NK) for t in temperatures}
        pad_NS = torch.full((rows, draws), -torch.inf, device=ids_NK.device)
        sample_NE = logprob_NV.gather(-1, ids_NE).masked_fill(count_NE == 0, -torch.inf)
        return _merge_repeated_samples(
            cls(
                ids_NE=ids_NE,
                logprob_NE=torch.cat([head_NK.float(), pad_NS], -1),
                head_size_N=torch.full((rows,), k, device=ids_NK.device),
                count_NE=count_NE,
                draws=draws,
                tail_logit_N=tail_logit_N.float(),
                entropy_N=entropy_N.float(),
                sample_logprob_NE=sample_NE.float() if draws else None,
                tail_logit_by_temperature={t: moments[0].float() for t, moments in at.items()},
                entropy_by_temperature={t: moments[1].float() for t, moments in at.items()},
            )
        )


def _columns(targets: SparseTargets) -> dict[str, Tensor]:
    """Return the tensor fields that are present, by name."""
    return {name: value for name, value in vars(targets).items() if isinstance(value, Tensor)}


def _moments(logprob_NV: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tail_logit [N], entropy [N] and log-probabilities with the head struck out [N, V]."""
    tail_NV = logprob_NV.scatter(-1, ids_NK, -torch.inf)
    tail_logit_N = tail_NV.logsumexp(-1) - logprob_NV.gather(-1, ids_NK).logsumexp(-1)
    entropy_N = torch.special.entr(logprob_NV.exp()).sum(-1)
    return tail_logit_N, entropy_N, tail_NV


def _long(values: Array | None) -> Tensor:
    """Return int64; torch has no arithmetic on the unsigned types that a store uses."""
    return values.long() if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values).astype(np.int64))


def _float(values: Array) -> Tensor:
    return torch.as_tensor(values).float()


def _check_lengths(
    ids_M: Tensor,
    entries_N: Tensor,
    *,
    head_N: Tensor,
    heads: Mapping[str, Array],
    tails: Mapping[str, Array | None],
) -> None:
    """Raise ValueError unless the flat arrays fit the rows."""
    if len(head_N) != len(entries_N):
        raise ValueError(f"head_size has {len(head_N)} rows, the entries have {len(entries_N)}")
    if bool((head_N > entries_N).any()) or bool((head_N < 0).any()):
        row = int(((head_N > entries_N) | (head_N < 0)).nonzero()[0])
        raise ValueError(f"row {row}: head_size {int(head_N[row])} does not fit its {int(entries_N[row])} entries")
    total, head_total = int(entries_N.sum()), int(head_N.sum())
    expected: dict[str, tuple[Array, int]] = {"ids": (ids_M, total)}
    expected |= {name: (value, head_total) for name, value in heads.items()}
    expected |= {name: (value, total - head_total) for name, value in tails.items() if value is not None}
    for name, (value, wanted) in expected.items():
        if len(value) != wanted:
            raise ValueError(f"{name} has {len(value)} values, the rows need {wanted}")


def _check_draws(targets: SparseTargets) -> None:
    """Raise ValueError unless each row with samples has `draws` of them."""
    drawn_N = targets.count_NE.sum(-1)
    wrong_N = (drawn_N != 0) & (drawn_N != targets.draws)
    if bool(wrong_N.any()):
        row = int(wrong_N.nonzero()[0])
        raise ValueError(f"row {row}: counts add up to {int(drawn_N[row])}, but draws is {targets.draws}")


def check_distinct(targets: SparseTargets) -> None:
    """Raise ValueError where a row holds a token id twice.

    Without this the value would be right and the gradient wrong. It costs one sort: 6 ms of one core for 4,096 rows of
    64 entries, about a thousandth of a loss over 49,152 tokens.
    """
    sorted_NE, _, repeat_NE = _repeats(targets)
    if bool(repeat_NE.any()):
        raise ValueError(
            f"a row of the teacher holds token id {int(sorted_NE[repeat_NE][0])} twice; "
            "SparseTargets.from_ragged merges samples that were drawn more than once"
        )


def _repeats(targets: SparseTargets) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids of each row sorted, padding with ids below 0; their order; which equal the one before."""
    slot_E = torch.arange(targets.ids_NE.shape[1], device=targets.device)
    used_NE = targets.head_NE | targets.sample_NE
    sorted_NE, order_NE = torch.where(used_NE, targets.ids_NE, -1 - slot_E).sort(dim=-1, stable=True)
    repeat_NE = torch.zeros_like(used_NE)
    repeat_NE[:, 1:] = sorted_NE[:, 1:] == sorted_NE[:, :-1]
    return sorted_NE, order_NE, repeat_NE


def _merge_repeated_samples(targets: SparseTargets) -> SparseTargets:
    """Add the counts of equal tail samples of a row into the first of them; the others become padding.

    Raises:
        ValueError: an id that is twice in a head, or in the head and among the samples.
    """
    sorted_NE, order_NE, repeat_NE = _repeats(targets)
    if not bool(repeat_NE.any()):
        return targets
    head_NE = targets.head_NE.gather(-1, order_NE)
    wrong_NE = repeat_NE.clone()
    wrong_NE[:, 1:] &= head_NE[:, 1:] | head_NE[:, :-1]
    if bool(wrong_NE.any()):
        row, slot = wrong_NE.nonzero()[0].tolist()
        raise ValueError(
            f"row {row}: token id {int(sorted_NE[row, slot])} is twice in its head, or in its head and among its "
            "samples, which are drawn from the tail"
        )
    sorted_count_NE = targets.count_NE.gather(-1, order_NE)
    # Each run of equal ids is added up and handed to the first of the run.
    run_NE = (~repeat_NE).cumsum(-1) - 1
    total_NE = torch.zeros_like(sorted_count_NE).scatter_add(-1, run_NE, sorted_count_NE)
    merged_NE = torch.where(repeat_NE, 0, total_NE.gather(-1, run_NE))
    return replace(targets, count_NE=torch.empty_like(targets.count_NE).scatter(-1, order_NE, merged_NE))
