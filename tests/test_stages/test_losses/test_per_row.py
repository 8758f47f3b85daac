"""reduction="none": a loss per row, in value and gradient, in every form. Cut vocabularies are in losses_worker.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import losses_reference as reference
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.losses import (
    FusedLinearCrossEntropy,
    FusedLinearKDLoss,
    KDLoss,
    MaskedCrossEntropy,
    SparseTargets,
    TeacherHead,
    TEParallelCrossEntropy,
    build_loss_module,
)

N, D, V = 9, 5, 17
LABELS = torch.tensor([1, 2, -100, 4, 5, -100, 7, 8, 16])
INTO_ROWS = torch.linspace(-1.0, 2.0, N, dtype=torch.float64)  # what backward is given for each row


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEACHER = 2 * rand(N, V, seed=1)
ROWS = SparseTargets.from_logits(TEACHER, 5, draws=4, generator=torch.Generator().manual_seed(2), temperatures=(2.0,))
HEAD = TeacherHead(hidden_ND=rand(N, 3, seed=3), weight_VD=rand(V, 3, seed=4))


def logits_of(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
    return 2.5 * torch.tanh((hidden_ND @ weight_VD.t() + bias_V) / 2.5)


Call = Callable[..., Tensor]  # leaves and the keyword `total`


def from_logits(kind: type[nn.Module], fields: dict[str, Any], given: tuple[Any, ...], reduction: str) -> Call:
    loss = kind(**fields, reduction=reduction)
    return lambda logits_NV, total=None: loss(logits_NV, *given, total)


def fused(targets: SparseTargets | TeacherHead, fields: dict[str, Any], reduction: str) -> Call:
    loss = FusedLinearKDLoss(**fields, chunk_size=4, softcap=2.5, kd_ratio=0.6, reduction=reduction)

    def call(*leaves: Tensor, total: float | None = None) -> Tensor:
        parts = loss(leaves[0], leaves[1], targets, LABELS, total, bias_V=leaves[2])
        torch.testing.assert_close(parts.loss, 0.6 * parts.kd + 0.4 * parts.ce)
        return parts.loss  # type: ignore[no-any-return]

    return call


def plain_cross_entropy(logits_NV: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV, LABELS, reduction="none")


LOGIT_FORMS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[Any, ...], Callable[[Tensor], Tensor]]] = {
    "dense": (
        KDLoss,
        {"divergence": "jsd", "temperature": 1.5},
        (TEACHER, LABELS),
        lambda x: reference.dense_kd("jsd", x, TEACHER, 1.5),
    ),
    "dense, chunked": (
        KDLoss,
        {"chunk_size": 2},
        (TEACHER, LABELS),
        lambda x: reference.dense_kd("forward_kl", x, TEACHER),
    ),
    "bucket": (
        KDLoss,
        {"divergence": "tvd"},
        (ROWS, LABELS),
        lambda x: reference.sparse_kd("tvd", x, ROWS, LABELS, "bucket"),
    ),
    "sampled": (
        KDLoss,
        {"chunk_size": 3},
        (ROWS, LABELS),
        lambda x: reference.sparse_kd("forward_kl", x, ROWS, LABELS, "sampled"),
    ),
    "masked": (MaskedCrossEntropy, {}, (LABELS, None), plain_cross_entropy),
    "parallel": (TEParallelCrossEntropy, {"chunk_size": 2}, (LABELS, None), plain_cross_entropy),
}


def check(call: Call, summed: Call, leaves: list[Tensor], expected_N: Tensor) -> None:
    """Against the definition: values, their sum, a total, and gradients of rows that weigh differently, twice."""
    expected_N = expected_N.masked_fill(LABELS == -100, 0.0)
    value_N = call(*leaves)
    torch.testing.assert_close(value_N, expected_N, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(value_N.sum(), summed(*leaves))
    torch.testing.assert_close(call(*leaves, total=7), value_N / 7)
    wanted = torch.autograd.grad(expected_N, leaves, INTO_ROWS)
    for keep in (True, False):
        found = torch.autograd.grad(value_N, leaves, INTO_ROWS, retain_graph=keep)
        for mine, theirs in zip(found, wanted, strict=True):
            assert reference.error(mine, theirs) < 1e-6


@pytest.mark.parametrize("form", LOGIT_FORMS)
def test_from_logits(form: str) -> None:
    *how, expected = LOGIT_FORMS[form]
    logits_NV = rand(N, V).requires_grad_()
    check(from_logits(*how, "none"), from_logits(*how, "sum"), [logits_NV], expected(logits_NV))


@pytest.mark.parametrize("form", ["bucket", "bucket, T=2", "sampled", "dense"])
def test_fused(form: str) -> None:
    temperature = 2.0 if form == "bucket, T=2" else 1.0
    name = "forward_kl" if form == "sampled" else "jsd(0.1)"
    targets = HEAD if form == "dense" else ROWS
    leaves = [rand(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(N, D), (V, D), (V,)], 5)]
    logits_NV = logits_of(*leaves)
    if form == "dense":
        kd_N = reference.dense_kd(name, logits_NV, HEAD.hidden_ND @ HEAD.weight_VD.t())
    else:
        kd_N = reference.sparse_kd(name, logits_NV, ROWS, LABELS, form.split(",")[0], temperature)
    fields = {"divergence": name, "temperature": temperature}
    expected_N = 0.6 * kd_N + 0.4 * plain_cross_entropy(logits_NV)
    check(fused(targets, fields, "none"), fused(targets, fields, "sum"), leaves, expected_N)


def test_fused_cross_entropy() -> None:
    """Of hidden states [batch, time, D]: the losses have the labels' shape."""
    leaves = [rand(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(3, 3, D), (V, D), (V,)], 5)]
    loss = FusedLinearCrossEntropy(logit_softcapping=2.5, reduction="none", chunk_size=2)
    value = loss(leaves[0], LABELS.view(3, 3), leaves[1], bias=leaves[2])
    assert value.shape == (3, 3)
    logits_NV = logits_of(leaves[0].view(N, D), *leaves[1:])
    expected_N = plain_cross_entropy(logits_NV)
    torch.testing.assert_close(value.flatten(), expected_N)
    into = [INTO_ROWS.view(3, 3), INTO_ROWS]
    found, wanted = (
        torch.autograd.grad(*given) for given in zip((value, expected_N), (leaves, leaves), into, strict=True)
    )
    for mine, theirs in zip(found, wanted, strict=True):
        assert reference.error(mine, theirs) < 1e-9


@pytest.mark.parametrize("name", ["KDLoss", "FusedLinearKDLoss", "MaskedCrossEntropy", "FusedLinearCrossEntropy"])
def test_rows_in_half_precision_under_a_loss_scale(name: str) -> None:
    """float16 logits and heads, as torch.amp.GradScaler leaves them: each gradient in its own precision."""
    loss, scale_N = build_loss_module(name, reduction="none"), 4096.0 * INTO_ROWS.float()
    logits_NV, hidden_ND, weight_VD = rand(N, V), rand(N, D), rand(V, D, seed=1)

    def rows(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        leaves = [value.to(torch.float16).to(dtype).requires_grad_() for value in (logits_NV, hidden_ND, weight_VD)]
        calls: dict[str, Callable[[], Tensor]] = {
            "KDLoss": lambda: loss(leaves[0], ROWS, LABELS),
            "FusedLinearKDLoss": lambda: loss(leaves[1], leaves[2], ROWS, LABELS).loss,
            "MaskedCrossEntropy": lambda: loss(leaves[0], LABELS),
            "FusedLinearCrossEntropy": lambda: loss(leaves[1], LABELS, leaves[2]),
        }
        return calls[name](), leaves[1:] if name.startswith("Fused") else leaves[:1]

    (half_N, half), (exact_N, exact) = rows(torch.float16), rows(torch.float64)
    assert half_N.dtype == torch.float32
    wanted = torch.autograd.grad(exact_N, exact, scale_N.double())
    for keep in (True, False):
        for mine, theirs in zip(torch.autograd.grad(half_N, half, scale_N, retain_graph=keep), wanted, strict=True):
            assert mine.dtype == torch.float16
            assert reference.error(mine, theirs) < 4e-3


def test_nothing_to_learn_and_second_derivatives() -> None:
    hidden_ND, weight_VD = rand(N, D).requires_grad_(), rand(V, D).requires_grad_()
    loss = FusedLinearKDLoss(reduction="none")
    nothing = loss(hidden_ND, weight_VD, ROWS, torch.full((N,), -100))
    nothing.loss.sum().backward()
    assert nothing.loss.tolist() == nothing.kd.tolist() == [0.0] * N
    assert weight_VD.grad is not None
    assert not weight_VD.grad.any()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(hidden_ND, weight_VD, ROWS, LABELS).loss.sum(), [hidden_ND], create_graph=True)
    with torch.no_grad():
        assert loss(hidden_ND, weight_VD, ROWS, LABELS).loss.shape == (N,)


def test_memory_of_the_fused_form_is_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pass makes logits for more rows than chunk_size at once."""
    sizes: list[int] = []
    product = torch.mm

    def counted(*args: Tensor, **kwargs: Tensor) -> Tensor:
        result = product(*args, **kwargs)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch, "mm", counted)
    hidden_ND, weight_VD = rand(64, D).requires_grad_(), rand(1000, D).requires_grad_()
    loss = FusedLinearCrossEntropy(chunk_size=4, reduction="none")
    loss(hidden_ND, torch.arange(64), weight_VD).sum().backward()
    assert max(sizes) == 4 * 1000
