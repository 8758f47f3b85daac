"""Every divergence against a full-vocabulary teacher: gradcheck, float64 references, equality, two ways to give it."""

from __future__ import annotations

import losses_reference as reference
import pytest
import torch
from torch import Tensor

from stages.losses import DIVERGENCES, FusedLinearKDLoss, KDLoss, SparseTargets, TeacherHead
from stages.losses.engine.chunk import BLOCK_ELEMENTS

N, D, V = 9, 6, 17


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LABELS = torch.tensor([1, 2, -100, 4, 5, -100, 7, 8, 16])


def test_every_divergence_has_a_reference() -> None:
    assert {name.split("(")[0] for name in reference.MEASURES} == DIVERGENCES.keys()


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("name", reference.MEASURES)
def test_from_logits(name: str, temperature: float) -> None:
    student_NV, teacher_NV = rand(N, V).requires_grad_(), 2 * rand(N, V, seed=1)
    loss = KDLoss(temperature=temperature, chunk_size=2, divergence=name, logits_scale=1.3, target_logits_scale=0.8)
    value = loss(student_NV, teacher_NV, LABELS)
    expected = reference.mean_over(reference.dense_kd(name, student_NV, teacher_NV, temperature, (1.3, 0.8)), LABELS)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)
    found, theirs = (torch.autograd.grad(2.5 * x, [student_NV])[0] for x in (value, expected))
    assert reference.error(found, theirs) < 1e-11


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", reference.MEASURES)
def test_fused_from_teacher_hidden(name: str, temperature: float) -> None:
    """Teacher of another width, with cap, factor and bias; student with all three as well."""
    hidden_ND, weight_VD, bias_V = (rand(*s, seed=i).requires_grad_() for i, s in enumerate([(N, D), (V, D), (V,)]))
    teacher = TeacherHead(
        hidden_ND=rand(N, 4, seed=3),
        weight_VD=rand(V, 4, seed=4),
        bias_V=rand(V, seed=5),
        softcap=3.0,
        logit_multiplier=0.7,
    )
    loss = FusedLinearKDLoss(
        temperature=temperature, chunk_size=5, divergence=name, kd_ratio=0.6, softcap=2.5, logit_multiplier=1.2
    )
    parts = loss(hidden_ND, weight_VD, teacher, LABELS, bias_V=bias_V)
    logits_NV = 2.5 * torch.tanh(1.2 * (hidden_ND @ weight_VD.t() + bias_V) / 2.5)
    assert teacher.bias_V is not None
    teacher_NV = 3.0 * torch.tanh(0.7 * (teacher.hidden_ND @ teacher.weight_VD.t() + teacher.bias_V) / 3.0)
    kd = reference.mean_over(reference.dense_kd(name, logits_NV, teacher_NV, temperature), LABELS)
    ce = reference.mean_over(reference.cross_entropy(logits_NV, LABELS), LABELS)
    torch.testing.assert_close(tuple(parts), (0.6 * kd + 0.4 * ce, kd, ce), rtol=1e-11, atol=1e-13)
    inputs = [hidden_ND, weight_VD, bias_V]
    found, expected = (torch.autograd.grad(2.5 * x, inputs) for x in (parts.loss, 0.6 * kd + 0.4 * ce))
    for mine, theirs in zip(found, expected, strict=True):
        assert reference.error(mine, theirs) < 1e-11
    given = loss(hidden_ND, weight_VD, teacher_NV.detach(), LABELS, bias_V=bias_V)
    torch.testing.assert_close(tuple(given), tuple(parts), rtol=1e-12, atol=1e-13)


# A vocabulary whose row maximum is searched in pieces, and rows for three blocks in one chunk.
WIDE = 1252
LONG = 2 * BLOCK_ELEMENTS // WIDE + 22
LONG_LABELS = torch.randint(0, WIDE, (LONG,), generator=torch.Generator().manual_seed(9))
LONG_LABELS[::50] = -100


@pytest.mark.parametrize("name", reference.MEASURES)
def test_blocks_of_rows(name: str) -> None:
    """Float32, row by row: flat rows and rows where one token has nearly all of the student's mass."""
    student_NV, teacher_NV = rand(LONG, WIDE, dtype=torch.float32), rand(LONG, WIDE, seed=1, dtype=torch.float32) * 2
    student_NV[::3] *= 6
    student_NV[torch.arange(1, LONG, 3), torch.arange(1, LONG, 3) * 7 % WIDE] = 20.0
    student_NV.requires_grad_()
    value = KDLoss(divergence=name)(student_NV, teacher_NV, LONG_LABELS)
    value.backward()
    exact_NV = student_NV.detach().double().requires_grad_()
    expected = reference.mean_over(reference.dense_kd(name, exact_NV, teacher_NV.double()), LONG_LABELS)
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0.0)
    assert student_NV.grad is not None
    assert exact_NV.grad is not None
    valid_N = LONG_LABELS != -100
    error_N = (student_NV.grad.double() - exact_NV.grad).norm(dim=-1) / exact_NV.grad.norm(dim=-1)
    # tvd's gradient jumps where p and q cross
    assert float(error_N[valid_N].max()) < (0.1 if name == "tvd" else 2e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_blocks_of_rows_with_cross_entropy(name: str, temperature: float) -> None:
    hidden_ND, weight_VD, teacher_NV = rand(LONG, D).requires_grad_(), rand(WIDE, D), rand(LONG, WIDE, seed=1) * 2
    weight_VD.requires_grad_()
    loss = FusedLinearKDLoss(divergence=name, temperature=temperature, chunk_size=LONG, kd_ratio=0.3)
    parts = loss(hidden_ND, weight_VD, teacher_NV, LONG_LABELS)
    logits_NV = hidden_ND @ weight_VD.t()
    kd = reference.mean_over(reference.dense_kd(name, logits_NV, teacher_NV, temperature), LONG_LABELS)
    ce = reference.mean_over(reference.cross_entropy(logits_NV, LONG_LABELS), LONG_LABELS)
    torch.testing.assert_close(tuple(parts), (0.3 * kd + 0.7 * ce, kd, ce), rtol=1e-11, atol=0.0)
    found, expected = (torch.autograd.grad(x, [hidden_ND, weight_VD]) for x in (parts.loss, 0.3 * kd + 0.7 * ce))
    for mine, theirs in zip(found, expected, strict=True):
        assert reference.error(mine, theirs) < 1e-11


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradcheck(name: str) -> None:
    """Finite differences; tvd is smooth here because no two probabilities are close."""
    student_NV, teacher_NV = rand(4, 7).requires_grad_(), rand(4, 7, seed=1)
    labels_N = torch.tensor([0, 6, -100, 3])
    assert torch.autograd.gradcheck(lambda x: KDLoss(divergence=name)(x, teacher_NV, labels_N), [student_NV])
    targets = SparseTargets.from_logits(teacher_NV, 3)
    assert torch.autograd.gradcheck(lambda x: KDLoss(divergence=name)(x, targets, labels_N), [student_NV])
    fused = FusedLinearKDLoss(divergence=name, chunk_size=2, softcap=3.0, kd_ratio=0.7)
    inputs = [rand(4, 3, seed=2).requires_grad_(), rand(7, 3, seed=3).requires_grad_()]
    assert torch.autograd.gradcheck(lambda h, w: fused(h, w, targets, labels_N).loss, inputs)


@pytest.mark.parametrize("name", reference.MEASURES)
@pytest.mark.parametrize("form", ["dense", "bucket", "renormalize_both"])
def test_zero_at_equality(name: str, form: str) -> None:
    """Value and gradient vanish where student and teacher agree, and no value is negative anywhere."""
    teacher_NV = rand(N, V, dtype=torch.float32) * 3
    sparse = SparseTargets.from_logits(teacher_NV, 5)
    teacher = teacher_NV if form == "dense" else sparse
    loss = KDLoss(divergence=name, tail=None if form == "dense" else form)
    student_NV = teacher_NV.clone().requires_grad_()
    value = loss(student_NV, teacher, LABELS)
    value.backward()
    assert 0.0 <= float(value.detach()) < 1e-6
    assert student_NV.grad is not None
    assert float(student_NV.grad.abs().max()) < 1e-6
    for seed in range(20):
        near_NV = teacher_NV + 1e-3 * rand(N, V, seed=seed, dtype=torch.float32)
        assert float(loss(near_NV, teacher, LABELS)) >= 0.0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_teacher_gets_no_gradient(name: str) -> None:
    student_NV, teacher_NV = rand(N, V).requires_grad_(), rand(N, V, seed=1).requires_grad_()
    KDLoss(divergence=name)(student_NV, teacher_NV, LABELS).backward()
    assert teacher_NV.grad is None
    assert student_NV.grad is not None


def test_whole_head_equals_dense() -> None:
    """k = V: the tail is empty, its log-mass -inf on both sides, and every divergence is the dense one."""
    student_NV, teacher_NV = rand(N, V), rand(N, V, seed=1)
    targets = SparseTargets.from_logits(teacher_NV, V)
    assert targets.tail_logit_N.eq(-torch.inf).all()
    for name in reference.MEASURES:
        sparse_NV, dense_NV = student_NV.clone().requires_grad_(), student_NV.clone().requires_grad_()
        loss = KDLoss(divergence=name)
        sparse, dense = loss(sparse_NV, targets, LABELS), loss(dense_NV, teacher_NV, LABELS)
        torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-8)
        found, theirs = (torch.autograd.grad(x, [y])[0] for x, y in ((sparse, sparse_NV), (dense, dense_NV)))
        assert reference.error(found, theirs) < 1e-6
