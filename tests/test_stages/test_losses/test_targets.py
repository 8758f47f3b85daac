"""SparseTargets: padding flat rows, selecting, moving, and refusing what does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.losses import KDLoss, SparseTargets


def flat(**changes: Any) -> dict[str, Any]:
    """Two rows as a store holds them: head 2 + 1 sample, head 1 + 2 samples."""
    values: dict[str, Any] = {
        "ids": np.array([5, 3, 9, 2, 7, 8], dtype=np.uint16),
        "row_entries": np.array([3, 3], dtype=np.uint8),
        "head_size": np.array([2, 1], dtype=np.uint8),
        "logprob": np.log(np.array([0.5, 0.25, 0.6])).astype(np.float32),
        "count": np.array([4, 1, 3], dtype=np.uint8),
        "tail_logit": np.array([np.log(0.25 / 0.75), np.log(0.4 / 0.6)], dtype=np.float16),
        "entropy": np.array([1.2, 1.1], dtype=np.float16),
        "next_logprob": np.array([-0.7, -3.0], dtype=np.float16),
        "draws": 4,
    }
    return values | changes


def test_from_ragged() -> None:
    targets = SparseTargets.from_ragged(**flat())
    assert len(targets) == 2
    assert targets.ids_NE.tolist() == [[5, 3, 9], [2, 7, 8]]
    assert targets.head_NE.tolist() == [[True, True, False], [True, False, False]]
    assert targets.count_NE.tolist() == [[0, 0, 4], [0, 1, 3]]
    torch.testing.assert_close(targets.logprob_NE.exp(), torch.tensor([[0.5, 0.25, 0.0], [0.6, 0.0, 0.0]]))
    assert (targets.ids_NE.dtype, targets.count_NE.dtype, targets.head_size_N.dtype) == (
        torch.int64,
        torch.int32,
        torch.int64,
    )
    assert targets.logprob_NE.dtype == targets.tail_logit_N.dtype == torch.float32
    by_offset = SparseTargets.from_ragged(**flat(row_entries=None, row_offset=np.array([0, 3, 6], dtype=np.uint64)))
    assert torch.equal(by_offset.ids_NE, targets.ids_NE)
    tensors: dict[str, Any] = {
        key: torch.from_numpy(v.astype(np.float64)) if hasattr(v, "astype") else v for key, v in flat().items()
    }
    assert torch.equal(SparseTargets.from_ragged(**tensors).logprob_NE, targets.logprob_NE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": np.arange(5)}, "ids has 5 values, the rows need 6"),
        ({"logprob": np.zeros(4)}, "logprob has 4 values, the rows need 3"),
        ({"count": np.zeros(2)}, "count has 2 values"),
        ({"sample_logprob": np.zeros(2)}, "sample_logprob has 2 values"),
        ({"head_size": np.array([2, 4])}, "row 1: head_size 4 does not fit its 3 entries"),
        ({"head_size": np.array([2])}, "head_size has 1 rows"),
        ({"draws": 5}, "row 0: counts add up to 4, but draws is 5"),
        ({"draws": -1}, "counts add up|cannot be negative"),
        ({"entropy": np.zeros(3)}, "entropy_N has shape"),
        ({"tail_logit_by_temperature": {2.0: np.zeros(3)}}, "T=2"),
        ({"row_offset": np.array([0, 3, 6])}, "exactly one"),
        ({"ids": np.array([5, 3, 9, 2, 2, 8])}, "row 1: token id 2 is twice"),
        ({"ids": np.array([5, 5, 9, 2, 7, 8])}, "row 0: token id 5 is twice"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseTargets.from_ragged(**flat(**changes))


@pytest.mark.parametrize("loss", [KDLoss(), KDLoss(tail="bucket"), KDLoss(divergence="jsd")])
def test_losses_refuse_an_id_that_is_twice_in_a_row(loss: KDLoss) -> None:
    """Rows that were not built by from_ragged, which merges: the gradient of such a row would be wrong."""
    logits, labels = torch.zeros(3, 12, requires_grad=True), torch.tensor([-100, 1, 2])
    targets = SparseTargets.from_logits(torch.randn(3, 12, generator=torch.Generator().manual_seed(0)), 3)
    targets = replace(
        targets, count_NE=torch.tensor([[0, 2, 2]]).expand(3, 3).int(), draws=4, head_size_N=torch.ones(3)
    )
    loss(logits, targets, labels)
    for row, slots, refused in ((0, (1, 2), False), (1, (1, 2), True), (2, (0, 2), True)):
        ids = targets.ids_NE.clone()
        ids[row, slots[0]] = ids[row, slots[1]]
        repeated = replace(targets, ids_NE=ids)
        if refused:
            with pytest.raises(ValueError, match=f"token id {int(ids[row, slots[0]])} twice; .*from_ragged"):
                loss(logits, repeated, labels)
        else:  # an ignored row may hold anything
            loss(logits, repeated, labels)


def test_no_rows() -> None:
    nothing = SparseTargets.from_ragged(
        ids=np.zeros(0), row_entries=np.zeros(0), head_size=np.zeros(0), logprob=np.zeros(0), count=np.zeros(0),
        tail_logit=np.zeros(0), entropy=np.zeros(0), draws=4,
    )  # fmt: skip
    assert len(nothing) == 0
    logits = torch.zeros(0, 6, requires_grad=True)
    assert KDLoss()(logits, nothing, torch.zeros(0, dtype=torch.int64)) == 0


def test_rows_and_device() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = SparseTargets.from_logits(
        torch.randn(6, 20, generator=generator), 4, draws=3, generator=generator, temperatures=(2.0,)
    )
    part, picked = targets.rows(slice(1, 4)), targets.rows(torch.tensor([3, 1]))
    assert len(part) == 3
    assert torch.equal(picked.ids_NE, targets.ids_NE[[3, 1]])
    assert torch.equal(picked.tail_logit_by_temperature[2.0], targets.tail_logit_by_temperature[2.0][[3, 1]])
    assert torch.equal(part.entropy_by_temperature[2.0], targets.entropy_by_temperature[2.0][1:4])
    assert part.sample_logprob_NE is not None
    assert part.draws == targets.draws
    moved = targets.to("meta")
    assert moved.device.type == moved.entropy_by_temperature[2.0].device.type == "meta"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), extra=st.integers(0, 3), junk=st.integers(-5, 500))
def test_padding_changes_nothing(seed: int, extra: int, junk: int) -> None:
    """Slots that are neither head nor sample may hold any id, and any number of them may follow."""
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(4, 12, generator=generator), torch.randn(4, 12, generator=generator)
    labels = torch.randint(0, 12, (4,), generator=generator)
    targets = SparseTargets.from_logits(teacher, 3, draws=4, generator=generator)
    free = ~(targets.head_NE | targets.sample_NE)
    padded = SparseTargets(
        ids_NE=torch.cat([targets.ids_NE.masked_fill(free, junk), torch.full((4, extra), junk)], -1),
        logprob_NE=torch.cat([targets.logprob_NE, torch.full((4, extra), -torch.inf)], -1),
        head_size_N=targets.head_size_N,
        count_NE=torch.cat([targets.count_NE, torch.zeros(4, extra, dtype=torch.int32)], -1),
        draws=4,
        tail_logit_N=targets.tail_logit_N,
        entropy_N=targets.entropy_N,
    )
    for name in ("forward_kl", "jsd"):
        for loss in (KDLoss(divergence=name), KDLoss(divergence=name, tail="bucket")):
            first, second = (logits.clone().requires_grad_() for _ in range(2))
            value, same = loss(first, targets, labels), loss(second, padded, labels)
            torch.testing.assert_close(value, same)
            torch.testing.assert_close(torch.autograd.grad(value, [first]), torch.autograd.grad(same, [second]))
