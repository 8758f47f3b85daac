"""Checks of DTensors in every placement, against the whole tensors: losses_worker.py runs them in several processes."""

from __future__ import annotations

from functools import partial

import losses_reference as reference
import torch
from losses_material import LABELS, D, N, V, close, expect_error, rand, rows
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from stages.losses import (
    FusedLinearCrossEntropy,
    FusedLinearKDLoss,
    KDLoss,
    MaskedCrossEntropy,
    TeacherHead,
    TEParallelCrossEntropy,
)

PLACEMENTS: dict[str, Placement] = {"whole": Replicate(), "sums": Partial(), "dim0": Shard(0), "dim1": Shard(1)}


def place(full: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """A leaf; the parts of partial sums differ on every process."""
    if placement.is_partial():
        share = 1.0 + 0.5 * (mesh.size() - 1) if mesh.get_local_rank() == 0 else -0.5
        return DTensor.from_local(full.detach() * share, mesh, [placement]).requires_grad_()
    return distribute_tensor(full.detach(), mesh, [placement]).requires_grad_()


def check_gradient(leaf: Tensor, whole: Tensor) -> None:
    assert isinstance(leaf.grad, DTensor)
    close(leaf.grad.full_tensor(), whole, 1e-7)


def check_placed_logits(mesh: DeviceMesh, how: str) -> None:
    """The whole tensor's value and gradient wherever the student's logits lie, by row and in total."""
    full, teacher = (rand(N, V) * 3).requires_grad_(), rand(N, V, seed=1) * 2
    for form in ("dense", "bucket", "cross-entropy"):
        if form == "cross-entropy":
            row_N = reference.cross_entropy(full, LABELS)
        elif form == "dense":
            row_N = reference.dense_kd("jsd", full, teacher)
        else:
            row_N = reference.sparse_kd("jsd", full, rows(), LABELS, form)
        row_N = row_N.masked_fill(LABELS == -100, 0.0)
        weight_N = 1.0 + rand(N, seed=9).abs()
        (wanted,) = torch.autograd.grad((row_N * weight_N).sum(), [full], retain_graph=True)
        for given in PLACEMENTS.values() if form == "dense" else [Replicate()]:
            logits, labels = place(full, mesh, PLACEMENTS[how]), distribute_tensor(LABELS, mesh, [Shard(0)])
            if how == "whole" and not given.is_replicate():  # the other way round: a teacher that is cut alone
                expect_error("cut both alike", partial(KDLoss(), logits, place(teacher, mesh, given), labels))
                continue
            if form == "cross-entropy":
                found_N = TEParallelCrossEntropy(reduction="none", tp_group=mesh.get_group())(logits, labels)
            else:
                targets = place(teacher, mesh, given) if form == "dense" else rows()
                found_N = KDLoss(divergence="jsd", reduction="none")(logits, targets, labels)
                close(KDLoss(divergence="jsd")(logits, targets, LABELS, 7), row_N.sum() / 7)
            close(found_N, row_N)
            (found_N * weight_N).sum().backward()
            check_gradient(logits, wanted)


def check_placed_sequences(mesh: DeviceMesh) -> None:
    """Logits [batch, time, V] cut by batch or by time, with labels and mask cut in another way."""
    full, labels, mask = rand(2, 3, V).requires_grad_(), LABELS[2:8].view(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
    masked_N = labels.masked_fill(mask == 0, -100).flatten()
    expected = reference.cross_entropy(full.view(6, V), masked_N).view(2, 3)
    (wanted,) = torch.autograd.grad(expected.sum(), [full], retain_graph=True)
    for placement in (Shard(0), Shard(1), Shard(2), Partial()):
        logits = place(full, mesh, placement)
        found = MaskedCrossEntropy(reduction="none")(
            logits, distribute_tensor(labels, mesh, [Shard(1)]), distribute_tensor(mask, mesh, [Shard(0)])
        )
        close(found, expected)
        found.sum().backward()
        check_gradient(logits, wanted)
    hidden, weight = rand(2, 3, D), rand(V, D, seed=1)
    expected = reference.cross_entropy(hidden.view(6, D) @ weight.t(), masked_N).view(2, 3)
    fused = FusedLinearCrossEntropy(reduction="none")
    close(fused(place(hidden, mesh, Shard(1)), masked_N.view(2, 3), place(weight, mesh, Shard(0))), expected)


def check_placed_heads(mesh: DeviceMesh, how: str) -> None:
    """Fused forms: hidden states, head, bias and a teacher's head, each placed in every way."""
    whole = [rand(*s, seed=i).requires_grad_() for i, s in enumerate([(N, D), (V, D), (V,)])]
    logits = whole[0] @ whole[1].t() + whole[2]
    head = TeacherHead(hidden_ND=rand(N, 4, seed=5), weight_VD=rand(V, 4, seed=6))
    kd_N = reference.dense_kd("jsd", logits, head.hidden_ND @ head.weight_VD.t())
    row_N = (0.5 * kd_N + 0.5 * reference.cross_entropy(logits, LABELS)).masked_fill(LABELS == -100, 0.0)
    weight_N = 1.0 + rand(N, seed=9).abs()
    wanted = torch.autograd.grad((row_N * weight_N).sum(), whole)
    for hidden in PLACEMENTS.values():
        leaves = [place(x, mesh, y) for x, y in zip(whole, (hidden, PLACEMENTS[how], Replicate()), strict=True)]
        if how != "whole":
            leaves[2] = place(whole[2], mesh, Partial() if hidden.is_partial() else Shard(0))
        cut = {
            "hidden_ND": place(head.hidden_ND, mesh, hidden),
            "weight_VD": place(head.weight_VD, mesh, PLACEMENTS[how]),
        }
        loss = FusedLinearKDLoss(divergence="jsd", chunk_size=4, reduction="none")
        parts = loss(leaves[0], leaves[1], TeacherHead(**cut), LABELS, bias_V=leaves[2])
        close(parts.loss, row_N, 1e-7)
        (parts.loss * weight_N).sum().backward()
        for leaf, gradient in zip(leaves, wanted, strict=True):
            check_gradient(leaf, gradient)
        ce = FusedLinearCrossEntropy()(leaves[0], LABELS, leaves[1], bias=leaves[2])
        close(ce, reference.cross_entropy(logits, LABELS).sum(), 1e-7)


def check_two_dimensions(mesh: DeviceMesh) -> None:
    """A mesh of two dimensions: cut over one of them it is as ever, cut over both it is refused by name."""
    full = rand(N, V).requires_grad_()
    expected = reference.mean_over(reference.cross_entropy(full, LABELS), LABELS)
    for placements in ([Replicate(), Shard(1)], [Shard(0), Replicate()], [Partial(), Replicate()]):
        logits = distribute_tensor(full.detach(), mesh, placements)
        close(MaskedCrossEntropy(reduction="mean")(logits, LABELS), expected)
    both = distribute_tensor(full.detach(), mesh, [Shard(0), Shard(1)])
    told = r"placements \[Shard\(dim=0\), Shard\(dim=1\)\], cut over 2 dimensions of its mesh"
    for loss in (MaskedCrossEntropy(), TEParallelCrossEntropy()):
        expect_error(told, partial(loss, both, LABELS))
    expect_error(told, lambda: KDLoss()(full.detach(), both, LABELS))
    head = distribute_tensor(rand(V, D), mesh, [Shard(0), Shard(1)])
    expect_error("the head is a DTensor", lambda: FusedLinearCrossEntropy()(rand(N, D), LABELS, head))
    student = distribute_tensor(full.detach(), mesh, [Replicate(), Shard(1)])
    teacher = distribute_tensor(full.detach(), mesh, [Shard(1), Replicate()])
    expect_error("cut over other processes", lambda: KDLoss()(student, teacher, LABELS))
