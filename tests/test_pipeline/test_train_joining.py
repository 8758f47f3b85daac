"""How the processes of a training run find each other, and what a process does when the others do not come.

What they do together is in test_train_parallel.py.
"""

from __future__ import annotations

import signal
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import warm_process
import yaml
from warm_process import WarmProcess, pipeline

from pipeline.config.train import TrainConfig
from pipeline.runtime import signals_end_process, termination_as_interrupt
from pipeline.training.processes import processes_of
from storage.errors import PeerLostError, UsageError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Where this process, rank 0 of two, waits for the other."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        number = int(place.getsockname()[1])
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": number}.items():
        monkeypatch.setenv(name, str(value))
    return number


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    student = {"init": "pretrained", "path": str(tmp_path / "student")}
    places = {"store": tmp_path / "store", "run": tmp_path / "run", "student": student}
    return TrainConfig.model_validate({**places, "steps": 1, "distributed": {"tp": 2}})


def join(config: TrainConfig) -> None:
    with processes_of(config):
        pass


def test_the_number_of_processes_must_be_right(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"distributed\.tp is 2, but there is 1 process") as caught:
        join(config)
    assert "torchrun --nproc-per-node 2 -m pipeline train" in str(caught.value.fix)
    assert "distributed: {tp: 1}, the only sizes that fit" in str(caught.value.fix)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="WORLD_SIZE is 3, but this process cannot join the others") as caught:
        join(config)
    assert "unset WORLD_SIZE" in str(caught.value.fix)


def test_a_port_in_use_is_a_mistake_of_the_setup(port: int, config: TrainConfig) -> None:
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(UsageError, match=r"WORLD_SIZE is 2, .* address already in use") as caught,
    ):
        join(config)
    assert f"MASTER_ADDR is 127.0.0.1, MASTER_PORT is {port}" in caught.value.what
    assert "\n" not in caught.value.what


def test_a_variable_that_is_no_number_is_a_mistake_of_the_setup(
    port: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_PORT", "port")
    with pytest.raises(UsageError, match=r"cannot join the others.*MASTER_PORT is port"):
        join(config)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="WORLD_SIZE is 'two', not a whole number of at least 1"):
        join(config)


def test_a_process_waits_for_the_others_for_a_limited_time(
    port: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.processes.JOIN_TIMEOUT", timedelta(milliseconds=100))
    with pytest.raises(PeerLostError, match=r"Timed out after .* waiting for clients") as caught:
        join(config)
    assert f"MASTER_ADDR is 127.0.0.1, MASTER_PORT is {port}" in str(caught.value.fix)


def test_both_signals_end_a_process_that_waits_unless_they_are_ignored() -> None:
    with termination_as_interrupt():
        handlers = [signal.getsignal(number) for number in SIGNALS]
        with signals_end_process():
            assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL, signal.SIG_DFL]
        assert [signal.getsignal(number) for number in SIGNALS] == handlers
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with signals_end_process():
                assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL, signal.SIG_IGN]
        finally:
            signal.signal(signal.SIGINT, previous)


def test_a_signal_ends_a_process_that_waits_for_one_that_failed(port: int, config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = (pipeline, "train", tmp_path / "train.yaml")
    waiting = WarmProcess(*command)
    failing = warm_process.run(*command, "--set", "no_such_key=1", environment={"RANK": "1"})
    assert failing.returncode == 2, failing.stderr
    reach(port)
    waiting.process.terminate()
    assert waiting.wait(timeout=60).returncode == -signal.SIGTERM


def reach(port: int) -> None:
    """Return as soon as rank 0 has opened the place where the others join."""
    dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=2))
