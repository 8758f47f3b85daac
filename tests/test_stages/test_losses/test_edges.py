"""Edges that have hurt somebody: empty, ignored, infinite, padded, mismatched, recomputed, compiled."""

from __future__ import annotations

import losses_reference as reference
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.losses import (
    DIVERGENCES,
    FusedLinearCrossEntropy,
    FusedLinearKDLoss,
    KDLoss,
    MaskedCrossEntropy,
    SparseTargets,
    TeacherHead,
    TEParallelCrossEntropy,
)

N, D, V = 10, 6, 19


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(k: int = 5, draws: int = 4) -> SparseTargets:
    return SparseTargets.from_logits(2 * rand(N, V, seed=1), k, draws=draws, generator=torch.Generator().manual_seed(2))


LABELS = torch.tensor([3, -100, 5, 18, 0, -100, 7, 7, 2, 1])
VALID = LABELS != -100


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("count", [0, N])
@pytest.mark.parametrize("total", [None, 0, 12])
def test_no_valid_label(name: str, count: int, total: int | None) -> None:
    """Exactly 0 and connected, for an empty batch as for an ignored one."""
    hidden_ND, weight_VD, logits_NV = (x.requires_grad_() for x in (rand(count, D), rand(V, D), rand(count, V)))
    nothing_N = torch.full((count,), -100)
    losses = [
        KDLoss(divergence=name)(logits_NV, rows().rows(slice(0, count)), nothing_N, total),
        KDLoss(divergence=name)(logits_NV, rand(count, V), nothing_N, total),
        FusedLinearKDLoss(divergence=name)(hidden_ND, weight_VD, rows().rows(slice(0, count)), nothing_N, total).loss,
        FusedLinearCrossEntropy()(hidden_ND, nothing_N, weight_VD, total),
        MaskedCrossEntropy()(logits_NV, nothing_N, num_label_tokens=total),
        TEParallelCrossEntropy(reduction="mean")(logits_NV, nothing_N),
    ]
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    assert [float(loss.detach()) for loss in losses] == [0.0] * len(losses)
    for leaf in (hidden_ND, weight_VD, logits_NV):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_all_ignored_chunk_and_nan_in_ignored_rows() -> None:
    """Ignored rows are left out before anything is computed: their contents, and the chunking, change nothing."""
    labels_N = LABELS.clone()
    labels_N[4:8] = -100  # with chunk_size=4 a whole chunk of positions is ignored
    clean_NV, dirty_NV = rand(N, V), rand(N, V)
    dirty_NV[labels_N == -100] = torch.nan
    values, gradients = [], []
    for logits_NV in (clean_NV.requires_grad_(), dirty_NV.requires_grad_()):
        for teacher in (rows(), 2 * rand(N, V, seed=1)):
            if isinstance(teacher, Tensor) and logits_NV is dirty_NV:
                teacher[labels_N == -100] = torch.nan
            value = KDLoss(chunk_size=4, check=True)(logits_NV, teacher, labels_N)
            values.append(value.detach())
            gradients.append(torch.autograd.grad(value, [logits_NV])[0])
    torch.testing.assert_close(values[:2], values[2:], rtol=0, atol=0)
    torch.testing.assert_close(gradients[:2], gradients[2:], rtol=0, atol=0)
    hidden_ND = rand(N, D)
    hidden_ND[labels_N == -100] = torch.nan
    hidden_ND.requires_grad_()
    parts = FusedLinearKDLoss(chunk_size=4, check=True)(hidden_ND, rand(V, D), rows(), labels_N)
    parts.loss.backward()
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.isfinite().all()
    assert hidden_ND.grad[labels_N == -100].eq(0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_minus_infinity_where_the_other_has_no_mass(name: str) -> None:
    """Columns that both sides rule out contribute nothing: the result is that of the vocabulary without them."""
    banned = [4, 11]
    kept = [v for v in range(V) if v not in banned]
    student_NV, teacher_NV = rand(N, V), rand(N, V, seed=1)
    student_NV[:, banned] = teacher_NV[:, banned] = -torch.inf
    student_NV.requires_grad_()
    labels_N = torch.where(VALID, 0, -100)
    value = KDLoss(divergence=name, check=True)(student_NV, teacher_NV, labels_N)
    small_NV = student_NV.detach()[:, kept].requires_grad_()
    expected = KDLoss(divergence=name)(small_NV, teacher_NV[:, kept], labels_N)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    assert student_NV.grad is not None
    torch.testing.assert_close(student_NV.grad[:, kept], small_NV.grad)
    assert student_NV.grad[:, banned].eq(0).all()
    sparse = SparseTargets.from_logits(teacher_NV[:, kept], 5)
    student_V = small_NV.detach()
    banned_V = torch.cat([student_V, torch.full((N, 2), -torch.inf)], -1).requires_grad_()
    found = KDLoss(divergence=name, check=True)(banned_V, sparse, labels_N)
    torch.testing.assert_close(found, KDLoss(divergence=name)(student_V, sparse, labels_N))


@pytest.mark.parametrize("name", ["forward_kl", "mixed", "mixed(0.3)"])
def test_forward_kl_is_infinite_where_the_student_rules_out_the_teacher(name: str) -> None:
    student_NV = rand(N, V)
    student_NV[2, 5] = -torch.inf
    student_NV.requires_grad_()
    value = KDLoss(divergence=name)(student_NV, rand(N, V, seed=1), LABELS)
    assert value == torch.inf
    value.backward()
    assert student_NV.grad is not None
    assert student_NV.grad.isfinite().all()


@pytest.mark.parametrize("name", ["reverse_kl", "mixed", "mixed(0.3)"])
def test_reverse_kl_is_infinite_where_the_teacher_rules_out_the_student(name: str) -> None:
    teacher_NV = rand(N, V, seed=1)
    teacher_NV[2, 5] = -torch.inf
    assert KDLoss(divergence=name)(rand(N, V), teacher_NV, LABELS) == torch.inf


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_check_names_the_row(bad: float) -> None:
    logits_NV, hidden_ND = rand(N, V), rand(N, D)
    logits_NV[6], hidden_ND[6] = bad, torch.nan
    for loss in (KDLoss(check=True), KDLoss(check=True, chunk_size=2)):
        with pytest.raises(FloatingPointError, match=r"row 6:"):
            loss(logits_NV, rows(), LABELS)
        with pytest.raises(FloatingPointError, match=r"row 6:"):
            loss(rand(N, V), logits_NV, LABELS)
    with pytest.raises(FloatingPointError, match=r"row 6:"):
        FusedLinearKDLoss(check=True, chunk_size=3)(hidden_ND, rand(V, D), rows(), LABELS)
    assert not KDLoss()(logits_NV, rows(), LABELS).isfinite()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_teacher_mass_exactly_one(name: str) -> None:
    """r = 0 in bfloat16: value and gradient stay finite, and almost what they are without a tail."""
    logits_NV = rand(N, V).bfloat16().requires_grad_()
    teacher_NV = (rand(N, V, seed=1) * 200).bfloat16()
    targets = SparseTargets.from_logits(teacher_NV, 5)
    assert targets.logprob_NE.exp().sum(-1).eq(1).all()
    targets = SparseTargets.from_ragged(
        ids=targets.ids_NE.flatten(),
        row_entries=torch.full((N,), 5),
        head_size=targets.head_size_N,
        logprob=targets.logprob_NE.flatten(),
        count=torch.zeros(0),
        tail_logit=torch.full((N,), -torch.inf),
    )
    value = KDLoss(divergence=name, check=True)(logits_NV, targets, LABELS)
    value.backward()
    assert logits_NV.grad is not None
    assert value.isfinite()
    assert logits_NV.grad.isfinite().all()


def test_repeated_sampled_ids_are_merged() -> None:
    ids = torch.tensor([4, 9, 9, 2, 9, 6, 7, 1, 3, 3])
    merged = SparseTargets.from_ragged(
        ids=ids,
        row_offset=torch.tensor([0, 5, 10]),
        head_size=torch.tensor([1, 1]),
        logprob=torch.tensor([-0.7, -0.2]),
        count=torch.tensor([1, 2, 3, 1, 1, 2, 2, 2]),
        tail_logit=torch.tensor([0.1, -0.4]),
        entropy=torch.tensor([1.0, 1.0]),
        draws=7,
    )
    counted = [{int(v): int(c) for v, c in zip(merged.ids_NE[n], merged.count_NE[n], strict=True) if c} for n in (0, 1)]
    assert counted == [{9: 4, 2: 3}, {7: 1, 1: 2, 3: 4}]
    logits_NV = rand(2, V).double().requires_grad_()
    labels_N = torch.tensor([9, 0])
    value = KDLoss()(logits_NV, merged, labels_N)
    expected = reference.mean_over(reference.sparse_kd("forward_kl", logits_NV, merged, labels_N, "sampled"), labels_N)
    torch.testing.assert_close(value, expected)
    (found,) = torch.autograd.grad(value, [logits_NV])
    assert reference.error(found, torch.autograd.grad(expected, [logits_NV])[0]) < 1e-7


def test_non_contiguous_and_leading_dimensions() -> None:
    """[batch, time, V] with the last position cut off, transposed, strided: the same rows give the same loss."""
    whole = rand(2, 6, V)
    teacher = rand(2, 6, V, seed=1)
    labels = torch.randint(0, V, (2, 5), generator=torch.Generator().manual_seed(3))
    labels[0, 2] = -100
    for view, given in (
        (whole[:, :-1], teacher[:, :-1]),
        (whole.transpose(0, 1).contiguous().transpose(0, 1)[:, :-1], teacher[:, :-1].contiguous()),
        (torch.cat([whole, whole], -1)[:, :-1, :V], teacher[:, :-1]),
    ):
        leaf = view.detach()
        assert not leaf.is_contiguous()
        leaf.requires_grad_()
        value = KDLoss(chunk_size=3)(leaf, given, labels)
        value.backward()
        flat = whole[:, :-1].reshape(10, V).clone().requires_grad_()
        expected = KDLoss()(flat, teacher[:, :-1].reshape(10, V), labels.flatten())
        expected.backward()
        torch.testing.assert_close(value, expected)
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.reshape(10, V), flat.grad)
    sparse = SparseTargets.from_logits(teacher[:, :-1].reshape(10, V), 5)
    assert KDLoss()(whole[:, :-1], sparse, labels) == KDLoss()(whole[:, :-1].reshape(10, V), sparse, labels.flatten())
    hidden_ND = rand(D, N).t()
    assert FusedLinearKDLoss()(hidden_ND, rand(V, D), rows(), LABELS).loss == FusedLinearKDLoss()(
        hidden_ND.contiguous(), rand(V, D), rows(), LABELS).loss  # fmt: skip


@pytest.mark.parametrize("chunk_size", [1, 3, N, 1000])
def test_chunking_changes_nothing_but_rounding(chunk_size: int) -> None:
    hidden_ND, weight_VD = rand(N, D).double(), rand(V, D).double()
    fused = [FusedLinearKDLoss(chunk_size=c)(hidden_ND, weight_VD, rows(), LABELS).loss for c in (chunk_size, 256)]
    dense = [KDLoss(chunk_size=c)(rand(N, V).double(), rand(N, V, seed=1), LABELS) for c in (chunk_size, 0)]
    torch.testing.assert_close(fused[0], fused[1])
    torch.testing.assert_close(dense[0], dense[1])


def test_one_row_and_scalar_shape() -> None:
    logits_V, teacher_V = rand(V).requires_grad_(), rand(V, seed=1)
    alone = KDLoss()(logits_V, teacher_V, torch.tensor(3))
    assert alone == KDLoss()(logits_V[None], teacher_V[None], torch.tensor([3]))
    alone.backward()
    assert logits_V.grad is not None


def test_padded_vocabulary() -> None:
    """Columns beyond the real tokens are masked in KD and CE, on either side, with whatever is in them."""
    for name in DIVERGENCES:
        student_NV, teacher_NV = rand(N, V), rand(N, V, seed=1)
        wide_NV = torch.cat([student_NV, torch.full((N, 3), 50.0)], -1).requires_grad_()
        wide_teacher_NV = torch.cat([teacher_NV, torch.full((N, 5), 70.0)], -1)
        value = KDLoss(divergence=name, vocab_size=V)(wide_NV, wide_teacher_NV, LABELS)
        assert value == KDLoss(divergence=name)(student_NV, teacher_NV, LABELS)
        assert value == KDLoss(divergence=name, vocab_size=V)(wide_NV, wide_teacher_NV[:, : V + 3], LABELS)
        value.backward()
        assert wide_NV.grad is not None
        assert wide_NV.grad[:, V:].eq(0).all()
        hidden_ND, weight_VD = rand(N, D), torch.cat([rand(V, D), 9 * torch.ones(2, D)]).requires_grad_()
        heads = [TeacherHead(hidden_ND=rand(N, 3), weight_VD=rand(V + more, 3)) for more in (2, 4)]
        for targets in (rows(), *heads):
            parts = FusedLinearKDLoss(divergence=name, vocab_size=V)(hidden_ND, weight_VD, targets, LABELS)
            trimmed = targets if isinstance(targets, SparseTargets) else TeacherHead(
                hidden_ND=targets.hidden_ND, weight_VD=targets.weight_VD[:V])  # fmt: skip
            torch.testing.assert_close(
                parts, FusedLinearKDLoss(divergence=name)(hidden_ND, weight_VD[:V], trimmed, LABELS)
            )
            (gradient,) = torch.autograd.grad(parts.loss, [weight_VD])
            assert gradient[V:].eq(0).all()
            assert gradient[:V].abs().sum() > 0


def test_mismatches_name_what_does_not_fit() -> None:
    logits_NV = rand(N, V)
    with pytest.raises(ValueError, match=rf"teacher has {V + 2} vocabulary columns, the student has {V}"):
        KDLoss()(logits_NV, rand(N, V + 2), LABELS)
    teacher = TeacherHead(hidden_ND=rand(N, 3), weight_VD=rand(V - 2, 3))
    with pytest.raises(ValueError, match=rf"head has {V - 2} vocabulary columns, the student has {V}"):
        FusedLinearKDLoss()(rand(N, D), rand(V, D), teacher, LABELS)
    with pytest.raises(ValueError, match=r"token id \d+, the student's vocabulary has 4 tokens"):
        KDLoss()(rand(N, 4), rows(), LABELS.clamp(max=3))
    with pytest.raises(ValueError, match=rf"row 3: label 18 .* {V - 1} tokens"):
        KDLoss(vocab_size=V - 1)(logits_NV, rand(N, V), LABELS)
    with pytest.raises(ValueError, match="label -7"):
        KDLoss()(logits_NV, rand(N, V), torch.full((N,), -7))
    with pytest.raises(ValueError, match=f"vocab_size is {V + 1}"):
        KDLoss(vocab_size=V + 1)(logits_NV, rand(N, V), LABELS)
    with pytest.raises(ValueError, match="do not fit"):
        KDLoss()(logits_NV, rand(N, V), LABELS[:-1])
    with pytest.raises(ValueError, match="do not fit"):
        KDLoss()(logits_NV, rows().rows(slice(0, 4)), LABELS)
    with pytest.raises(ValueError, match="rows do not fit"):
        FusedLinearKDLoss()(rand(N, D), rand(V, D), rows().rows(slice(0, 4)), LABELS)
    with pytest.raises(ValueError, match="does not fit hidden"):
        FusedLinearKDLoss()(rand(N, D), rand(V, D + 1), rows(), LABELS)
    with pytest.raises(ValueError, match=r"num_batch_labels is 0\.0, but this call alone has 8"):
        KDLoss()(logits_NV, rows(), LABELS, 0)
    with pytest.raises(ValueError, match="num_batch_labels is inf"):
        KDLoss()(logits_NV, rows(), LABELS, float("inf"))
    for labels in (LABELS.float(), VALID):
        with pytest.raises(ValueError, match=r"labels are torch\.(float32|bool)"):
            KDLoss()(logits_NV, rows(), labels)
    with pytest.raises(TypeError, match="teacher_logits is a TeacherHead"):
        KDLoss()(logits_NV, teacher, LABELS)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    logits_NV, hidden_ND, weight_VD = rand(N, V), rand(N, D), rand(V, D)
    labels_N = LABELS.clamp_min(0) if dtype == torch.uint8 else LABELS
    narrow_N = labels_N.to(dtype)
    for teacher in (rows(), rand(N, V, seed=1)):
        assert KDLoss()(logits_NV, teacher, narrow_N) == KDLoss()(logits_NV, teacher, labels_N)
        fused = [FusedLinearKDLoss()(hidden_ND, weight_VD, teacher, labels).loss for labels in (narrow_N, labels_N)]
        assert fused[0] == fused[1]
    assert MaskedCrossEntropy()(logits_NV, narrow_N) == MaskedCrossEntropy()(logits_NV, labels_N)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks, we do not
def test_torch_compile_of_the_sparse_path() -> None:
    """A compiled model with the loss inside: the loss runs eagerly, value and gradients are those of plain torch."""
    layer, loss = torch.nn.Linear(D, D), FusedLinearKDLoss(divergence="jsd", chunk_size=4)
    hidden_ND, weight_VD = rand(N, D), rand(V, D).requires_grad_()

    def step(hidden_ND: Tensor) -> Tensor:
        return loss(layer(hidden_ND).tanh(), weight_VD, rows(), LABELS).loss + KDLoss()(  # type: ignore[no-any-return]
            layer(hidden_ND) @ weight_VD.t(), rows(), LABELS
        )

    plain = torch.autograd.grad(step(hidden_ND), [weight_VD, layer.weight])
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager")(hidden_ND), [weight_VD, layer.weight])
    torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    layer, loss = torch.nn.Linear(D, D), FusedLinearKDLoss(chunk_size=4)
    hidden_ND, weight_VD = rand(N, D).requires_grad_(), rand(V, D).requires_grad_()

    def step(hidden_ND: Tensor) -> Tensor:
        return loss(layer(hidden_ND).tanh(), weight_VD, rows(), LABELS).loss  # type: ignore[no-any-return]

    leaves = [hidden_ND, weight_VD, layer.weight]
    step(hidden_ND).backward()  # type: ignore[no-untyped-call]
    plain = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    checkpoint(step, hidden_ND, use_reentrant=reentrant).backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], plain)


def test_one_loss_object_twice_and_backward_twice() -> None:
    """Accumulation adds up; a kept graph gives the same gradient again; a second backward without it says so."""
    hidden_ND, weight_VD = rand(N, D).requires_grad_(), rand(V, D).requires_grad_()
    loss = FusedLinearKDLoss()
    first, second = (loss(hidden_ND, weight_VD, rows(), LABELS, 16).loss for _ in range(2))
    (first + second).backward()
    assert weight_VD.grad is not None
    once = torch.autograd.grad(loss(hidden_ND, weight_VD, rows(), LABELS, 8).loss, [weight_VD])[0]
    torch.testing.assert_close(weight_VD.grad, once)
    value = loss(hidden_ND, weight_VD, rows(), LABELS).loss
    kept = torch.autograd.grad(value, [weight_VD], torch.tensor(3.0), retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(value, [weight_VD])[0], kept / 3)
    with pytest.raises(RuntimeError, match="already backpropagated"):
        torch.autograd.grad(value, [weight_VD])


def test_without_gradient() -> None:
    """The same value under no_grad; a frozen head or frozen hidden states get no gradient and change no other."""
    values, gradients = [], []
    for hidden, weight in ((True, True), (True, False), (False, True)):
        hidden_ND, weight_VD = rand(N, D).requires_grad_(hidden), rand(V, D).requires_grad_(weight)
        parts = FusedLinearKDLoss(chunk_size=4)(hidden_ND, weight_VD, rows(), LABELS)
        parts.loss.backward()
        values.append(parts.loss.detach())
        gradients.append([hidden_ND.grad, weight_VD.grad])
    with torch.no_grad():
        silent = FusedLinearKDLoss(chunk_size=4)(hidden_ND, weight_VD, rows(), LABELS)
    assert not silent.loss.requires_grad
    assert all(value == silent.loss for value in values)
    whole_ND, whole_VD = gradients[0]
    torch.testing.assert_close(gradients[1:], [[whole_ND, None], [None, whole_VD]], rtol=0, atol=0)


def test_a_second_derivative_is_refused() -> None:
    """It would be zero: the gradient is formed in the forward pass and kept as numbers."""
    logits_NV, hidden_ND, weight_VD = rand(N, V).requires_grad_(), rand(N, 4).requires_grad_(), rand(V, 4, seed=1)
    for loss, wanted in (
        (KDLoss()(logits_NV, rows(), LABELS), logits_NV),
        (FusedLinearKDLoss()(hidden_ND, weight_VD, rows(), LABELS).loss, hidden_ND),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, wanted, create_graph=True)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("total", [None, 1_000_000])
def test_a_loss_scale_comes_before_float16_rounds(total: int | None, keep: bool) -> None:
    """As torch.amp.GradScaler does it: small gradients must not vanish before they are scaled."""
    scale = 65536.0
    logits_NV = (2 * rand(N, V)).half().requires_grad_()
    hidden_ND, weight_VD = rand(N, 4).requires_grad_(), rand(V, 4, seed=1).half().requires_grad_()
    (KDLoss()(logits_NV, rows(), LABELS, total) * scale).backward(retain_graph=keep)
    with torch.autocast("cpu", dtype=torch.float16):
        (FusedLinearKDLoss()(hidden_ND, weight_VD, rows(), LABELS, total).loss * scale).backward(retain_graph=keep)
    exact = [value.detach().double().requires_grad_() for value in (logits_NV, hidden_ND, weight_VD)]
    KDLoss()(exact[0], rows(), LABELS, total).backward()
    FusedLinearKDLoss()(exact[1], exact[2], rows(), LABELS, total).loss.backward()
    for mine, wide in zip((logits_NV, hidden_ND, weight_VD), exact, strict=True):
        assert mine.grad is not None
        assert mine.grad.dtype == mine.dtype
        assert wide.grad is not None
        assert reference.error(mine.grad.double() / scale, wide.grad) <= 2e-3
