"""Every divergence on sparse rows, with every tail policy, from hidden states and from logits, against float64."""

from __future__ import annotations

import warnings
from dataclasses import replace

import losses_reference as reference
import pytest
import torch
from torch import Tensor

from stages.losses import DIVERGENCES, TAIL_POLICIES, FusedLinearKDLoss, KDLoss, MaskedCrossEntropy, SparseTargets
from stages.losses.engine.chunk import BLOCK_ELEMENTS

N, D, V = 13, 8, 29
ADVICE = "ignore:tail=|at temperature"
LINEAR_ONLY = ("sampled", "renormalize", "residual_to_label")


def legal(divergence: str, policy: str) -> bool:
    return divergence == "forward_kl" or policy not in LINEAR_ONLY


COMBINATIONS = [(d, p) for d in reference.MEASURES for p in TAIL_POLICIES if legal(d, p)]


def make(seed: int = 0, draws: int = 6) -> tuple[Tensor, Tensor, SparseTargets, Tensor]:
    """hidden, weight, rows, labels; two rows ignored, some labels in the head and some outside."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    teacher_NV = 2 * torch.randn(N, V, generator=generator)
    targets = SparseTargets.from_logits(teacher_NV, 5, draws=draws, generator=generator, temperatures=(2.0, 0.5))
    labels_N = torch.randint(0, V, (N,), generator=generator)
    labels_N[: N // 2] = targets.ids_NE[: N // 2, 1]
    labels_N[[2, 9]] = reference.IGNORE
    return hidden_ND, weight_VD, targets, labels_N


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("divergence", "policy"), COMBINATIONS)
@pytest.mark.filterwarnings(ADVICE)
def test_fused_value_and_gradients(divergence: str, policy: str, temperature: float) -> None:
    hidden_ND, weight_VD, targets, labels_N = make()
    hidden_ND.requires_grad_()
    weight_VD.requires_grad_()
    loss = FusedLinearKDLoss(temperature=temperature, chunk_size=4, divergence=divergence, tail=policy, kd_ratio=0.7)
    parts = loss(hidden_ND, weight_VD, targets, labels_N, 17)
    found = torch.autograd.grad(parts.loss, [hidden_ND, weight_VD])

    logits_NV = hidden_ND @ weight_VD.t()
    kd = reference.mean_over(
        reference.sparse_kd(divergence, logits_NV, targets, labels_N, policy, temperature), labels_N, 17
    )
    ce = reference.mean_over(reference.cross_entropy(logits_NV, labels_N), labels_N, 17)
    expected = torch.autograd.grad(0.7 * kd + 0.3 * ce, [hidden_ND, weight_VD])
    torch.testing.assert_close(parts, type(parts)(0.7 * kd + 0.3 * ce, kd, ce), rtol=1e-9, atol=1e-12)
    assert not parts.kd.requires_grad
    assert not parts.ce.requires_grad
    for mine, theirs in zip(found, expected, strict=True):
        # the pass over the logits that p_hat's rounded sum would need is left out
        assert reference.error(mine, theirs) < (1e-7 if policy in LINEAR_ONLY else 1e-9)


@pytest.mark.parametrize(("divergence", "policy"), COMBINATIONS)
@pytest.mark.filterwarnings(ADVICE)
def test_from_logits_with_scales(divergence: str, policy: str) -> None:
    hidden_ND, weight_VD, targets, labels_N = make(1)
    logits_NV = (hidden_ND @ weight_VD.t()).requires_grad_()
    # teacher temperature T / target_logits_scale = 1, student scale 1.4 / 0.5
    loss = KDLoss(temperature=0.5, chunk_size=3, divergence=divergence, tail=policy, logits_scale=1.4,
                  target_logits_scale=0.5)  # fmt: skip
    value = loss(logits_NV, targets, labels_N)
    (found,) = torch.autograd.grad(value, [logits_NV])
    rows_N = reference.sparse_kd(divergence, logits_NV, targets, labels_N, policy, 0.5, (1.4, 0.5))
    expected = reference.mean_over(rows_N, labels_N)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    assert reference.error(found, torch.autograd.grad(expected, [logits_NV])[0]) < 1e-9
    assert found[labels_N == reference.IGNORE].eq(0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("ratio", "weights"), [(0.0, None), (1.0, None), (0.5, (2.0, 0.25)), (0.5, (1.5, 0.0))])
@pytest.mark.filterwarnings(ADVICE)
def test_mixing(ratio: float, weights: tuple[float, float] | None, temperature: float) -> None:
    """kd_ratio 0 reads no targets, 1 forms no cross-entropy; NeMo-Aligner's two weights instead of one ratio."""
    hidden_ND, weight_VD, targets, labels_N = make(2)
    hidden_ND.requires_grad_()
    kd_weight, ce_weight = weights or (ratio, 1 - ratio)
    loss = FusedLinearKDLoss(
        temperature=temperature,
        divergence="jsd",
        kd_ratio=ratio,
        kd_loss_weight=weights and weights[0],
        sft_loss_weight=weights and weights[1],
    )
    # rows without a head cannot be prepared for this divergence
    unfit = SparseTargets.from_logits(torch.zeros(N, V), 0, draws=5)
    parts = loss(hidden_ND, weight_VD, targets if kd_weight else None, labels_N)
    if not kd_weight:
        assert loss(hidden_ND, weight_VD, unfit, labels_N).loss == parts.loss
    logits_NV = hidden_ND @ weight_VD.t()
    kd = reference.mean_over(reference.sparse_kd("jsd", logits_NV, targets, labels_N, "bucket", temperature), labels_N)
    ce = reference.mean_over(reference.cross_entropy(logits_NV, labels_N), labels_N)
    expected = kd_weight * kd + ce_weight * ce
    torch.testing.assert_close(parts.loss, expected, rtol=1e-9, atol=1e-12)
    found, theirs = (torch.autograd.grad(value, [hidden_ND])[0] for value in (parts.loss, expected))
    assert reference.error(found, theirs) < 1e-9
    assert parts.kd == (pytest.approx(float(kd.detach())) if kd_weight else 0.0)
    free = ce_weight or temperature == 1.0
    assert parts.ce == (pytest.approx(float(ce.detach())) if free else 0.0)


def test_kd_ratio_of_the_call_and_its_alias() -> None:
    hidden_ND, weight_VD, targets, labels_N = make(3)
    scheduled = FusedLinearKDLoss(kd_ratio=0.9)(hidden_ND, weight_VD, targets, labels_N, kd_ratio=0.2)
    assert torch.equal(scheduled.loss, FusedLinearKDLoss(kd_coef=0.2)(hidden_ND, weight_VD, targets, labels_N).loss)
    torch.testing.assert_close(scheduled.loss, 0.2 * scheduled.kd + 0.8 * scheduled.ce)
    with pytest.raises(ValueError, match="two fixed weights"):
        FusedLinearKDLoss(kd_loss_weight=1.0)(hidden_ND, weight_VD, targets, labels_N, kd_ratio=0.2)


def test_rows_whose_samples_are_missing() -> None:
    """p_hat then sums to 1 - r, and the gradient is that of it: no shortcut that takes the sum for one."""
    hidden_ND, weight_VD, targets, labels_N = make(7)
    targets.count_NE[3] = 0
    logits_NV = (hidden_ND @ weight_VD.t()).requires_grad_()
    for scale in (1.0, 0.7):
        value = KDLoss(tail="sampled", logits_scale=scale)(logits_NV, targets, labels_N, 1)
        rows_N = reference.sparse_kd("forward_kl", logits_NV, targets, labels_N, "sampled", 1.0, (scale, 1.0))
        expected = reference.mean_over(rows_N, labels_N, 1)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
        found, theirs = (torch.autograd.grad(x, [logits_NV])[0] for x in (value, expected))
        assert reference.error(found, theirs) < 1e-9


@pytest.mark.filterwarnings(ADVICE)
def test_default_tail_is_sampled_where_that_is_exact() -> None:
    hidden_ND, weight_VD, targets, labels_N = make(4)

    def value(targets: SparseTargets, tail: str | None, **fields: float | str) -> Tensor:
        return FusedLinearKDLoss(tail=tail, kd_ratio=1.0, **fields)(hidden_ND, weight_VD, targets, labels_N).loss  # type: ignore[arg-type, no-any-return]

    assert value(targets, None) == value(targets, "sampled") != value(targets, "bucket")
    without = make(4, draws=0)[2]
    assert value(without, None) == value(without, "bucket")
    assert value(targets, None, temperature=2.0) == value(targets, "bucket", temperature=2.0)
    assert value(targets, None, divergence="jsd") == value(targets, "bucket", divergence="jsd")


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "forward_kl"])
@pytest.mark.parametrize("policy", LINEAR_ONLY)
def test_non_linear_divergences_refuse_estimates(divergence: str, policy: str) -> None:
    for loss in (KDLoss, FusedLinearKDLoss):
        with pytest.raises(ValueError, match="linear"):
            loss(divergence=divergence, tail=policy)


def test_rows_that_lack_what_a_policy_needs() -> None:
    hidden_ND, weight_VD, targets, labels_N = make(5)
    logits_NV = hidden_ND @ weight_VD.t()
    only_samples = SparseTargets.from_logits(torch.randn(N, V), 0, draws=5)
    for tail in ("bucket", "renormalize_both"):
        with pytest.raises(ValueError, match=r"row \d+ has no exact head"):
            KDLoss(tail=tail)(logits_NV, only_samples, labels_N)
    with pytest.raises(ValueError, match="no exact head"):
        KDLoss(divergence="jsd")(logits_NV, only_samples, labels_N)
    with pytest.raises(ValueError, match="draws is 0"):
        KDLoss(tail="sampled")(logits_NV, make(5, draws=0)[2], labels_N)
    with pytest.raises(ValueError, match=r"temperature 3: .*stored besides 1: 0\.5, 2\).*target\.temperatures"):
        KDLoss(temperature=3.0)(logits_NV, targets, labels_N)
    with pytest.raises(ValueError, match=r"stored besides 1: none"):
        KDLoss(target_logits_scale=0.5)(logits_NV, SparseTargets.from_logits(torch.randn(N, V), 4), labels_N)
    with pytest.raises(ValueError, match="unknown; known are"):
        KDLoss(tail="sampeld")
    with pytest.raises(ValueError, match="no teacher"):
        FusedLinearKDLoss()(hidden_ND, weight_VD, None, labels_N)
    with pytest.raises(ValueError, match="a dense teacher has no tail"):
        KDLoss(tail="bucket")(logits_NV, logits_NV, labels_N)


def test_a_temperature_is_stored_or_it_is_not() -> None:
    """One that is near to a stored one has another tail: only what rounding does to a number is forgiven."""
    hidden_ND, weight_VD, targets, labels_N = make()
    logits_NV = hidden_ND @ weight_VD.t()
    exact = KDLoss(temperature=2.0, divergence="jsd")(logits_NV, targets, labels_N)
    rounded = KDLoss(temperature=2.0 * (1 + 1e-8), divergence="jsd")(logits_NV, targets, labels_N)
    torch.testing.assert_close(exact, rounded, rtol=1e-6, atol=0.0)
    for near in (2.2, 1.9, 2.001, 0.55):
        with pytest.raises(ValueError, match=rf"teacher temperature {near:g}: the rows hold no tail_logit for it"):
            KDLoss(temperature=near, divergence="jsd")(logits_NV, targets, labels_N)


@pytest.mark.parametrize("off", [3e-6, 3e-5])
def test_rows_whose_mass_is_not_one(off: float) -> None:
    """The gradient is (sum p_hat) q - p_hat: where stored rows add up to one, and only there, q - p_hat is the same."""
    hidden_ND, weight_VD, targets, labels_N = make()
    shifted = replace(targets, logprob_NE=targets.logprob_NE + off, tail_logit_N=targets.tail_logit_N + off)
    logits_NV = (hidden_ND @ weight_VD.t()).requires_grad_()
    found = torch.autograd.grad(KDLoss(reduction="sum")(logits_NV, shifted, labels_N), [logits_NV])[0]
    kd = reference.mean_over(reference.sparse_kd("forward_kl", logits_NV, shifted, labels_N, "sampled"), labels_N, 1)
    (expected,) = torch.autograd.grad(kd, [logits_NV])
    assert found.sum(-1).abs().max() < off / 1000  # a row of q - p_hat adds up to 1 less its mass
    assert reference.error(found, expected) < off / 1000


def test_advice() -> None:
    hidden_ND, weight_VD, targets, labels_N = make(6)
    for tail in ("renormalize", "residual_to_label"):
        with pytest.warns(UserWarning, match="biased"):
            KDLoss(tail=tail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KDLoss(tail="sampled")
        KDLoss(tail="bucket")
    flat = SparseTargets.from_logits(torch.zeros(N, V), 3, temperatures=(2.0,))
    with pytest.warns(UserWarning, match=r"mean tail mass is 0\.90"):
        KDLoss(temperature=2.0)(hidden_ND @ weight_VD.t(), flat, labels_N)
    with pytest.warns(UserWarning, match="variance grows"):
        KDLoss(temperature=0.5, tail="sampled")(hidden_ND @ weight_VD.t(), targets, labels_N)


def test_more_sure_rows_than_a_block_holds() -> None:
    """Float32 holds 1 - 2.6e-7 with 8% of error in that difference; the loss, which is that difference, has 1e-5."""
    wide = 1252
    rows = 2 * BLOCK_ELEMENTS // wide + 22
    logits_NV, labels_N = torch.zeros(rows, wide), torch.arange(rows)
    logits_NV[labels_N, labels_N] = 22.3
    expected = float(reference.cross_entropy(logits_NV.double(), labels_N).mean())
    assert float(MaskedCrossEntropy(reduction="mean")(logits_NV, labels_N)) == pytest.approx(expected, rel=1e-5)
