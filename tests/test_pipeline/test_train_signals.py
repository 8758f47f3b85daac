"""pipeline.train under Ctrl-C, SIGTERM, SIGHUP and SIGUSR1: it saves the step in work, ends in 75, and goes on exactly.

Several processes are in test_train_parallel.py.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import warm_process
import yaml
from click.testing import CliRunner
from warm_process import WarmProcess

import pipeline.train
from pipeline.cli import main
from pipeline.config.train import TrainConfig
from pipeline.runtime import STOP_SIGNALS, stop_signals_noted
from pipeline.train import train
from pipeline.training.events import Finished, Saved, Started, StepDone
from stages.training.metrics import read_metrics
from storage.errors import StoppedError

TIME_KEYS = {"seconds", "tokens_per_second"}
Content = Callable[..., dict[str, Any]]
Raise = Callable[..., None]


@pytest.fixture(scope="module")
def content(tiny_store: Path, tiny_teacher_dir: Path) -> Content:
    """Eight steps that save nothing before ten minutes have passed, with dropout, so that random numbers count."""

    def make(run: Path, **changes: Any) -> dict[str, Any]:
        shape = {"num_hidden_layers": 1, "attention_dropout": 0.1}
        return {
            "store": str(tiny_store),
            "run": str(run),
            "student": {"init": "from_config", "path": str(tiny_teacher_dir), "overrides": shape},
            "steps": 8,
            "tokens_per_step": 256,
            "dtype": "float32",
            "device": "cpu",
            "validation": {"every": 4, "sequences": 4},
            **changes,
        }

    return make


@pytest.fixture(scope="module")
def undisturbed(content: Content, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    list(train(TrainConfig.model_validate(content(run))))
    return run


@pytest.fixture
def raise_in(monkeypatch: pytest.MonkeyPatch) -> Raise:
    """Lets a signal, or several, come as the loop calls one of its parts for the so manieth time."""

    def arrange(name: str, call: int, *numbers: signal.Signals) -> None:
        real, calls = getattr(pipeline.train, name), count(1)

        def disturbed(*arguments: Any, **named: Any) -> Any:
            if next(calls) == call:
                for number in numbers:
                    signal.raise_signal(number)
            return real(*arguments, **named)

        monkeypatch.setattr(pipeline.train, name, disturbed)

    return arrange


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*"))


def require_same(run: Path, other: Path) -> None:
    """The same curve but for times, and the same weights to the last bit."""
    curves = [
        [{key: value for key, value in line.items() if key not in TIME_KEYS} for line in read_metrics(one)]
        for one in (run / "metrics.jsonl", other / "metrics.jsonl")
    ]
    assert curves[0] == curves[1]
    weights = [(one / "model" / "model.safetensors").read_bytes() for one in (run, other)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("part", "call", "number", "stops"),
    [
        ("optimizer_step", 1, signal.SIGINT, 1),  # before the first step has ended
        ("optimizer_step", 4, signal.SIGTERM, 4),  # where a validation is due
        ("validate", 1, signal.SIGHUP, 4),  # a validation may take minutes
        ("_save", 1, signal.SIGTERM, None),  # the checkpoint of the last step: the model is all that is left to do
        ("optimizer_step", 7, signal.SIGUSR1, 7),
        ("save_student", 1, signal.SIGTERM, None),
    ],
)
def test_a_signal_saves_the_next_step_and_the_same_command_goes_on(
    part: str, call: int, number: signal.Signals, stops: int | None, content: Content, undisturbed: Path,
    raise_in: Raise, tmp_path: Path,
) -> None:  # fmt: skip
    config = TrainConfig.model_validate(content(tmp_path / "run"))
    handlers = [signal.getsignal(one) for one in STOP_SIGNALS]
    raise_in(part, call, number)
    if stops is None:
        assert isinstance(list(train(config))[-1], Finished)
    else:
        with pytest.raises(StoppedError, match=f"stopped by {number.name} after step {stops}, which is saved") as told:
            list(train(config))
        assert (told.value.exit_code, saved_steps(config.run)) == (75, [stops])
        started, *_, finished = train(config)
        assert isinstance(started, Started)
        assert isinstance(finished, Finished)
        assert started.step == stops
    require_same(config.run, undisturbed)
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == handlers


def test_a_second_signal_leaves_at_once(content: Content, undisturbed: Path, raise_in: Raise, tmp_path: Path) -> None:
    config = TrainConfig.model_validate(content(tmp_path / "run"))
    raise_in("optimizer_step", 3, signal.SIGTERM, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        list(train(config))
    assert saved_steps(config.run) == []
    list(train(config))
    require_same(config.run, undisturbed)


def test_what_is_ignored_stays_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_signals_noted() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked.signal is None
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_the_command_says_what_is_saved(content: Content, raise_in: Raise, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(content(tmp_path / "run")))
    raise_in("optimizer_step", 3, signal.SIGTERM)
    told = CliRunner().invoke(main, ["train", str(path)], prog_name="pipeline")
    assert told.exit_code == 75
    assert told.stderr.splitlines()[-3:] == [
        "error: stopped by SIGTERM after step 3, which is saved",
        f"where: {tmp_path / 'run'}",
        "fix: run the same command again to go on",
    ]


def test_a_signal_while_the_report_is_written_says_that_the_training_is_finished(
    content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(content(tmp_path / "run", steps=1)))
    page = "pipeline.report.page.read_curves"
    with monkeypatch.context() as patch:
        patch.setattr(page, lambda run: signal.raise_signal(signal.SIGTERM))
        told = CliRunner().invoke(main, ["train", str(path)], prog_name="pipeline")
    assert told.exit_code == 75
    assert "the training is finished and its model saved" in told.stderr
    assert not (tmp_path / "run" / "report.html").exists()
    assert CliRunner().invoke(main, ["train", str(path)], prog_name="pipeline").exit_code == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_a_terminal_that_is_closed_costs_no_step(content: Content, tmp_path: Path) -> None:
    endless = content(tmp_path / "run", steps=10**6, schedule={"kind": "constant"}, validation={"every": 2})
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(endless))
    ours, theirs = pty.openpty()
    started = WarmProcess(warm_process.pipeline_on_terminal, os.ttyname(theirs), "train", tmp_path / "train.yaml")
    seen = b""
    deadline = time.monotonic() + 60
    while b"step 2: held-out" not in seen and started.process.exitcode is None and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.5)[0]:
            seen += os.read(ours, 4096)
    assert b"step 2: held-out" in seen, (started.wait(timeout=1), seen)
    os.close(ours)
    os.close(theirs)
    done = started.wait(timeout=120)
    assert done.returncode == 75
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert saved_steps(tmp_path / "run") == [last]


def test_the_time_between_checkpoints_is_ten_minutes(
    content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig.model_validate(content(tmp_path / "run"))
    assert (config.checkpoint.every, config.checkpoint.seconds, config.checkpoint.steps) == ("10 min", 600.0, None)
    clock = count(0.0, 250.0)  # four minutes and more from one look at it to the next
    monkeypatch.setattr("pipeline.training.saving.time", SimpleNamespace(monotonic=lambda: next(clock)))
    kinds = [type(event) for event in train(config) if isinstance(event, StepDone | Saved)]
    assert [index for index, kind in enumerate(kinds) if kind is Saved] == [3, 7, 10]


@pytest.mark.parametrize(("every", "seconds"), [("90 s", 90.0), ("10min", 600.0), ("2 m", 120.0), ("1 h", 3600.0)])
def test_times_between_checkpoints(every: str, seconds: float, content: Content, tmp_path: Path) -> None:
    config = TrainConfig.model_validate(content(tmp_path / "run", checkpoint={"every": every}))
    assert config.checkpoint.seconds == seconds
