"""stages/training: checkpoints, metrics and the run directory."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import make_learner, make_step
from torch import Tensor

from stages.durable import durable_directory, remove_leftovers
from stages.training.checkpoint import Checkpoints, TrainingProgress
from stages.training.metrics import MetricsLog, read_metrics
from stages.training.optimizer import AdamWSettings, build_optimizer
from stages.training.run import Finish, RunDirectory
from stages.training.step import Learner, optimizer_step
from storage.errors import IdentityError, StorageUnavailableError, UsageError


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
    assert checkpoints.newest().step == 1


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
    with MetricsLog(tmp_path / "metrics.jsonl", last_step=0) as metrics, pytest.raises(ValueError, match="not JSON"):
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
