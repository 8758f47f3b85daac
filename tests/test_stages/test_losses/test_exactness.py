"""How exact: float32 and bfloat16 against float64 from the same numbers, bounds, and unbiasedness over redraws."""

from __future__ import annotations

import losses_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.losses import DIVERGENCES, FusedLinearKDLoss, KDLoss, SparseTargets

N, D, V = 24, 16, 257


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(9))
FORMS = [(name, "dense") for name in reference.MEASURES] + [(name, "bucket") for name in reference.MEASURES]
FORMS += [("forward_kl", "sampled"), ("forward_kl", "residual_to_label"), ("reverse_kl", "renormalize_both")]


def expected_kd(name: str, form: str, student: Tensor, teacher: Tensor, targets: SparseTargets) -> Tensor:
    if form == "dense":
        return reference.dense_kd(name, student, teacher.double())
    return reference.sparse_kd(name, student, targets, LABELS, form)


@pytest.mark.parametrize("largest", [5.0, 80.0])
@pytest.mark.parametrize(("name", "form"), FORMS)
@pytest.mark.filterwarnings("ignore:tail=")
def test_float32_logits(name: str, form: str, largest: float) -> None:
    """2e-6 in the gradient, also where logits reach +-80."""
    student_NV = rand(N, V)
    student_NV = (student_NV * largest / student_NV.abs().max()).requires_grad_()
    teacher_NV = rand(N, V, seed=1) * largest / 5
    targets = SparseTargets.from_logits(teacher_NV, 12, draws=8, generator=torch.Generator().manual_seed(2))
    KDLoss(divergence=name, tail=None if form == "dense" else form)(
        student_NV, teacher_NV if form == "dense" else targets, LABELS
    ).backward()
    exact_NV = student_NV.detach().double().requires_grad_()
    expected_kd(name, form, exact_NV, teacher_NV, targets).mean().backward()  # type: ignore[no-untyped-call]
    assert student_NV.grad is not None
    assert exact_NV.grad is not None
    assert reference.error(student_NV.grad, exact_NV.grad) <= 2e-6


@pytest.mark.parametrize(("name", "form"), FORMS)
@pytest.mark.filterwarnings("ignore:tail=")
def test_float32_fused(name: str, form: str) -> None:
    """1e-4 in the gradients of hidden and weight."""
    hidden_ND, weight_VD = rand(N, D).requires_grad_(), rand(V, D, seed=3).requires_grad_()
    teacher_NV = rand(N, V, seed=1) * 2
    targets = SparseTargets.from_logits(teacher_NV, 12, draws=8, generator=torch.Generator().manual_seed(2))
    loss = FusedLinearKDLoss(divergence=name, tail=None if form == "dense" else form, chunk_size=7)
    loss(hidden_ND, weight_VD, teacher_NV if form == "dense" else targets, LABELS).loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden_ND, weight_VD)]
    logits_NV = exact[0] @ exact[1].t()
    kd = expected_kd(name, form, logits_NV, teacher_NV, targets).mean()
    (0.5 * kd + 0.5 * reference.cross_entropy(logits_NV, LABELS).mean()).backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip((hidden_ND, weight_VD), exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert reference.error(mine.grad, theirs.grad) <= 1e-4


@pytest.mark.parametrize(("name", "form"), [f for f in FORMS if not f[0].startswith("tvd")])
@pytest.mark.filterwarnings("ignore:tail=")
def test_bfloat16_is_rounded_but_not_biased(name: str, form: str) -> None:
    """From bfloat16 logits: error within the rounding of the result, and its mean within four standard errors of 0.

    (tvd's gradient has the sign of q - p in it and jumps; the others are smooth.)
    """
    logits_NV = (rand(N, V) * 3).bfloat16().requires_grad_()
    teacher_NV = (rand(N, V, seed=1) * 2).bfloat16()
    targets = SparseTargets.from_logits(teacher_NV, 12, draws=8, generator=torch.Generator().manual_seed(2))
    loss = KDLoss(divergence=name, tail=None if form == "dense" else form)
    value = loss(logits_NV, teacher_NV if form == "dense" else targets, LABELS)
    value.backward()
    exact_NV = logits_NV.detach().double().requires_grad_()
    expected = expected_kd(name, form, exact_NV, teacher_NV, targets).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    assert logits_NV.grad is not None
    assert exact_NV.grad is not None
    difference = (logits_NV.grad.double() - exact_NV.grad) / exact_NV.grad.abs().max()
    assert reference.error(logits_NV.grad, exact_NV.grad) < 2.0**-8
    assert abs(float(difference.mean())) <= 4 * float(difference.std()) / difference.numel() ** 0.5
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "reverse_kl"])
def test_bfloat16_fused_is_not_biased(name: str) -> None:
    """The fused form rounds logits to bfloat16; over many rows the signed error of the gradient averages out."""
    rows = 512
    hidden_ND, weight_VD = (
        rand(rows, D).bfloat16().requires_grad_(),
        (rand(V, D, seed=3) / 2).bfloat16().requires_grad_(),
    )
    teacher_NV = rand(rows, V, seed=1) * 2
    labels_N = torch.randint(0, V, (rows,), generator=torch.Generator().manual_seed(4))
    targets = SparseTargets.from_logits(teacher_NV, 12, draws=8, generator=torch.Generator().manual_seed(2))
    loss = FusedLinearKDLoss(divergence=name, chunk_size=128)
    parts = loss(hidden_ND, weight_VD, targets, labels_N)
    parts.loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden_ND, weight_VD)]
    wide = FusedLinearKDLoss(divergence=name)(*exact, targets, labels_N)
    wide.loss.backward()
    for mine, theirs in zip((hidden_ND, weight_VD), exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        difference = mine.grad.double() - theirs.grad
        assert reference.error(mine.grad, theirs.grad) < 0.02
        # signed along the gradient: a bias would make it longer or shorter
        along = difference * theirs.grad.sign()
        assert abs(float(along.mean())) <= 5 * float(along.std()) / along.numel() ** 0.5
    torch.testing.assert_close(parts.loss.double(), wide.loss, rtol=2e-3, atol=0.0)


def test_cross_entropy_float32() -> None:
    assert reference.cross_entropy_error(rand(N, V) * 20, LABELS) <= 2e-6


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 11), spread=st.sampled_from([0.1, 1.0, 5.0]))
def test_buckets_bound_the_full_divergence_from_below(seed: int, k: int, spread: float) -> None:
    """Merging outcomes cannot raise a divergence; for the forward KL the rest is r KL(p given tail, q given tail)."""
    teacher_NV = spread * rand(3, 11, seed=seed).double()
    student_NV = spread * rand(3, 11, seed=seed + 1).double()
    labels_N = torch.zeros(3, dtype=torch.int64)
    targets = SparseTargets.from_logits(teacher_NV, k)
    for name in DIVERGENCES:
        loss = KDLoss(divergence=name)
        bucket, full = loss(student_NV, targets, labels_N), loss(student_NV, teacher_NV, labels_N)
        assert float(bucket) <= float(full) + 1e-6 * (1 + float(full))
    p_NV, q_NV = teacher_NV.softmax(-1), student_NV.softmax(-1)
    tail_NV = torch.ones_like(p_NV).scatter(-1, targets.ids_NE, 0.0)
    r_N, s_N = (p_NV * tail_NV).sum(-1), (q_NV * tail_NV).sum(-1)
    within_N = (torch.special.xlogy(p_NV, p_NV * s_N[:, None] / (q_NV * r_N[:, None].clamp_min(1e-300))) * tail_NV).sum(
        -1
    )
    rest = float(within_N.mean()) if k < 11 else 0.0
    full = float(KDLoss()(student_NV, teacher_NV, labels_N))
    assert float(KDLoss(tail="bucket")(student_NV, targets, labels_N)) + rest == pytest.approx(full, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("k", [0, 6])
def test_estimates_are_unbiased(k: int) -> None:
    """10^4 redraws of one row: mean value and mean gradient are the full-vocabulary ones, within 4.5 standard errors.

    At equality the estimate is negative as often as not, which a clamp would turn into a bias.
    """
    redraws, small = 10_000, 23
    teacher_V, student_V = 2 * rand(small, seed=5), rand(small, seed=6)
    targets = SparseTargets.from_logits(
        teacher_V.expand(redraws, small), k, draws=5, generator=torch.Generator().manual_seed(7)
    )
    labels_N = torch.zeros(redraws, dtype=torch.int64)
    for logits_V in (student_V, teacher_V):
        logits_NV = logits_V.expand(redraws, small).clone().requires_grad_()
        loss = KDLoss()
        loss(logits_NV, targets, labels_N, 1).backward()
        exact_V = logits_V.double().requires_grad_()
        p_V, q_V = teacher_V.double().softmax(-1), exact_V.log_softmax(-1)
        (p_V * (p_V.log() - q_V)).sum().backward()  # type: ignore[no-untyped-call]
        assert logits_NV.grad is not None
        assert exact_V.grad is not None
        sample_NV = logits_NV.grad.double()
        spread_V = sample_NV.std(0) / redraws**0.5
        assert ((sample_NV.mean(0) - exact_V.grad).abs() <= 4.5 * spread_V + 1e-7).all()
    # values: 200 groups of 50 rows, compared at the student
    grouped = torch.stack([loss(student_V.expand(50, small), targets.rows(slice(i, i + 50)), labels_N[:50])
                           for i in range(0, redraws, 50)]).double()  # fmt: skip
    full = reference.forward_kl(teacher_V.double().softmax(-1), student_V.double().softmax(-1))
    assert abs(float(grouped.mean() - full)) <= 4.5 * float(grouped.std()) / len(grouped) ** 0.5
    at_equality = torch.stack([loss(teacher_V[None], targets.rows(slice(i, i + 1)), labels_N[:1]) for i in range(200)])
    assert 0.2 < float((at_equality < 0).float().mean()) < 0.8
