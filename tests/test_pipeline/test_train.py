"""pipeline.train on the tiny store: it learns, resumes exactly, refuses what is not its own, and finishes once."""

from __future__ import annotations

import json
import os
import shutil
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_process
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.train import TrainConfig
from pipeline.train import train
from pipeline.training.estimate import dry_run
from pipeline.training.events import Finished, Saved, Started, StepDone
from stages.batches.microbatch import MicroBatch
from stages.training.metrics import read_metrics
from stages.training.step import Learner
from storage.errors import IdentityError, UsageError
from storage.reader import StoreReader

TIME_KEYS = {"seconds", "tokens_per_second"}


def make_config(store: Path, teacher: Path, run: Path, **changes: Any) -> TrainConfig:
    values = {
        "store": store,
        "run": run,
        "student": {"init": "layers_of_teacher", "path": str(teacher), "layers": 2},
        "steps": 8,
        "tokens_per_step": 256,
        "tokens_per_batch": 128,
        "dtype": "float32",
        "device": "cpu",
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every": 3},
        "validation": {"every": 4, "sequences": 4},
    }
    return TrainConfig.model_validate({**values, **changes})


def curve(run: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIME_KEYS} for line in lines]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def reference(tiny_store: Path, tiny_teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("reference") / "run"
    list(train(make_config(tiny_store, tiny_teacher_dir, run)))
    return run


def test_events_tell_the_run_in_order(tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path) -> None:
    events = list(train(make_config(tiny_store, tiny_teacher_dir, tmp_path / "run")))
    kinds = [type(event).__name__ for event in events]
    steps = ["StepDone"] * 3
    assert kinds == [
        "Started",
        *steps,
        "Saved",
        "StepDone",
        "Validated",
        "StepDone",
        "StepDone",
        "Saved",
        "StepDone",
        "StepDone",
        "Validated",
        "Saved",
        "Finished",
    ]
    started, finished = events[0], events[-1]
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert (started.step, started.steps, finished.step) == (0, 8, 8)
    assert [event.step for event in events if isinstance(event, Saved)] == [3, 6, 8]
    assert finished.tokens == sum(event.tokens for event in events if isinstance(event, StepDone))


def test_the_student_learns(tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path) -> None:
    student = {"init": "from_config", "path": str(tiny_teacher_dir), "overrides": {"num_hidden_layers": 1}}
    common = {"student": student, "optimizer": {"lr": 3e-3}}
    validation = {"every": 20, "sequences": 64}
    config = make_config(tiny_store, tiny_teacher_dir, tmp_path / "run", steps=60, validation=validation, **common)
    first, *_, last = (event for event in train(config) if isinstance(event, StepDone))
    held_out = [event for event in read_metrics(tmp_path / "run" / "metrics.jsonl") if event["event"] == "validation"]
    assert [event["step"] for event in held_out] == [20, 40, 60]
    for name in ("loss", "kd", "ce"):
        assert getattr(last, name) < 0.9 * getattr(first, name)
        assert held_out[-1][name] < 0.9 * getattr(first, name)


def test_the_model_is_a_plain_directory_and_the_run_is_as_documented(reference: Path, tiny_teacher_dir: Path) -> None:
    assert {path.name for path in reference.iterdir() if not path.name.startswith(".")} == {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
    }
    model = AutoModelForCausalLM.from_pretrained(reference / "model")
    assert model.config.num_hidden_layers == 2
    tokenizer = AutoTokenizer.from_pretrained(reference / "model")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny_teacher_dir).get_vocab()
    card = (reference / "model" / "README.md").read_text()
    assert "0.7 * KDLoss() + 0.3 * cross-entropy" in card
    assert str(tiny_teacher_dir) not in card
    lines = curve(reference)
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 9))
    assert set(lines[0]) == {"event", "step", "loss", "kd", "ce", "kd_ratio", "lr", "grad_norm", "tokens", "rows"}


def test_a_finished_run_says_so_and_does_nothing(reference: Path, tiny_store: Path, tiny_teacher_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    (event,) = train(make_config(tiny_store, tiny_teacher_dir, reference))
    assert isinstance(event, Finished)
    assert event.already
    after = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    assert {path for path in before if before[path] != after[path]} <= {reference / ".lock"}


def test_a_run_that_is_older_than_a_field_of_the_configuration_goes_on(
    reference: Path, tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    for newer in ("kd_ratio_schedule", "distributed", "teacher_model"):
        del stored[newer]
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    (event,) = train(make_config(tiny_store, tiny_teacher_dir, run))
    assert isinstance(event, Finished)
    with pytest.raises(IdentityError, match="kd_ratio_schedule"):
        list(train(make_config(tiny_store, tiny_teacher_dir, run, kd_ratio_schedule={"warmup_steps": 2})))


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7])
def test_a_run_that_was_interrupted_goes_on_to_the_same_end(
    stop_after: int, reference: Path, tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_store, tiny_teacher_dir, tmp_path / "run")
    events = train(config)
    for event in events:
        if isinstance(event, StepDone) and event.step == stop_after:
            break
    events.close()  # type: ignore[attr-defined]  # a generator: what an exception in the caller does too
    # A checkpoint is written after its step is told, so what step 3 told may not be saved yet.
    started = next(iter(train(config)))
    assert isinstance(started, Started)
    assert started.step == (stop_after - 1) // 3 * 3
    *_, finished = train(config)
    assert isinstance(finished, Finished)
    done = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["event"] == "step"]
    assert finished.tokens == sum(line["tokens"] for line in done)
    assert finished.seconds == pytest.approx(sum(line["seconds"] for line in done))  # also of the first command
    assert curve(tmp_path / "run") == curve(reference)
    assert weights(tmp_path / "run") == weights(reference)


def test_a_run_that_was_interrupted_before_its_model_was_saved_only_saves_it(
    reference: Path, tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_store, tiny_teacher_dir, tmp_path / "run")
    list(takewhile(lambda event: not isinstance(event, Saved) or event.step < 8, train(config)))
    assert not (tmp_path / "run" / "model").exists()
    assert [type(event) for event in train(config)] == [Started, Finished]
    assert curve(tmp_path / "run") == curve(reference)
    assert weights(tmp_path / "run") == weights(reference)


def test_a_checkpoint_is_never_ahead_of_its_curve(
    tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a checkpoint gets its name, the lines until its step are on the disk."""
    run, on_disk, curves = tmp_path / "run", {}, {}
    sync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        sync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        on_disk[path.name] = path.read_bytes() if path.is_file() else b""

    def named(source: Path, target: Path) -> None:
        curves[target.name] = on_disk["metrics.jsonl"]
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", named)
    list(train(make_config(tiny_store, tiny_teacher_dir, run, steps=5, validation={"every": 2})))
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 5 + 3
    assert curves == {
        "step-00000003": b"".join(lines[:4]),
        "step-00000005": b"".join(lines),
        "model": b"".join(lines),
    }


@pytest.mark.parametrize("point", ["optimizer-step:5", "checkpoint-write:2", "checkpoint-rename:2"])
def test_a_killed_run_goes_on_to_the_same_end(
    point: str, reference: Path, tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_store, tiny_teacher_dir, tmp_path / "run")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    fault = {"TOPK_DISTILL_FAULT": point}
    killed = warm_process.run(warm_process.pipeline, "train", tmp_path / "train.yaml", environment=fault)
    assert killed.returncode == -9, killed.stderr
    assert f"fault point {point} reached" in killed.stderr
    started = next(iter(train(config)))
    assert isinstance(started, Started)
    assert started.step == 3
    list(train(config))
    assert curve(tmp_path / "run") == curve(reference)
    assert weights(tmp_path / "run") == weights(reference)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    reference: Path, tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tiny_store, tiny_teacher_dir, tmp_path / "run")
    list(takewhile(lambda event: not (isinstance(event, StepDone) and event.step == 7), train(config)))
    newest = tmp_path / "run" / "checkpoints" / "step-00000006" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8] + bytes(8))
    started, *_ = train(config)
    assert isinstance(started, Started)
    assert started.step == 3
    assert "falling back" in caplog.text
    assert curve(tmp_path / "run") == curve(reference)
    assert weights(tmp_path / "run") == weights(reference)


def test_micro_batches_change_nothing_but_rounding(
    reference: Path, tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    list(train(make_config(tiny_store, tiny_teacher_dir, tmp_path / "run", tokens_per_batch=256)))
    for ours, theirs in zip(curve(tmp_path / "run"), curve(reference), strict=True):
        assert ours.pop("event") == theirs.pop("event")
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize(("kd_ratio", "missing"), [(0.0, "kd"), (1.0, "ce")])
def test_one_part_alone(
    kd_ratio: float, missing: str, tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    list(train(make_config(tiny_store, tiny_teacher_dir, tmp_path / "run", kd_ratio=kd_ratio, steps=2)))
    assert [line[missing] for line in curve(tmp_path / "run")] == [None] * 3


def test_a_moving_kd_ratio_weighs_the_same_two_losses(tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path) -> None:
    moves = {"warmup_steps": 3, "fall_with_lr": True}
    config = make_config(tiny_store, tiny_teacher_dir, tmp_path / "run", kd_ratio=0.9, kd_ratio_schedule=moves)
    list(train(config))
    lines = [line for line in curve(tmp_path / "run") if line["event"] == "step"]
    assert [line["kd_ratio"] for line in lines[:3]] == pytest.approx([0.3, 0.6, 0.9])
    assert lines[-1]["kd_ratio"] < 0.9
    for line in lines:
        mixed = line["kd_ratio"] * line["kd"] + (1.0 - line["kd_ratio"]) * line["ce"]
        assert line["loss"] == pytest.approx(mixed, rel=1e-5)
    assert "kd_ratio rises over 3 steps, falls with the learning rate" in (tmp_path / "run/model/README.md").read_text()


def test_twins_with_and_without_the_teacher_see_the_same_tokens(
    reference: Path, tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    list(train(make_config(tiny_store, tiny_teacher_dir, tmp_path / "run", kd_ratio=0.0)))
    ours, theirs = curve(tmp_path / "run"), curve(reference)
    assert [line.get("tokens") for line in ours] == [line.get("tokens") for line in theirs]
    assert ours[0]["ce"] == pytest.approx(theirs[0]["ce"], rel=1e-6)  # same weights, same tokens


def test_another_configuration_is_refused(reference: Path, tiny_store: Path, tiny_teacher_dir: Path) -> None:
    with pytest.raises(IdentityError, match=r"kd_ratio: 0\.7 -> 0\.5; seed: 0 -> 1"):
        list(train(make_config(tiny_store, tiny_teacher_dir, reference, kd_ratio=0.5, seed=1)))


def test_a_run_may_be_prolonged_only_where_the_steps_done_stay_the_same(
    reference: Path, tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(IdentityError, match="learning rates of the 8 steps done"):
        list(train(make_config(tiny_store, tiny_teacher_dir, reference, steps=9)))
    constant = {"schedule": {"kind": "constant"}}
    list(train(make_config(tiny_store, tiny_teacher_dir, tmp_path / "long", steps=5, **constant)))
    list(train(make_config(tiny_store, tiny_teacher_dir, tmp_path / "short", steps=3, **constant)))
    events = list(train(make_config(tiny_store, tiny_teacher_dir, tmp_path / "short", steps=5, **constant)))
    assert isinstance(events[0], Started)
    assert events[0].step == 3
    assert weights(tmp_path / "short") == weights(tmp_path / "long")


def test_epochs_are_turned_into_steps(tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path) -> None:
    config = make_config(tiny_store, tiny_teacher_dir, tmp_path / "run", steps=None, epochs=1.0)
    estimate = dry_run(config)
    finished = list(train(config))[-1]
    assert isinstance(finished, Finished)
    assert finished.step == estimate.steps
    assert (estimate.epochs, estimate.tokens) == (1.0, finished.tokens)


def test_a_dry_run_estimates_and_writes_nothing(
    tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the faster of two micro-batches, as if each token took as long as theirs."""
    measured: list[int] = []

    def timed(learner: Learner, batch: MicroBatch) -> float:
        measured.append(batch.tokens)
        return 7.0 / len(measured)

    monkeypatch.setattr("pipeline.training.estimate._timed", timed)
    estimate = dry_run(make_config(tiny_store, tiny_teacher_dir, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert estimate.steps == 8
    assert estimate.memory_bytes > 16 * estimate.parameters
    assert estimate.seconds == pytest.approx(3.5 * estimate.tokens / measured[0])
    assert 6 * 256 < estimate.tokens <= 8 * 256
    assert estimate.epochs == pytest.approx(estimate.tokens / StoreReader(tiny_store).tokens)


def test_a_dry_run_measures_a_forward_and_a_backward(tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path) -> None:
    assert 0.0 < dry_run(make_config(tiny_store, tiny_teacher_dir, tmp_path / "run")).seconds < 60.0


def test_bfloat16_keeps_float32_weights(tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path) -> None:
    list(train(make_config(tiny_store, tiny_teacher_dir, tmp_path / "run", dtype="bfloat16", steps=2)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_run_goes_on_with_the_dtype_that_auto_meant(tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    list(train(make_config(tiny_store, tiny_teacher_dir, run, dtype="auto", steps=2)))
    meant = yaml.safe_load((run / "config.yaml").read_text())["dtype"]
    assert meant in ("float32", "bfloat16")
    for same in ("auto", meant):
        (event,) = train(make_config(tiny_store, tiny_teacher_dir, run, dtype=same, steps=2))
        assert isinstance(event, Finished)
    stored = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(stored.replace(f"dtype: {meant}", "dtype: auto"))  # as the first runs kept it
    (event,) = train(make_config(tiny_store, tiny_teacher_dir, run, dtype="auto", steps=2))
    assert isinstance(event, Finished)
    (run / "config.yaml").write_text(stored)
    other = "float32" if meant == "bfloat16" else "bfloat16"
    with pytest.raises(IdentityError, match=f"dtype: .*{meant}.* -> .*{other}"):
        list(train(make_config(tiny_store, tiny_teacher_dir, run, dtype=other, steps=2)))


def test_float16_is_refused(tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="float16"):
        list(train(make_config(tiny_store, tiny_teacher_dir, tmp_path / "run", dtype="float16")))


def test_a_window_longer_than_a_micro_batch_names_the_remedy(
    tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="a micro-batch holds at most 32") as caught:
        list(train(make_config(tiny_store, tiny_teacher_dir, tmp_path / "run", tokens_per_batch=32)))
    assert caught.value.where == "tokens_per_batch"


def test_the_record_of_a_run_names_store_and_teacher(reference: Path, tiny_store: Path, tiny_teacher_dir: Path) -> None:
    record = json.loads((reference / "run.json").read_text())
    assert record["store"]["path"] == str(tiny_store)
    assert record["store"]["teacher"]["directory"] == str(tiny_teacher_dir)
    assert record["finished"]["step"] == 8
