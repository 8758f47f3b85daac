"""Exceptions of every origin: what the user reads, and the exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import click
import pytest
import torch

from pipeline.terminal.errors import failure_of
from storage.errors import (
    CorruptionError,
    DistillError,
    IdentityError,
    NumericsError,
    OutOfSpaceError,
    PeerLostError,
    StorageUnavailableError,
    UsageError,
)


def os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code), "/some/file")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (click.UsageError("x"), 2),
        (IdentityError("x"), 3),
        (CorruptionError("x"), 4),
        (StorageUnavailableError("x"), 5),
        (os_error(errno.EROFS), 5),
        (os_error(errno.EACCES), 5),
        (os_error(errno.EIO), 5),
        (os_error(errno.ENOENT), 5),
        (os_error(errno.ENAMETOOLONG), 5),
        (os_error(errno.ELOOP), 5),
        (OutOfSpaceError("x"), 6),
        (os_error(errno.ENOSPC), 6),
        (os_error(errno.EDQUOT), 6),
        (os_error(errno.EFBIG), 6),
        (MemoryError(), 6),
        (torch.OutOfMemoryError("CUDA out of memory"), 6),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 6),
        (NumericsError("x"), 7),
        (PeerLostError("x"), 75),
        (OSError(errno.ENOENT, "no file is named"), 70),
        (RuntimeError("x"), 70),
        (AssertionError(), 70),
        (KeyboardInterrupt(), 75),
        (click.Abort(), 75),
    ],
)
def test_exit_code(error: BaseException, code: int) -> None:
    failure = failure_of(error, command="pipeline extract", resumable=True)
    assert failure.exit_code == code
    assert [line.split(":")[0] for line in failure.lines()] in (["error", "where", "fix"], ["error", "where"])


def test_interruption_of_a_command_that_cannot_go_on() -> None:
    failure = failure_of(KeyboardInterrupt(), command="pipeline inspect", resumable=False)
    assert (failure.exit_code, failure.fix) == (130, None)


def test_real_allocation_failure_of_torch_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.float32)
    assert failure_of(caught.value, command="pipeline train", resumable=True).exit_code == 6


def test_a_bug_says_so_in_one_line_each_with_the_place() -> None:
    from storage.values import canonical_json

    with pytest.raises(TypeError) as caught:
        canonical_json({"a": object()})
    failure = failure_of(caught.value, command="pipeline plan", resumable=False)
    assert failure.what == "this is a bug in topk-distill: TypeError: Object of type object is not JSON serializable"
    assert failure.where is not None
    assert failure.where.startswith("pipeline plan, storage/values.py:")
    assert "--debug" in (failure.fix or "")


def test_a_message_with_line_breaks_stays_on_one_line() -> None:
    failure = failure_of(ValueError("a\n  b"), command="pipeline plan", resumable=False)
    assert failure.what.endswith("ValueError: a b")


def test_own_errors_keep_their_words() -> None:
    error: DistillError = CorruptionError("shard 3 is damaged", where="shards/3", fix="pipeline repair")
    failure = failure_of(error, command="pipeline train", resumable=True)
    assert failure.lines() == ["error: shard 3 is damaged", "where: shards/3", "fix: pipeline repair"]


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [
        (signal.SIGTERM, "extract", 75),
        (signal.SIGINT, "extract", 75),
        (signal.SIGHUP, "extract", 75),
        (signal.SIGTERM, "train", 75),
        (signal.SIGINT, "convert", 75),
        (signal.SIGTERM, "demo", 75),
        (signal.SIGTERM, "inspect", 130),
    ],
)
def test_signals_end_without_a_traceback(number: signal.Signals, name: str, code: int) -> None:
    """With 75 where the same command goes on."""
    script = (
        "import os, signal, click\n"
        "from pipeline.terminal.application import Application\n"
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "main = click.group(cls=Application)(lambda: None)\n"
        f"main.command('{name}')(lambda: os.kill(os.getpid(), {int(number)}))\n"
        f"main(['{name}'], prog_name='pipeline')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert done.stderr.strip().splitlines() == [
        "error: interrupted",
        f"where: pipeline {name}",
        *(["fix: run the same command again to go on"] if code == 75 else []),
    ]
