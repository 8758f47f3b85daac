"""Rows as trained models have them: most of the mass on one token, and real vocabularies. Exactness and bias there.

1 - q is a small difference of numbers near 1, and float32 sums over 150,000 numbers lose digits if added one by one.
The losses are compared with themselves in float64; that those are right is shown in test_sparse.py and test_dense.py.
"""

from __future__ import annotations

import losses_reference as reference
import pytest
import torch
from torch import Tensor

from stages.losses import FusedLinearKDLoss, KDLoss, SparseTargets

FORMS = [
    ("forward_kl", "sampled"),
    ("forward_kl", "bucket"),
    ("forward_kl", "dense"),
    ("jsd", "bucket"),
    ("jsd", "dense"),
]
FORMS += [("reverse_kl", "dense")]


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def confident(rows: int, vocab: int, lead: float) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, student logits and teacher logits near them; the label's logit is `lead` above the others' mean."""
    labels_N = torch.randint(vocab, (rows,), generator=random(0))
    student_NV = 0.5 * torch.randn(rows, vocab, generator=random(1))
    student_NV[torch.arange(rows), labels_N] += lead
    return labels_N, student_NV, student_NV + 0.2 * torch.randn(rows, vocab, generator=random(2))


def gradient_error(name: str, form: str, logits_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor) -> float:
    """Of the gradient for float32 logits, against float64 from the same logits."""
    targets = SparseTargets.from_logits(teacher_NV, 12, draws=8, generator=random(3))
    loss = KDLoss(divergence=name, tail=None if form == "dense" else form)
    mine_NV, exact_NV = logits_NV.clone().requires_grad_(), logits_NV.double().requires_grad_()
    loss(mine_NV, teacher_NV if form == "dense" else targets, labels_N).backward()
    loss(exact_NV, teacher_NV.double() if form == "dense" else targets, labels_N).backward()
    assert mine_NV.grad is not None
    assert exact_NV.grad is not None
    return reference.error(mine_NV.grad, exact_NV.grad)


@pytest.mark.parametrize("lead", [8.0, 12.0, 20.0])
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_float32_on_confident_rows(name: str, form: str, lead: float) -> None:
    """2e-6 where the gradient is linear in the teacher. The logarithms that others need have 1e-6 at -20 in float32."""
    labels_N, student_NV, teacher_NV = confident(24, 257, lead)
    allowed = 2e-6 if name == "forward_kl" or form == "bucket" else 4e-6
    assert gradient_error(name, form, student_NV, teacher_NV, labels_N) <= allowed


@pytest.mark.parametrize("spread", [1.0, 5.0])
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_float32_at_a_real_vocabulary(name: str, form: str, spread: float) -> None:
    """2e-6: a softmax of torch's is off by up to 1e-5 at this size on CPU."""
    rows, vocab = 4, 151_936
    student_NV, teacher_NV = (spread * torch.randn(rows, vocab, generator=random(seed)) for seed in (4, 5))
    labels_N = torch.arange(rows)
    assert gradient_error(name, form, student_NV, teacher_NV, labels_N) <= 2e-6


@pytest.mark.parametrize(("lead", "vocab"), [(12.0, 257), (20.0, 257), (4.0, 151_936)])
def test_float32_cross_entropy(lead: float, vocab: int) -> None:
    labels_N, logits_NV, _ = confident(4, vocab, lead)
    assert reference.cross_entropy_error(logits_NV, labels_N) <= 2e-6


@pytest.mark.parametrize("kd_ratio", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("form", ["sampled", "bucket", "dense"])
@pytest.mark.parametrize("lead", [8.0, 14.0])
def test_bfloat16_fused_on_confident_rows(form: str, kd_ratio: float, lead: float) -> None:
    """1 - q is 10% or 0.1%: bfloat16 knows no number between 0.996 and 1. Within its rounding, and not biased."""
    rows, width, vocab = 2048, 64, 512
    weight_VD = (torch.randn(vocab, width, generator=random(6)) / width**0.5).bfloat16()
    labels_N = torch.randint(vocab, (rows,), generator=random(7))
    own_ND = weight_VD.float()[labels_N]
    hidden_ND = (own_ND / own_ND.norm(dim=-1, keepdim=True) ** 2 * lead).bfloat16()
    logits_NV = (hidden_ND @ weight_VD.t()).double()
    teacher_NV = logits_NV + 0.3 * torch.randn(rows, vocab, generator=random(8), dtype=torch.float64)
    targets = SparseTargets.from_logits(teacher_NV, 32, draws=8, generator=random(9))
    hidden_ND.requires_grad_()
    loss = FusedLinearKDLoss(kd_ratio=kd_ratio, tail=None if form == "dense" else form)
    parts = loss(hidden_ND, weight_VD, teacher_NV.bfloat16() if form == "dense" else targets, labels_N)
    parts.loss.backward()

    exact_NV = logits_NV.requires_grad_()
    kd = KDLoss(tail=loss.objective.tail)(exact_NV, teacher_NV.bfloat16() if form == "dense" else targets, labels_N)
    value = kd_ratio * kd + (1 - kd_ratio) * torch.nn.functional.cross_entropy(exact_NV, labels_N)
    value.backward()  # type: ignore[no-untyped-call]
    assert exact_NV.grad is not None
    exact_ND = exact_NV.grad @ weight_VD.double()
    assert hidden_ND.grad is not None
    assert reference.error(hidden_ND.grad, exact_ND) <= 0.01
    assert float(parts.loss.detach()) == pytest.approx(float(value.detach()), rel=0.01)
    along = (hidden_ND.grad.double() - exact_ND) * exact_ND.sign()
    assert abs(float(along.sum() / exact_ND.abs().sum())) <= 1e-3
