"""One optimizer step and one validation: what they compute, what stops them, and how much memory they take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_training import HIDDEN, make_learner, make_step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.batches.steps import Step
from stages.training.optimizer import AdamWSettings, build_optimizer
from stages.training.step import Learner, Losses, optimizer_step, validate
from storage.errors import NumericsError


def gradients(learner: Learner, step: Step) -> list[Tensor]:
    learner.student.model.zero_grad()
    for batch in step.batches:
        learner.parts(batch, step.rows).loss.backward()
    return [parameter.grad.clone() for parameter in learner.student.model.parameters()]


def test_only_matrices_decay_and_tied_weights_are_moved_once() -> None:
    model = make_learner(vocabulary=40).student.model
    optimizer = build_optimizer(model, AdamWSettings(lr=1.0, weight_decay=0.5))
    by_decay = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert {parameter.dim() for parameter in by_decay[0.5]} == {2}
    assert {parameter.dim() for parameter in by_decay[0.0]} == {1}
    assert sum(len(group) for group in by_decay.values()) == len(list(model.parameters()))


@pytest.mark.parametrize("kd_ratio", [0.0, 0.7, 1.0])
def test_one_micro_batch_or_four_give_the_same_gradient(kd_ratio: float) -> None:
    learner = make_learner(vocabulary=40, kd_ratio=kd_ratio)
    sizes = [9, 3, 8, 8, 5, 10, 6, 7]
    one, four = (make_step(sizes, vocabulary=40, tokens_per_batch=bound) for bound in (100, 18))
    assert (len(one.batches), len(four.batches)) == (1, 4)
    torch.testing.assert_close(gradients(learner, four), gradients(learner, one), rtol=1e-5, atol=1e-7)


def test_losses_of_a_step_are_means_over_its_rows() -> None:
    step = make_step([9, 3, 8, 8], vocabulary=40, tokens_per_batch=12)
    learner = make_learner(vocabulary=40, kd_ratio=0.7)
    losses = validate(learner, step.batches, number=1)
    assert losses.kd is not None
    assert losses.ce is not None
    assert losses.loss == pytest.approx(0.7 * losses.kd + 0.3 * losses.ce)
    with torch.no_grad():
        logits_TV = [learner.student.model(b.tokens_1T, position_ids=b.positions_1T).logits[0] for b in step.batches]
    labels_T = torch.cat([batch.labels_T for batch in step.batches])
    assert losses.ce == pytest.approx(
        float(torch.nn.functional.cross_entropy(torch.cat(logits_TV), labels_T)), rel=1e-5
    )


def test_without_the_teacher_nothing_but_cross_entropy_is_told() -> None:
    step = make_step([9, 8], vocabulary=40, tokens_per_batch=20, with_targets=False)
    losses = validate(make_learner(vocabulary=40, kd_ratio=0.0), step.batches, number=1)
    assert losses.kd is None
    assert losses.loss == losses.ce
    with_teacher = make_step([9, 8], vocabulary=40, tokens_per_batch=20)
    assert validate(make_learner(vocabulary=40, kd_ratio=1.0), with_teacher.batches, number=1).ce is None


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation makes, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_times_vocabulary_is_ever_made(dtype: torch.dtype) -> None:
    vocabulary = 1_000
    step = make_step([40] * 10, vocabulary=vocabulary, tokens_per_batch=400)
    learner = make_learner(vocabulary=vocabulary, dtype=dtype, chunk_size=8)
    optimizer = build_optimizer(learner.student.model, AdamWSettings(lr=1e-3))
    with LargestTensor() as largest:
        optimizer_step(learner, optimizer, step, lr=1e-3, clip_norm=1.0, number=1)
    # The largest things are the head and its gradient, far below [400, 1000]; a plain loss would be caught:
    assert largest.elements == vocabulary * HIDDEN < 400 * vocabulary / 10
    with LargestTensor() as largest:
        learner.student.model(step.batches[0].tokens_1T, position_ids=step.batches[0].positions_1T)
    assert largest.elements == 400 * vocabulary


def test_a_step_moves_the_weights_against_the_loss() -> None:
    step = make_step([20, 20], vocabulary=40, tokens_per_batch=40)
    learner = make_learner(vocabulary=40)
    optimizer = build_optimizer(learner.student.model, AdamWSettings(lr=1e-2))
    losses = [optimizer_step(learner, optimizer, step, lr=1e-2, clip_norm=1.0, number=n)[0].loss for n in range(8)]
    assert losses == sorted(losses, reverse=True)
    assert all(parameter.grad is None for parameter in learner.student.model.parameters())


@pytest.mark.parametrize("limit", [0.01, 1e6, None])
def test_the_gradient_is_clipped_but_its_own_norm_is_told(limit: float | None) -> None:
    step = make_step([20], vocabulary=40, tokens_per_batch=40)
    learner = make_learner(vocabulary=40)
    norm_before = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients(learner, step)))
    learner.student.model.zero_grad()
    optimizer = torch.optim.SGD(learner.student.model.parameters(), lr=1.0)
    before = weights(learner)
    _, norm = optimizer_step(learner, optimizer, step, lr=1.0, clip_norm=limit, number=1)
    moved = [(old - new) for old, new in zip(before, weights(learner), strict=True)]
    assert norm == pytest.approx(norm_before, rel=1e-5)
    length = math.sqrt(sum(float(change.square().sum()) for change in moved))
    assert length == pytest.approx(norm if limit is None else min(norm, limit), rel=1e-3)


def weights(learner: Learner) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in learner.student.model.parameters()]


def spoil_weights(learner: Learner, value: float) -> None:
    with torch.no_grad():
        learner.student.model.model.norm.weight[3] = value


def spoil_gradient(learner: Learner, value: float) -> None:
    """As an overflow in backward does: the loss is finite."""
    learner.student.model.model.norm.weight.register_hook(lambda gradient: gradient * value)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("spoil", "what"), [(spoil_weights, "the loss is nan"), (spoil_gradient, "the norm of the gradient is (nan|inf)")]
)
def test_what_is_no_number_stops_before_the_weights_move(
    spoil: Callable[[Learner, float], None], what: str, broken: float
) -> None:
    learner = make_learner(vocabulary=40)
    optimizer = build_optimizer(learner.student.model, AdamWSettings(lr=1e-2))
    spoil(learner, broken)
    before = weights(learner)
    step = make_step([9], vocabulary=40, tokens_per_batch=40)
    with pytest.raises(NumericsError, match=f"{what} at step 7; the weights have not moved") as caught:
        optimizer_step(learner, optimizer, step, lr=1e-2, clip_norm=1.0, number=7)
    assert (caught.value.exit_code, caught.value.where) == (7, "step 7")
    torch.testing.assert_close(weights(learner), before, rtol=0.0, atol=0.0, equal_nan=True)
    assert not optimizer.state


def test_a_heldout_loss_that_is_no_number_is_told() -> None:
    learner = make_learner(vocabulary=40)
    spoil_weights(learner, math.nan)
    step = make_step([9], vocabulary=40, tokens_per_batch=40)
    with pytest.raises(NumericsError, match="the held-out loss is nan after step 7") as caught:
        validate(learner, step.batches, number=7)
    assert (caught.value.exit_code, caught.value.where) == (7, "step 7")


def test_a_step_without_rows_is_nothing_to_learn_from() -> None:
    """As where every window of a step lies in a prompt: its sums are 0, and there is nothing to divide them by."""
    step = make_step([9, 8], vocabulary=40, tokens_per_batch=10, with_rows=False)
    learner = make_learner(vocabulary=40)
    optimizer = build_optimizer(learner.student.model, AdamWSettings(lr=1e-2, weight_decay=0.0))
    before = weights(learner)
    assert (len(step.batches), step.rows) == (2, 0)
    losses, norm = optimizer_step(learner, optimizer, step, lr=1e-2, clip_norm=1.0, number=1)
    assert (losses, norm) == (Losses(loss=0.0, kd=0.0, ce=0.0), 0.0)
    assert validate(learner, step.batches, number=1) == losses
    torch.testing.assert_close(weights(learner), before, rtol=0.0, atol=0.0)


def test_validation_leaves_the_student_training_and_takes_no_gradient() -> None:
    learner = make_learner(vocabulary=40)
    step = make_step([9, 8], vocabulary=40, tokens_per_batch=10)
    modes = []
    learner.student.model.model.norm.register_forward_hook(lambda module, *_: modes.append(module.training))
    losses = validate(learner, step.batches, number=1)
    assert modes == [False, False]
    assert learner.student.model.training
    assert all(parameter.grad is None for parameter in learner.student.model.parameters())
    optimizer = build_optimizer(learner.student.model, AdamWSettings(lr=1e-2))
    assert optimizer_step(learner, optimizer, step, lr=1e-2, clip_norm=1.0, number=1)[0] == losses
    assert modes == [False, False, True, True]
