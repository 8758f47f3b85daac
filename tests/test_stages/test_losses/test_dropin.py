"""Peers' calls work unchanged, and their published losses come out, forward and backward."""

from __future__ import annotations

import inspect
from typing import Any

import losses_reference as reference
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from stages.losses import (
    LOSS_CONFIG_REGISTRY,
    FusedLinearKDLoss,
    KDLoss,
    MaskedCrossEntropy,
    SparseTargets,
    TEParallelCrossEntropy,
    build_loss_module,
)

B, T, V = 2, 5, 31


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([[1, 2, -100, 4, 5], [-100, 0, 30, 7, 7]])


def test_signature_of_nemo_automodel() -> None:
    """Their parameters first, same order, names and defaults; ours keyword-only."""
    parameters = list(inspect.signature(KDLoss.__init__).parameters.values())[1:]
    theirs = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert theirs == [
        ("ignore_index", -100),
        ("temperature", 1.0),
        ("fp32_upcast", True),
        ("tp_group", None),
        ("chunk_size", 0),
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[5:])
    call = list(inspect.signature(KDLoss.forward).parameters.values())[1:]
    assert [p.name for p in call] == ["student_logits", "teacher_logits", "labels", "num_batch_labels"]
    assert call[3].default is None


@pytest.mark.parametrize("name", LOSS_CONFIG_REGISTRY)
def test_recipes_of_nemo_automodel_read_attributes(name: str) -> None:
    """They give ignored positions the loss's own ignore_index, and log the temperature."""
    loss = build_loss_module(name, ignore_index=7)
    assert loss.ignore_index == 7


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("KDLoss", {"ignore_index": 0, "temperature": 2.0, "fp32_upcast": False, "chunk_size": 3, "tail": "bucket"}),
        ("KDLoss", {"logits_scale": 2.0, "target_logits_scale": 0.5, "check": True, "reduction": "none"}),
        ("MaskedCrossEntropy", {"fp32_upcast": False, "reduction": "mean", "chunk_size": 7, "vocab_size": 11}),
        ("TEParallelCrossEntropy", {"tp_group": dist.ProcessGroup(0, 1), "reduction": "sum"}),
        ("FusedLinearCrossEntropy", {"logit_softcapping": 30.0, "ignore_index": -1, "chunk_size": 8}),
        ("FusedLinearKDLoss", {"softcap": 30.0, "logit_multiplier": 0.5, "kd_ratio": 0.3}),
        ("FusedLinearKDLoss", {"kd_loss_weight": 1.0, "sft_loss_weight": 0.25}),
    ],
)
def test_settings_are_read_shown_and_never_quietly_ignored(loss: str, settings: dict[str, Any]) -> None:
    """By the names of the constructor, on the loss and in its repr, which is one line."""
    made = build_loss_module(loss, **settings)
    shown = repr(made)
    assert shown.startswith(f"{loss}(")
    assert "\n" not in shown
    for name, value in settings.items():
        assert getattr(made, name) == value
        assert f"{name}={value!r}" in shown
        with pytest.raises(AttributeError, match="no setter"):
            setattr(made, name, value)


def test_a_repr_shows_what_is_measured() -> None:
    assert repr(KDLoss(divergence="jsd")) == (
        "KDLoss(ignore_index=-100, temperature=1.0, fp32_upcast=True, chunk_size=0, divergence='jsd(0.5)', "
        "logits_scale=1.0, target_logits_scale=1.0, check=False, reduction='mean')"
    )
    assert "kd_ratio=0.3," in repr(FusedLinearKDLoss(kd_coef=0.3))
    assert "kd_ratio" not in repr(FusedLinearKDLoss(kd_loss_weight=1.0))


def test_calls_of_nemo_automodel_and_openrlhf() -> None:
    """Forward KL times T^2, over valid tokens, by sum / num_batch_labels or by mean."""
    student, teacher = rand(B, T, V).requires_grad_(), rand(B, T, V, seed=1)
    valid = LABELS != -100

    def theirs(temperature: float) -> Tensor:
        p, log_q = (teacher[valid] / temperature).softmax(-1), (student[valid] / temperature).log_softmax(-1)
        return (p * (p.log() - log_q)).sum(-1) * temperature**2

    full = KDLoss(-100, 2.0, True, None, 3)
    found = full(student_logits=student, teacher_logits=teacher, labels=LABELS, num_batch_labels=20)
    torch.testing.assert_close(found, theirs(2.0).sum() / 20)
    torch.testing.assert_close(KDLoss()(student, teacher, LABELS), theirs(1.0).mean())
    torch.testing.assert_close(KDLoss(ignore_index=7)(student, teacher, LABELS.clamp_min(0)), KDLoss(ignore_index=7)(
        student.flatten(0, 1), teacher.flatten(0, 1), LABELS.clamp_min(0).flatten()))  # fmt: skip


def test_openrlhf_differs_by_the_teachers_entropy() -> None:
    """It returns the cross-entropy between the two: another value, the same gradient."""
    student, teacher = rand(B, T, V).requires_grad_(), rand(B, T, V, seed=1)
    valid = LABELS != -100
    p = teacher.softmax(-1)
    theirs = -(p * student.log_softmax(-1)).sum(-1)[valid].mean()
    mine = KDLoss()(student, teacher, LABELS)
    entropy = torch.special.entr(p).sum(-1)[valid].mean()
    torch.testing.assert_close(mine, theirs - entropy)
    torch.testing.assert_close(*(torch.autograd.grad(x, [student])[0] for x in (mine, theirs)))
    with pytest.raises(TypeError, match="logits"):
        KDLoss()(logits=student, teacher_logits=teacher, label=LABELS)


def test_openrlhf_leaves_out_what_the_student_rules_out() -> None:
    """Ours is infinite there unless the teacher rules it out as well; with both it is as above."""
    student, teacher = rand(B, T, V), rand(B, T, V, seed=1)
    student[..., 3] = -torch.inf
    p = teacher.softmax(-1)
    theirs = -(p * student.log_softmax(-1)).masked_fill(student.isinf(), 0.0).sum(-1)[LABELS != -100].mean()
    assert theirs.isfinite()
    labels = LABELS.masked_fill(LABELS == 3, 2)
    assert KDLoss()(student, teacher, labels) == torch.inf
    teacher[..., 3] = -torch.inf
    assert KDLoss()(student, teacher, labels).isfinite()


@pytest.mark.parametrize("name", ["forward_kl", "backward_kl"])
@pytest.mark.parametrize(("student_scale", "teacher_scale"), [(1.0, 1.0), (1.7, 1.0), (1.0, 0.5), (0.6, 2.0)])
def test_nemo_aligner_top_k(name: str, student_scale: float, teacher_scale: float) -> None:
    """Both sides normalised over the teacher's top k, scaled logits, sum over tokens by their number."""
    student, teacher = rand(B * T, V).requires_grad_(), rand(B * T, V, seed=1)
    labels = LABELS.flatten()
    top, ids = teacher.topk(6)
    log_p = (top.float().double() * teacher_scale).log_softmax(-1)
    log_q = (student.gather(-1, ids) * student_scale).log_softmax(-1)
    inner = F.kl_div(log_q, log_p, log_target=True, reduction="none") if name == "forward_kl" else F.kl_div(
        log_p, log_q, log_target=True, reduction="none")  # fmt: skip
    theirs = inner.sum(-1)[labels != -100].mean()
    loss = KDLoss(
        divergence=name, tail="renormalize_both", logits_scale=student_scale, target_logits_scale=teacher_scale
    )
    mine = loss(student, SparseTargets.from_logits(teacher, 6), labels)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    found, expected = (torch.autograd.grad(x, [student])[0] for x in (mine, theirs))
    assert reference.error(found, expected) < 1e-6


@pytest.mark.parametrize(
    "weights", [{"kd_loss_weight": 0.5, "sft_loss_weight": 2.0}, {"kd_loss_weight": 0.5}, {"sft_loss_weight": 2.0}]
)
def test_nemo_aligner_weights(weights: dict[str, float]) -> None:
    """kd_loss_weight is 1 and sft_loss_weight 0 where they are not given, as in its model class."""
    hidden, weight, labels = rand(B * T, 8), rand(V, 8, seed=1), LABELS.flatten()
    targets = SparseTargets.from_logits(rand(B * T, V, seed=2), 6)
    kd = KDLoss(tail="renormalize_both")(hidden @ weight.t(), targets, labels)
    sft = F.cross_entropy(hidden @ weight.t(), labels)
    loss = FusedLinearKDLoss(tail="renormalize_both", **weights)(hidden, weight, targets, labels).loss
    torch.testing.assert_close(
        loss, weights.get("kd_loss_weight", 1.0) * kd + weights.get("sft_loss_weight", 0.0) * sft
    )


@pytest.mark.parametrize("kind", [MaskedCrossEntropy, TEParallelCrossEntropy])
def test_cross_entropies_of_nemo_automodel(kind: type[MaskedCrossEntropy | TEParallelCrossEntropy]) -> None:
    logits = rand(B, T, V).requires_grad_()
    summed = F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), reduction="sum")
    torch.testing.assert_close(kind()(logits, LABELS), summed)
    torch.testing.assert_close(kind()(logits, LABELS, num_label_tokens=16), summed / 16)
    mask = (LABELS != -100).long()
    masked = kind(reduction="mean")(logits, LABELS.clamp_min(0), mask)
    torch.testing.assert_close(masked, summed / mask.sum())
    torch.testing.assert_close(
        torch.autograd.grad(masked, [logits])[0], torch.autograd.grad(summed / mask.sum(), [logits])[0]
    )
    torch.testing.assert_close(kind()(logits, LABELS.clamp_min(0), mask, 16), summed / 16)
    with pytest.raises(ValueError, match=r"mask \(\) and labels \(2, 5\) do not fit"):
        kind()(logits, LABELS, torch.tensor(16))
