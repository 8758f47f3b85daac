"""stages/training: schedules, one optimizer step, checkpoints, metrics and the run directory."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from stages.batches.steps import Step, StepShape, microbatches
from stages.durable import durable_directory, remove_leftovers
from stages.losses import FusedLinearKDLoss
from stages.models.packed import use_packed_attention
from stages.student.model import Student
from stages.training.checkpoint import Checkpoints, TrainingProgress
from stages.training.metrics import MetricsLog, read_metrics
from stages.training.optimizer import AdamWSettings, build_optimizer
from stages.training.run import Finish, RunDirectory
from stages.training.step import Learner, optimizer_step, validate
from storage.errors import IdentityError, NumericsError, StorageUnavailableError, UsageError
from storage.rows import SequenceBatch

HIDDEN = 16


def make_learner(
    *, vocabulary: int, kd_ratio: float = 0.7, dtype: torch.dtype = torch.float32, chunk_size: int = 4, seed: int = 0
) -> Learner:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    use_packed_attention(model, "sdpa")
    loss = FusedLinearKDLoss(chunk_size=chunk_size, vocab_size=vocabulary)
    return Learner(student=Student.of(model, dtype), loss=loss, kd_ratio=kd_ratio)


def make_sequences(sizes: list[int], *, vocabulary: int, seed: int = 0) -> SequenceBatch:
    """Random sequences; each row has a head of 3 and 2 samples drawn twice and once."""
    random = np.random.default_rng(seed)
    offset = np.concatenate([[0], np.cumsum(sizes)])
    row_offset = np.concatenate([[0], np.cumsum(np.array(sizes) - 1)])
    rows = int(row_offset[-1])
    has_row = np.ones(offset[-1], dtype=bool)
    has_row[offset[1:] - 1] = False
    ids = np.stack([random.permutation(vocabulary)[:5] for _ in range(rows)])
    return SequenceBatch(
        tokens=random.integers(0, vocabulary, offset[-1]).astype(np.uint32),
        token_offset=offset,
        row_offset=row_offset,
        head_offset=3 * row_offset,
        tail_offset=2 * row_offset,
        document=np.arange(len(sizes)),
        window_start=np.zeros(len(sizes), np.int64),
        token_end_byte=None,
        has_row=has_row,
        head_size=np.full(rows, 3, np.int32),
        tail_size=np.full(rows, 2, np.int32),
        head_ids=ids[:, :3].reshape(-1).astype(np.uint32),
        logprob=np.log(np.tile([0.5, 0.2, 0.1], rows)).astype(np.float32),
        tail_ids=ids[:, 3:].reshape(-1).astype(np.uint32),
        count=np.tile([2, 1], rows).astype(np.uint16),
        tail_logit=np.full(rows, math.log(0.2 / 0.8), np.float32),
        logsumexp=np.zeros(rows, np.float32),
        entropy=np.full(rows, 1.5, np.float32),
        next_logprob=np.full(rows, -1.0, np.float32),
        draws=3,
    )


def make_step(sizes: list[int], *, vocabulary: int, tokens_per_batch: int, with_targets: bool = True) -> Step:
    shape = StepShape(tokens_per_step=10**6, tokens_per_batch=tokens_per_batch, with_targets=with_targets)
    sequences = make_sequences(sizes, vocabulary=vocabulary)
    batches = microbatches(sequences, shape)
    return Step(batches=batches, tokens=len(sequences.tokens), rows=sequences.rows, cursor=len(sizes))


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


def test_the_gradient_is_clipped_but_its_own_norm_is_told() -> None:
    step = make_step([20], vocabulary=40, tokens_per_batch=40)
    learner = make_learner(vocabulary=40)
    optimizer = torch.optim.SGD(learner.student.model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in learner.student.model.parameters()]
    _, norm = optimizer_step(learner, optimizer, step, lr=1.0, clip_norm=0.01, number=1)
    moved = [(old - new).detach() for old, new in zip(before, learner.student.model.parameters(), strict=True)]
    assert norm > 0.01
    assert math.sqrt(sum(float(change.square().sum()) for change in moved)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_weights_move(broken: float) -> None:
    learner = make_learner(vocabulary=40)
    optimizer = build_optimizer(learner.student.model, AdamWSettings(lr=1e-2))
    with torch.no_grad():
        learner.student.model.model.norm.weight[3] = broken
    before = [parameter.detach().clone() for parameter in learner.student.model.parameters()]
    step = make_step([9], vocabulary=40, tokens_per_batch=40)
    with pytest.raises(NumericsError, match="at step 7") as caught:
        optimizer_step(learner, optimizer, step, lr=1e-2, clip_norm=1.0, number=7)
    assert caught.value.exit_code == 7
    after = [parameter.detach() for parameter in learner.student.model.parameters()]
    torch.testing.assert_close(after, before, rtol=0.0, atol=0.0, equal_nan=True)
    assert not optimizer.state


def trained(learner: Learner, steps: int) -> torch.optim.Optimizer:
    optimizer = build_optimizer(learner.student.model, AdamWSettings(lr=1e-2))
    for number in range(steps):
        step = make_step([9, 8], vocabulary=40, tokens_per_batch=20)
        optimizer_step(learner, optimizer, step, lr=1e-2, clip_norm=1.0, number=number + 1)
    return optimizer


def states(learner: Learner, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = list(learner.student.model.parameters())
    moments = [value for parameter in parameters for _, value in sorted(optimizer.state[parameter].items())]
    return [tensor.detach() for tensor in (*parameters, *moments)]


def test_a_checkpoint_brings_back_weights_moments_and_random_numbers(tmp_path: Path) -> None:
    learner = make_learner(vocabulary=40)
    optimizer = trained(learner, 3)
    checkpoints = Checkpoints(folder=tmp_path, store_digest="d")
    torch.manual_seed(99)
    checkpoints.save(learner.student.model, optimizer, TrainingProgress(step=3, cursor=6, tokens=51, seconds=1.5))
    drawn = torch.rand(4)
    other = make_learner(vocabulary=40, seed=1)
    fresh = build_optimizer(other.student.model, AdamWSettings(lr=1e-2))
    assert checkpoints.resume(other.student.model, fresh) == TrainingProgress(step=3, cursor=6, tokens=51, seconds=1.5)
    assert torch.equal(torch.rand(4), drawn)
    for restored, original in zip(states(other, fresh), states(learner, optimizer), strict=True):
        assert torch.equal(restored, original)
    step = make_step([9, 8], vocabulary=40, tokens_per_batch=20)
    one, two = (
        optimizer_step(who, which, step, lr=1e-2, clip_norm=1.0, number=4)
        for who, which in ((learner, optimizer), (other, fresh))
    )
    assert one == two


DAMAGE = {
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "progress.json", "manifest.json"]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(
    name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner = make_learner(vocabulary=40)
    optimizer = trained(learner, 1)
    checkpoints = Checkpoints(folder=tmp_path, store_digest="d")
    for step in (1, 2):
        newest = checkpoints.save(learner.student.model, optimizer, TrainingProgress(step=step))
    DAMAGE[damage](newest / name)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.resume(learner.student.model, optimizer).step == 1
    assert "step-00000002" in caplog.text
    assert name in caplog.text or name == "manifest.json"
    assert checkpoints.newest_step() == 1


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    learner = make_learner(vocabulary=40)
    optimizer = trained(learner, 1)
    checkpoints = Checkpoints(folder=tmp_path, store_digest="d", keep=2)
    for step in (9, 10, 11):
        checkpoints.save(learner.student.model, optimizer, TrainingProgress(step=step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


def test_a_checkpoint_of_another_store_is_not_taken(tmp_path: Path) -> None:
    learner = make_learner(vocabulary=40)
    optimizer = trained(learner, 1)
    checkpoints = Checkpoints(folder=tmp_path, store_digest="d")
    checkpoints.save(learner.student.model, optimizer, TrainingProgress(step=1))
    assert replace(checkpoints, store_digest="e").resume(learner.student.model, optimizer) == TrainingProgress()


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    learner = make_learner(vocabulary=40)
    assert Checkpoints(folder=tmp_path, store_digest="d").resume(learner.student.model, trained(learner, 1)).step == 0


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with durable_directory(target) as directory:
        (directory / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(StorageUnavailableError), durable_directory(target) as directory:
        (directory / "missing" / "a").write_text("2")
    assert (target / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-00000003").mkdir()
    (tmp_path / ".tmp-old-model").mkdir()
    (tmp_path / ".tmp-config.yaml").write_text("")
    for kept in ("kept", ".tmp-kept"):
        (tmp_path / kept).write_text("")
    remove_leftovers(tmp_path, "config.yaml", "model", "step-*")
    assert {path.name for path in tmp_path.iterdir()} == {"kept", ".tmp-kept"}


def test_the_curve_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"event": "step", "step": step, "loss": 0.1 * step} for step in range(1, 6)]
    with MetricsLog(path, last_step=0) as metrics:
        for line in lines:
            metrics.write(line)
        metrics.sync()
    assert read_metrics(path) == lines
    path.write_bytes(path.read_bytes() + b'{"event": "step", "ste')
    with MetricsLog(path, last_step=3) as metrics:
        metrics.write({"event": "step", "step": 4, "loss": 9.0})
    assert read_metrics(path) == [*lines[:3], {"event": "step", "step": 4, "loss": 9.0}]


def test_nothing_that_is_no_number_gets_into_the_curve(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", last_step=0) as metrics, pytest.raises(ValueError):
        metrics.write({"step": 1, "loss": math.nan})


CONFIG = {"store": "s", "run": "r", "kd_ratio": 0.7, "optimizer": {"lr": 1e-3, "betas": (0.9, 0.95)}, "steps": 5}


def test_a_run_directory_refuses_another_run_and_names_every_field(tmp_path: Path) -> None:
    run = RunDirectory(path=tmp_path)
    run.begin({**CONFIG, "kd_ratio": 0.1}, {"digest": "c"})
    run.begin(CONFIG, {"digest": "d"})  # nothing was lost: there is no checkpoint yet
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    run.begin({**CONFIG, "steps": 9, "run": "elsewhere"}, {"digest": "d"})
    assert "steps: 5" in (tmp_path / "config.yaml").read_text()
    with pytest.raises(IdentityError) as caught:
        run.begin({**CONFIG, "kd_ratio": 0.5, "optimizer": {"lr": 2e-3, "betas": (0.9, 0.95)}}, {"digest": "e"})
    assert caught.value.exit_code == 3
    for line in ("kd_ratio: 0.7 -> 0.5", "optimizer.lr: 0.001 -> 0.002", "store digest: d -> e"):
        assert line in caught.value.what


def test_a_finished_run_says_so_and_whether_it_has_its_model(tmp_path: Path) -> None:
    run = RunDirectory(path=tmp_path)
    run.begin(CONFIG, {"digest": "d", "teacher": {"name": "t"}})
    assert run.finished() is None
    run.finish(Finish(step=5, tokens=100, seconds=2.0))
    assert run.finished() == Finish(step=5, tokens=100, seconds=2.0)
    run.model.mkdir()
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for files in (["model.safetensors"], ["model.safetensors.index.json", *parts]):
        for name in ("config.json", *files):
            assert not run.has_model()
            (run.model / name).write_text("")
        assert run.has_model()
        for path in run.model.iterdir():
            path.unlink()
    assert json.loads((tmp_path / "run.json").read_text())["store"] == {"digest": "d", "teacher": {"name": "t"}}


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path) -> None:
    first, second = RunDirectory(path=tmp_path), RunDirectory(path=tmp_path)
    with first.held(), pytest.raises(UsageError, match="another process"), second.held():
        pass
    with second.held():
        pass


def test_a_run_directory_without_its_record_is_told(tmp_path: Path) -> None:
    run = RunDirectory(path=tmp_path)
    run.begin(CONFIG, {"digest": "d"})
    run.model.mkdir()
    (tmp_path / "run.json").unlink()
    with pytest.raises(UsageError, match="record"):
        run.begin(CONFIG, {"digest": "d"})
