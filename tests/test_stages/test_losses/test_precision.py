"""Which precision a loss computes in, and what mixed precision does to its gradients."""

from __future__ import annotations

import losses_reference as reference
import pytest
import torch
from torch import Tensor

from stages.losses import FusedLinearCrossEntropy, FusedLinearKDLoss, KDLoss, MaskedCrossEntropy, SparseTargets

N, D, V = 10, 6, 19


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows() -> SparseTargets:
    return SparseTargets.from_logits(2 * rand(N, V, seed=1), 5, draws=4, generator=torch.Generator().manual_seed(2))


LABELS = torch.tensor([3, -100, 5, 18, 0, -100, 7, 7, 2, 1])


def test_autocast() -> None:
    """Under autocast products run in bfloat16, row sums do not, and master gradients keep their precision."""
    hidden_ND, weight_VD = rand(N, D).requires_grad_(), rand(V, D).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = FusedLinearKDLoss()(hidden_ND, weight_VD, rows(), LABELS)
        kd = KDLoss()(rand(N, V), rand(N, V, seed=1), LABELS)
    parts.loss.backward()
    assert parts.loss.dtype == kd.dtype == torch.float32
    assert hidden_ND.grad is not None
    assert weight_VD.grad is not None
    assert hidden_ND.grad.dtype == weight_VD.grad.dtype == torch.float32
    by_hand = FusedLinearKDLoss()(hidden_ND.bfloat16(), weight_VD, rows(), LABELS)
    torch.testing.assert_close(by_hand.loss, parts.loss, rtol=0, atol=0)
    torch.testing.assert_close(kd, KDLoss()(rand(N, V), rand(N, V, seed=1), LABELS), rtol=0, atol=0)


def test_autocast_weight_gradient() -> None:
    """Master weights, bfloat16 products, three chunks: what each adds to either part of a long weight is there."""
    wide = 9000  # the gradient is added up 8192 tokens at a time
    hidden_ND, weight_VD = rand(N, D).requires_grad_(), rand(wide, D).requires_grad_()
    labels_N = torch.where(LABELS != -100, LABELS + wide - V, LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        FusedLinearKDLoss(chunk_size=3)(hidden_ND, weight_VD, rows(), labels_N).loss.backward()
    exact = [x.detach().bfloat16().double().requires_grad_() for x in (hidden_ND, weight_VD)]
    logits_NV = exact[0] @ exact[1].t()
    kd_N = reference.sparse_kd("forward_kl", logits_NV, rows(), labels_N, "sampled")
    reference.mean_over(0.5 * kd_N + 0.5 * reference.cross_entropy(logits_NV, labels_N), labels_N).backward()  # type: ignore[no-untyped-call]
    assert weight_VD.grad is not None
    assert exact[1].grad is not None
    for found, expected in zip(weight_VD.grad.split(8192), exact[1].grad.split(8192), strict=True):
        assert reference.error(found, expected) < 2.0**-6


def test_fp32_upcast_off_keeps_the_logits_precision() -> None:
    """Chunks stay bfloat16, which shows in the values, a little."""
    logits_NV = rand(N, V).bfloat16()
    for loss, teacher in ((KDLoss, (rows(),)), (MaskedCrossEntropy, ())):
        exact, rounded = (float(loss(fp32_upcast=on)(logits_NV, *teacher, LABELS)) for on in (True, False))
        assert rounded == pytest.approx(exact, rel=1e-2)
        assert rounded != pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_float16_sums_over_rows_do_not_overflow(dtype: torch.dtype) -> None:
    """One label for all rows: the sum over them, before it is divided, is beyond 65504."""
    rows, width = 4096, 4
    hidden_ND, labels_N = torch.full((rows, width), 30.0), torch.zeros(rows, dtype=torch.int64)
    weight_VD = torch.zeros(V, width, dtype=dtype, requires_grad=True)
    loss = FusedLinearCrossEntropy(reduction="mean", chunk_size=rows)
    loss(hidden_ND.half(), labels_N, weight_VD).backward()
    assert weight_VD.grad is not None
    torch.testing.assert_close(weight_VD.grad[0].float(), torch.full((width,), 30.0 * (1 / V - 1)), rtol=1e-2, atol=0.0)
