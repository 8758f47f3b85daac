"""One process of the tensor-parallel and FSDP2 tests: `main(rank, world, directory)`, which warm_process.py calls.

Runs every case with gloo and writes RANK.json into the directory: case name -> null, or the traceback. All processes
start from the same seeds and hold the unsharded numbers, so each compares its own part with the float64 reference.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import losses_reference as reference
import torch
import torch.distributed as dist
from losses_material import LABELS, D, N, V, close, expect_error, part, rand, rows, split
from losses_placements import (
    PLACEMENTS,
    check_placed_heads,
    check_placed_logits,
    check_placed_sequences,
    check_two_dimensions,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from stages.losses import (
    FusedLinearCrossEntropy,
    FusedLinearKDLoss,
    KDLoss,
    LossParts,
    MaskedCrossEntropy,
    SparseTargets,
    TeacherHead,
    TEParallelCrossEntropy,
)

FACTOR = 2.5  # on the loss, before backward
NAMES = ["forward_kl", "reverse_kl", "jsd(0.1)", "skew_forward_kl", "skew_reverse_kl", "mixed", "tvd"]


def check_logits(mesh: DeviceMesh, name: str, form: str, how: str) -> None:
    """KDLoss on sharded logits: an explicit group and uneven plain shards, or DTensors."""
    full = (rand(N, V) * 3).requires_grad_()
    teacher = rand(N, V, seed=1) * 2
    kd = (
        reference.dense_kd(name, full, teacher, 1.5)
        if form == "dense"
        else reference.sparse_kd(name, full, rows(), LABELS, form)
    )
    expected = reference.mean_over(kd, LABELS, 21)
    (gradient,) = torch.autograd.grad(expected, [full])
    tail = None if form == "dense" else form
    fields = {"divergence": name, "tail": tail, "temperature": 1.5 if form == "dense" else 1.0, "chunk_size": 4}
    if how == "group":
        local = part(full.detach(), mesh, -1).requires_grad_()
        given: Tensor | SparseTargets = part(teacher, mesh, -1) if form == "dense" else rows()
        loss = KDLoss(tp_group=mesh.get_group(), **fields)(local, given, LABELS, 21)  # type: ignore[arg-type]
        (FACTOR * loss).backward()
        assert local.grad is not None
        close(local.grad, FACTOR * part(gradient, mesh, -1))
        if form == "dense":  # a teacher given whole is cut to the student's shard
            close(KDLoss(tp_group=mesh.get_group(), **fields)(local, teacher, LABELS, 21), expected)  # type: ignore[arg-type]
    else:
        sharded = distribute_tensor(full.detach(), mesh, [Shard(1)]).requires_grad_()
        given = distribute_tensor(teacher, mesh, [Shard(1)]) if form == "dense" else rows()
        labels = distribute_tensor(LABELS, mesh, [Replicate()])
        loss = KDLoss(**fields)(sharded, given, labels, 21)  # type: ignore[arg-type]
        (FACTOR * loss).backward()
        assert isinstance(sharded.grad, DTensor)
        close(sharded.grad.full_tensor(), FACTOR * gradient)
    close(loss, expected)


def check_fused(
    mesh: DeviceMesh, name: str, form: str, how: str, temperature: float = 1.0, softcap: float | None = None
) -> None:
    """The fused form with a sharded weight: value, gradient of hidden, of the weight and of the bias."""
    hidden, weight, bias = ((rand(*s, seed=i)).requires_grad_() for i, s in enumerate([(N, D), (V, D), (V,)]))
    logits = hidden @ weight.t() + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    head = TeacherHead(hidden_ND=rand(N, 4, seed=5), weight_VD=rand(V, 4, seed=6))
    if form == "dense":
        kd = reference.dense_kd(name, logits, head.hidden_ND @ head.weight_VD.t(), temperature)
    else:
        kd = reference.sparse_kd(name, logits, rows(), LABELS, form, temperature)
    expected = 0.6 * reference.mean_over(kd, LABELS, 9) + 0.4 * reference.mean_over(
        reference.cross_entropy(logits, LABELS), LABELS, 9
    )
    wanted = torch.autograd.grad(FACTOR * expected, [hidden, weight, bias])
    tail = None if form == "dense" else form
    group = mesh.get_group() if how == "group" else None
    fields = {"divergence": name, "tail": tail, "temperature": temperature, "softcap": softcap}
    loss = FusedLinearKDLoss(kd_ratio=0.6, chunk_size=4, tp_group=group, **fields)  # type: ignore[arg-type]
    if how == "group":
        inputs = [hidden.detach(), part(weight.detach(), mesh, 0), part(bias.detach(), mesh, 0)]
        teacher_weight = part(head.weight_VD, mesh, 0)
    else:
        inputs = [distribute_tensor(hidden.detach(), mesh, [Shard(0)])]
        inputs += [distribute_tensor(x.detach(), mesh, [Shard(0)]) for x in (weight, bias)]
        teacher_weight = distribute_tensor(head.weight_VD, mesh, [Shard(0)])
    inputs = [x.requires_grad_() for x in inputs]
    teacher = TeacherHead(hidden_ND=head.hidden_ND, weight_VD=teacher_weight) if form == "dense" else rows()
    parts = loss(inputs[0], inputs[1], teacher, LABELS, 9, bias_V=inputs[2])
    (FACTOR * parts.loss).backward()
    # unit_mass leaves a rounded sum out; collectives add a multiplication, which is exact in it
    close(parts.loss, expected, 1e-7)
    for x, whole in zip(inputs, wanted, strict=True):
        assert x.grad is not None
        if isinstance(x.grad, DTensor):
            close(x.grad.full_tensor(), whole, 1e-7)
        else:
            close(x.grad, whole if x is inputs[0] else part(whole, mesh, 0), 1e-7)


def check_cross_entropy(mesh: DeviceMesh) -> None:
    full = (rand(N, V) * 30).requires_grad_()
    expected = reference.mean_over(reference.cross_entropy(full, LABELS), LABELS)
    (gradient,) = torch.autograd.grad(expected, [full])
    local = part(full.detach(), mesh, -1).requires_grad_()
    loss = TEParallelCrossEntropy(reduction="mean", tp_group=mesh.get_group())(local, LABELS)
    loss.backward()
    close(loss, expected)
    assert local.grad is not None
    close(local.grad, part(gradient, mesh, -1))
    row_N = TEParallelCrossEntropy(reduction="none", tp_group=mesh.get_group())(local, LABELS)
    close(row_N, reference.cross_entropy(full, LABELS))
    close(
        torch.autograd.grad(row_N, [local], torch.full((N,), 1 / 9, dtype=torch.float64))[0], part(gradient, mesh, -1)
    )
    sharded = distribute_tensor(full.detach(), mesh, [Shard(1)]).requires_grad_()
    for module in (MaskedCrossEntropy(), TEParallelCrossEntropy()):
        total = module(sharded, LABELS)
        close(total, expected * 9)
        close(torch.autograd.grad(total, [sharded])[0].full_tensor(), gradient * 9)
    hidden, weight = rand(N, D).requires_grad_(), rand(V, D, seed=1).requires_grad_()
    expected = reference.mean_over(reference.cross_entropy(hidden @ weight.t(), LABELS), LABELS, 1)
    wanted = torch.autograd.grad(expected, [hidden, weight])
    mine = part(weight.detach(), mesh, 0).requires_grad_()
    fused = FusedLinearCrossEntropy(tp_group=mesh.get_group(), chunk_size=4)(hidden, LABELS, mine)
    close(fused, expected)
    found = torch.autograd.grad(fused, [hidden, mine])
    close(found[0], wanted[0])
    close(found[1], part(wanted[1], mesh, 0))


def check_bfloat16(mesh: DeviceMesh) -> None:
    """bfloat16 shards against the float64 reference of the same numbers."""
    for form in ("dense", "bucket", "sampled"):
        full = (rand(N, V) * 3).bfloat16()
        teacher = (rand(N, V, seed=1) * 2).bfloat16()
        exact = full.double().requires_grad_()
        kd = (
            reference.dense_kd("forward_kl", exact, teacher.double())
            if form == "dense"
            else reference.sparse_kd("forward_kl", exact, rows(), LABELS, form)
        )
        expected = reference.mean_over(kd, LABELS)
        (gradient,) = torch.autograd.grad(expected, [exact])
        local = part(full, mesh, -1).requires_grad_()
        given: Tensor | SparseTargets = part(teacher, mesh, -1) if form == "dense" else rows()
        loss = KDLoss(tp_group=mesh.get_group(), tail=None if form == "dense" else form)(local, given, LABELS)
        loss.backward()
        assert local.grad is not None
        assert local.grad.dtype == torch.bfloat16
        close(loss, expected, 1e-5)
        close(local.grad, part(gradient, mesh, -1), 2.0**-8)


def check_bfloat16_fused(mesh: DeviceMesh) -> None:
    """Products in bfloat16, weights in either precision, against the float64 reference of the same numbers."""
    hidden, weight = rand(N, D).bfloat16(), rand(V, D, seed=1).bfloat16()
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = exact[0] @ exact[1].t()
    kd = reference.mean_over(reference.sparse_kd("forward_kl", logits, rows(), LABELS, "sampled"), LABELS)
    expected = 0.5 * kd + 0.5 * reference.mean_over(reference.cross_entropy(logits, LABELS), LABELS)
    wanted = torch.autograd.grad(expected, exact)
    for dtype in (torch.bfloat16, torch.float32):
        local = [hidden.clone().requires_grad_(), part(weight.to(dtype), mesh, 0).requires_grad_()]
        parts = FusedLinearKDLoss(tp_group=mesh.get_group(), chunk_size=4)(local[0], local[1], rows(), LABELS)
        found = torch.autograd.grad(parts.loss, local)
        assert [x.dtype for x in found] == [torch.bfloat16, dtype]
        close(parts.loss, expected, 2.0**-6)
        close(found[0], wanted[0], 2.0**-5)
        close(found[1], part(wanted[1], mesh, 0), 2.0**-5)


def check_padded_vocabulary(mesh: DeviceMesh) -> None:
    """vocab_size cuts the last shards, down to nothing on the last process."""
    real = split(mesh.size())[0]
    full = rand(N, V).requires_grad_()
    labels = LABELS.clamp(max=real - 1)
    expected = reference.mean_over(reference.cross_entropy(full[:, :real], labels), labels)
    (gradient,) = torch.autograd.grad(expected, [full])
    local = part(full.detach(), mesh, -1).requires_grad_()
    loss = TEParallelCrossEntropy(reduction="mean", tp_group=mesh.get_group(), vocab_size=real)(local, labels)
    loss.backward()
    close(loss, expected)
    assert local.grad is not None
    close(local.grad, part(gradient, mesh, -1))
    hidden, weight = rand(N, D), rand(V, D, seed=1)
    fused = FusedLinearKDLoss(kd_ratio=0.0, tp_group=mesh.get_group(), vocab_size=real)
    mine = part(weight, mesh, 0).requires_grad_()
    parts = fused(hidden, mine, None, labels)
    close(parts.loss, reference.mean_over(reference.cross_entropy(hidden @ weight[:real].t(), labels), labels))
    parts.loss.backward()
    if real > 1:
        teacher = rand(N, V, seed=1)
        kd = reference.mean_over(reference.dense_kd("jsd", full[:, :real], teacher[:, :real]), labels)
        found = KDLoss(tp_group=mesh.get_group(), vocab_size=real, divergence="jsd")(
            local, part(teacher, mesh, -1), labels
        )
        close(found, kd)


def check_no_valid_label(mesh: DeviceMesh) -> None:
    """Nothing to learn on any process: exactly 0, and backward works."""
    local, weight = part(rand(N, V), mesh, -1).requires_grad_(), part(rand(V, D), mesh, 0).requires_grad_()
    nothing = torch.full_like(LABELS, -100)
    loss = KDLoss(tp_group=mesh.get_group())(local, rows(), nothing)
    fused = FusedLinearKDLoss(tp_group=mesh.get_group())(rand(N, D), weight, rows(), nothing)
    (loss + fused.loss).backward()
    assert float(loss.detach()) == float(fused.loss.detach()) == 0.0
    for x in (local, weight):
        assert x.grad is not None
        assert not x.grad.any()


def check_misuse(mesh: DeviceMesh) -> None:
    """Refused on every process alike: other rows here than there, and a teacher that is cut elsewhere."""
    rank, world = mesh.get_local_rank(), mesh.size()
    weight = distribute_tensor(rand(V, D), mesh, [Shard(0)])  # as FSDP leaves it outside the wrapped forward
    expect_error("hold different labels", lambda: FusedLinearKDLoss()(rand(N, D), weight, rows(), LABELS.roll(rank)))
    wider = distribute_tensor(rand(V + world * 2, 4), mesh, [Shard(0)])
    teacher = TeacherHead(hidden_ND=rand(N, 4), weight_VD=wider)
    expect_error("columns here", lambda: FusedLinearKDLoss(vocab_size=V)(rand(N, D), weight, teacher, LABELS))
    told = r"the teacher is a DTensor with placements \[Shard\(dim=1\)\], the student's vocabulary is whole"
    sharded = distribute_tensor(rand(N, V, seed=1), mesh, [Shard(1)])
    expect_error(told, lambda: KDLoss()(rand(N, V), sharded, LABELS))
    whole = FusedLinearKDLoss()(rand(N, D), rand(V, D), sharded.full_tensor(), LABELS).loss  # as the message advises
    assert whole.isfinite()
    told = "the teacher's head is a DTensor.*the student's vocabulary is whole"
    teacher = TeacherHead(hidden_ND=rand(N, 4), weight_VD=distribute_tensor(rand(V, 4), mesh, [Shard(0)]))
    expect_error(told, lambda: FusedLinearKDLoss()(rand(N, D), rand(V, D), teacher, LABELS))
    bias = rand(V)  # whole, beside a head that is cut
    expect_error("cut the bias as the head", lambda: FusedLinearCrossEntropy()(rand(N, D), LABELS, weight, bias=bias))


class Student(nn.Module):
    """An embedding, a layer and an untied head, with the loss inside: what fully_shard wraps."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layer = nn.Linear(D, D)
        self.head = nn.Linear(D, V)
        self.loss = FusedLinearKDLoss(divergence="jsd", kd_ratio=0.7, chunk_size=3, reduction=reduction)

    def forward(self, tokens_N: Tensor, targets: SparseTargets, labels_N: Tensor, total: float) -> LossParts:
        hidden_ND = self.layer(self.embed(tokens_N)).tanh()
        parts: LossParts = self.loss(hidden_ND, self.head.weight, targets, labels_N, total, bias_V=self.head.bias)
        return parts


def student(reduction: str = "mean") -> Student:
    torch.manual_seed(11)
    return Student(reduction).double()


def check_fsdp2(mesh: DeviceMesh, reduction: str) -> None:
    """Each process takes its rows; FSDP2 averages, so the loss is multiplied by the number of processes."""
    tokens_N, targets = torch.arange(N) % V, rows()
    whole = student()
    whole(tokens_N, targets, LABELS, 9).loss.backward()
    model = student(reduction)
    fully_shard(model.layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # the second process has the longer half, and the first both ignored rows
    mine = [slice(0, 8), slice(8, N)][mesh.get_local_rank()]
    for _ in range(2):  # one object used twice: the same gradients again
        parts = model(tokens_N[mine], targets.rows(mine), LABELS[mine], 9)
        (parts.loss.sum() * mesh.size()).backward()
        for (name, expected), found in zip(whole.named_parameters(), model.parameters(), strict=True):
            assert isinstance(found.grad, DTensor), name
            assert expected.grad is not None
            close(found.grad.full_tensor(), expected.grad, 1e-7)
        model.zero_grad()


def check_fused_everywhere(mesh: DeviceMesh, name: str) -> None:
    for form in ("dense", "bucket"):
        for how in ("group", "dtensor"):
            check_fused(mesh, name, form, how)


Check = Callable[[DeviceMesh], None]


def cases() -> dict[str, tuple[int, Check]]:
    """Case name -> processes that it takes, and what it checks."""
    chosen: dict[str, tuple[int, Check]] = {}
    for size in (2, 3):
        for name in NAMES:
            for form in ("dense", "bucket", "renormalize_both"):
                for how in ("group", "dtensor"):
                    check = partial(check_logits, name=name, form=form, how=how)
                    chosen[f"logits {name} {form} {how} {size}"] = size, check
            chosen[f"fused {name} {size}"] = size, partial(check_fused_everywhere, name=name)
        for form in ("sampled", "renormalize", "residual_to_label"):
            check = partial(check_logits, name="forward_kl", form=form, how="group")
            chosen[f"logits {form} {size}"] = size, check
            chosen[f"fused {form} {size}"] = size, partial(check_fused, name="forward_kl", form=form, how="dtensor")
        for name, form in (("jsd", "dense"), ("jsd", "bucket"), ("forward_kl", "sampled")):
            fused = partial(check_fused, name=name, form=form, how="group", temperature=2.0, softcap=2.5)
            chosen[f"fused {name} {form} T=2 softcap {size}"] = size, fused
        chosen[f"cross-entropy {size}"] = size, check_cross_entropy
        chosen[f"bfloat16 {size}"] = size, check_bfloat16
        chosen[f"bfloat16 fused {size}"] = size, check_bfloat16_fused
        chosen[f"padded vocabulary {size}"] = size, check_padded_vocabulary
        chosen[f"no valid label {size}"] = size, check_no_valid_label
        chosen[f"misuse {size}"] = size, check_misuse
        for how in PLACEMENTS:
            chosen[f"placed logits, {how} {size}"] = size, partial(check_placed_logits, how=how)
            chosen[f"placed heads, {how} {size}"] = size, partial(check_placed_heads, how=how)
        chosen[f"placed sequences {size}"] = size, check_placed_sequences
    for reduction in ("mean", "none"):
        chosen[f"fsdp2, {reduction} 2"] = 2, partial(check_fsdp2, reduction=reduction)
    chosen["two dimensions 4"] = 4, check_two_dimensions
    return chosen


def main(rank: int, world: int, directory: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=20)
    )
    meshes = {size: DeviceMesh("cpu", list(range(size)), mesh_dim_names=("tp",)) for size in (2, 3)}
    meshes[4] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    outcome: dict[str, str | None] = {}
    for name, (size, check) in cases().items():
        outcome[name] = None
        if rank >= size:
            continue
        try:
            check(meshes[size])
        except Exception:
            outcome[name] = traceback.format_exc()
            break  # the other processes may wait in a collective that this one left: end here, and they time out
    (directory / f"{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()
