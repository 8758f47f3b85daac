"""What lies in a run directory: rotation of checkpoints, damaged and foreign files, a disk that is full."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from stages.durable import durable_directory, replace_file
from stages.student.save import CardFacts, save_student
from stages.training.checkpoint import Checkpoints, TrainingProgress
from stages.training.metrics import MetricsLog, read_metrics
from stages.training.run import RunDirectory, read_record
from stages.training.schedule import Schedule
from stages.training.step import require_finite_weights
from storage.errors import (
    DistillError,
    IdentityError,
    NumericsError,
    OutOfSpaceError,
    StorageUnavailableError,
    UsageError,
)

CONFIG = {"store": "s", "run": "r", "kd_ratio": 0.7}


def save(checkpoints: Checkpoints, *steps: int) -> None:
    model = nn.Linear(2, 2)
    for step in steps:
        checkpoints.save(model, torch.optim.AdamW(model.parameters()), TrainingProgress(step=step))


def resume(checkpoints: Checkpoints) -> int:
    model = nn.Linear(2, 2)
    return checkpoints.resume(model, torch.optim.AdamW(model.parameters())).step


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_checkpoint_outlives_damaged_ones_of_later_steps(tmp_path: Path) -> None:
    checkpoints = Checkpoints(folder=tmp_path, store_digest="d", keep=1)
    save(checkpoints, 2)
    (tmp_path / "step-00000009").mkdir()
    save(checkpoints, 3)
    assert "step-00000003" in names(tmp_path)
    assert "step-00000002" not in names(tmp_path)
    assert checkpoints.newest().step == 3


def test_resuming_sets_newer_checkpoints_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(folder=tmp_path, store_digest="d", keep=3)
    save(checkpoints, 2, 4)
    save(Checkpoints(folder=tmp_path, store_digest="e", keep=3), 6)
    (tmp_path / "step-00000004" / "model.safetensors").write_bytes(b"")
    for _ in range(2):
        assert resume(checkpoints) == 2
    assert names(tmp_path) == ["step-00000002", "unusable-step-00000004", "unusable-step-00000006"]
    assert "set aside as unusable-step-00000006" in caplog.text


def test_buffers_come_back_but_for_those_that_a_model_makes_itself(tmp_path: Path) -> None:
    def model(mean: float) -> nn.Module:
        made = nn.Linear(2, 2)
        made.register_buffer("mean", torch.tensor(mean))
        made.register_buffer("table", torch.tensor(mean), persistent=False)
        return made

    saved, other = model(3.0), model(0.0)
    checkpoints = Checkpoints(folder=tmp_path, store_digest="d")
    checkpoints.save(saved, torch.optim.AdamW(saved.parameters()), TrainingProgress(step=1))
    checkpoints.resume(other, torch.optim.AdamW(other.parameters()))
    assert (float(other.mean), float(other.table)) == (3.0, 0.0)


def test_what_is_written_may_be_read_as_any_file_of_the_process(tmp_path: Path) -> None:
    """safetensors makes its files private: whoever may read the directory could not load the weights."""
    save(Checkpoints(folder=tmp_path, store_digest="d"), 1)
    (tmp_path / "plain").touch()
    files = [*(tmp_path / "step-00000001").iterdir(), tmp_path / "plain"]
    assert len({path.stat().st_mode for path in files}) == 1


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the operating system refuses as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_model(folder: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    facts = CardFacts(
        teacher="t", store_digest="d", store_id="i", initialisation="x", loss="y", parameters=1, steps=1, tokens=1
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=1, **shape))
    with file_size_limit(16_384):
        save_student(model, folder / "model", tokenizer_files={}, facts=facts)


def save_checkpoint(folder: Path) -> None:
    model = nn.Linear(128, 128)
    with file_size_limit(16_384):
        Checkpoints(folder=folder, store_digest="d").save(
            model, torch.optim.AdamW(model.parameters()), TrainingProgress(step=1)
        )


@pytest.mark.parametrize("write", [save_model, save_checkpoint])
def test_weights_that_the_disk_refuses_are_told(write: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="File too large") as caught:
        write(tmp_path)
    assert caught.value.exit_code == 6
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, OutOfSpaceError.exit_code), (errno.EDQUOT, 6), (errno.EFBIG, 6), (errno.EIO, 5)],
)
def test_what_safetensors_says_of_the_disk_becomes_an_exit_code(number: int, code: int, tmp_path: Path) -> None:
    with pytest.raises(DistillError) as caught, durable_directory(tmp_path / "model"):
        raise SafetensorError(f"Error while serializing: I/O error: refused (os error {number})")
    assert caught.value.exit_code == code


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_told_by_name(value: float) -> None:
    model = nn.Linear(2, 2)
    require_finite_weights(model, 3)
    with torch.no_grad():
        model.bias[1] = value
    with pytest.raises(NumericsError, match=r"bias has a weight.*after step 3") as caught:
        require_finite_weights(model, 3)
    assert "in a new run directory" in (caught.value.fix or "")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is asked of the operating system: ("sync", path) and ("name", new path), in order."""
    made: list[tuple[str, str]] = []
    sync, rename, replace = os.fsync, os.rename, os.replace

    def synced(descriptor: int) -> None:
        made.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def named(source: Path, target: Path, by: Callable[[Path, Path], None]) -> None:
        made.append(("name", str(target)))
        by(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", lambda source, target: named(source, target, rename))
    monkeypatch.setattr(os, "replace", lambda source, target: named(source, target, replace))
    return made


def test_a_directory_is_on_the_disk_before_it_has_its_name(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    """Every file and the names in it first, and its own name before anything goes on."""
    save(Checkpoints(folder=tmp_path, store_digest="d"), 7)
    files = ["manifest.json", "model.safetensors", "optimizer.safetensors", "progress.json", "random.safetensors"]
    new, final = tmp_path / ".tmp-step-00000007", tmp_path / "step-00000007"
    assert names(final) == files
    assert sorted(calls[:5]) == [("sync", str(new / name)) for name in files]
    assert calls[5:] == [("sync", str(new)), ("name", str(final)), ("sync", str(tmp_path))]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    replace_file(tmp_path / "run.json", b"{}")
    path = str(tmp_path / "run.json")
    assert calls == [("sync", str(tmp_path / ".tmp-run.json")), ("name", path), ("sync", str(tmp_path))]


OF_OTHERS = ["model", "checkpoints", "metrics.jsonl", "config.yaml", "report.html", "plan.json", "config.json"]


@pytest.mark.parametrize("name", [*OF_OTHERS, "run.json"])
def test_a_directory_of_something_else_is_left_alone(name: str, tmp_path: Path) -> None:
    content = '{"mine": 1}'
    (tmp_path / name).write_text(content)
    (tmp_path / ".tmp-model").mkdir()
    told = "record cannot be read" if name == "run.json" else "not a run directory"
    with pytest.raises(UsageError, match=told), RunDirectory(path=tmp_path).held():
        pass
    assert names(tmp_path) == [".tmp-model", name]
    assert (tmp_path / name).read_text() == content


def test_a_run_removes_what_it_left_itself_and_nothing_else(tmp_path: Path) -> None:
    run = RunDirectory(path=tmp_path)
    (tmp_path / ".tmp-mine").mkdir()
    (tmp_path / ".tmp-model").mkdir()
    (tmp_path / ".lock").write_text("mine")
    with run.held():  # no run yet: nothing here is a run's
        assert names(tmp_path) == [".lock", ".tmp-mine", ".tmp-model"]
        run.begin(CONFIG, {"digest": "d"})
    for leftover in (".tmp-old-model", ".tmp-config.yaml", "checkpoints/.tmp-step-00000003"):
        (tmp_path / leftover).mkdir(parents=True)
    with run.held():
        assert names(tmp_path) == [".lock", ".tmp-mine", "checkpoints", "config.yaml", "run.json"]
        assert names(run.checkpoints) == []
    assert (tmp_path / ".lock").read_text() == "mine"


@pytest.mark.parametrize("writes", [0, 1])
def test_a_run_that_was_killed_at_its_birth_begins_again(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the file after the first `writes` ones gets its name."""
    run, rename, renamed = RunDirectory(path=tmp_path / "run"), os.replace, []

    def stopped(source: Path, target: Path) -> None:
        if len(renamed) == writes:
            raise KeyboardInterrupt
        renamed.append(target)
        rename(source, target)

    with monkeypatch.context() as patch, run.held():
        patch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            run.begin(CONFIG, {"digest": "d"})
    for _ in range(2):
        with run.held():
            run.begin(CONFIG, {"digest": "d"})
    assert names(run.path) == [".lock", "config.yaml", "run.json"]


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_run_directory_that_is_a_file_is_told(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file") as caught, RunDirectory(path=tmp_path / place).held():
        pass
    assert caught.value.where == str(tmp_path / place)


def test_a_run_directory_that_cannot_be_looked_into_is_told(tmp_path: Path) -> None:
    path = tmp_path / (300 * "x")
    with pytest.raises(StorageUnavailableError, match="too long") as caught, RunDirectory(path=path).held():
        pass
    assert caught.value.where == str(path)


def test_a_partial_store_that_has_grown_needs_a_new_run_directory(tmp_path: Path) -> None:
    run = RunDirectory(path=tmp_path)
    run.begin(CONFIG, {"digest": "d", "id": "i"})
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    with pytest.raises(IdentityError, match="the store has grown since this run began") as caught:
        run.begin(CONFIG, {"digest": "e", "id": "i"})
    assert "new run directory" in (caught.value.fix or "")
    with pytest.raises(IdentityError, match="store digest: d -> e"):
        run.begin(CONFIG, {"digest": "e", "id": "j"})


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "no", '{"store": {"digest": "d"}, "finished": {"steps": 1}}', "[" * 10**5]
)
def test_a_record_that_is_damaged_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UsageError, match="record cannot be read"):
        read_record(tmp_path / "run.json")


@pytest.mark.parametrize("text", ["", "- 1", "3", "a: [", "\x00"])
def test_a_stored_configuration_that_is_damaged_is_told(text: str, tmp_path: Path) -> None:
    run = RunDirectory(path=tmp_path)
    run.begin(CONFIG, {"digest": "d"})
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        run.begin(CONFIG, {"digest": "d"})
    assert str(caught.value.where).startswith(str(tmp_path / "config.yaml"))


def test_every_step_done_keeps_its_learning_rate(tmp_path: Path) -> None:
    """Longer, the last of the steps done alone would have had another one: before the decay it began at."""
    run, schedule = RunDirectory(path=tmp_path), Schedule(kind="wsd", steps=5, decay_steps=2)
    with MetricsLog(run.metrics, last_step=0) as metrics:
        for step in range(5):
            metrics.write({"event": "step", "step": step + 1, "lr": 0.1 * schedule.factor(step)})
    run.check_learning_rates(schedule, peak=0.1, done=5)
    longer = replace(schedule, steps=6)
    run.check_learning_rates(longer, peak=0.1, done=4)
    with pytest.raises(IdentityError, match=r"step 5 had 0\.05, would have 0\.1"):
        run.check_learning_rates(longer, peak=0.1, done=5)
    with pytest.raises(IdentityError, match="step 1 had"):
        run.check_learning_rates(schedule, peak=0.2, done=5)


@pytest.mark.parametrize("line", ['{"event": "step"}', '{"step": 1}', '{"event": "step", "step": "1"}'])
def test_a_line_of_the_curve_that_names_no_step_is_told(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\n' + line + "\n")
    with pytest.raises(UsageError, match="line 2 has no event or no step"):
        read_metrics(path)


@pytest.mark.parametrize(
    "torn",
    [
        '{"event": "step", "step": 2}',  # whole but for its end: the next line would be glued to it
        '{"event": "step", "st',
        '\0\0\0\n{"event": "step", "step": 3}\n',  # a page that was lost, before one that was not
    ],
)
def test_the_curve_ends_before_what_is_not_whole(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\n' + torn)
    with MetricsLog(path, last_step=1) as metrics:
        metrics.write({"event": "step", "step": 4})
    assert [line["step"] for line in read_metrics(path)] == [1, 4]


def test_a_damaged_line_in_the_middle_of_the_curve_is_told_and_costs_no_later_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"event": "step", "step": {step}, "loss": 1.0}}\n' for step in (1, 2, 3)]
    damaged = lines[0] + lines[1][:9] + "\n" + lines[2]
    path.write_text(damaged)
    for read in (read_metrics, lambda path: MetricsLog(path, last_step=3)):
        with pytest.raises(UsageError, match="line 2 is not a whole JSON object"):
            read(path)
    assert path.read_text() == damaged
    path.write_text("".join(lines) + "\0" * 100 + "\n")
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]


def test_a_checkpoint_of_another_model_is_refused_by_the_name_of_a_tensor(tmp_path: Path) -> None:
    checkpoints = Checkpoints(folder=tmp_path, store_digest="d")
    save(checkpoints, 2)
    for other, told in (
        (nn.Linear(2, 3), r"another model: bias is \(2,\) there and \(3,\) here"),
        (nn.Linear(2, 2, bias=False), r"another model: bias is \(2,\) there and missing here"),
        (nn.Sequential(nn.Linear(2, 2)), "another model: 0.bias is missing there"),
    ):
        with pytest.raises(IdentityError, match=told) as caught:
            checkpoints.resume(other, torch.optim.AdamW(other.parameters()))
        assert caught.value.where == str(tmp_path / "step-00000002")
    assert names(tmp_path) == ["step-00000002"]
