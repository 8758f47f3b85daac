"""A process forked from a warm one is as good as one from a shell."""

from __future__ import annotations

import signal

import pytest
import warm_process
from warm_process import PRELOAD, WarmProcess, pipeline, script, wait_for_all


def test_it_has_a_folder_an_environment_and_output_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("INHERITED", "a")
    text = "import os, sys; print(os.getcwd(), os.environ['INHERITED'], os.environ['OWN']); print('b', file=sys.stderr)"
    processes = [WarmProcess(script, text, environment={"OWN": own}, folder=tmp_path) for own in "xy"]
    assert [(done.returncode, done.stdout, done.stderr) for done in wait_for_all(processes)] == [
        (0, f"{tmp_path} a {own}\n", "b\n") for own in "xy"
    ]


def test_it_is_forked_from_one_thread_that_has_imported_everything_and_computed_nothing():
    text = (
        "import os, sys, torch\n"
        f"assert not {set(PRELOAD)!r} - set(sys.modules)\n"
        "assert len(os.listdir('/proc/self/task')) == 1\n"
        "assert torch.get_num_threads() == 1\n"
    )
    done = warm_process.run(script, text)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("import sys; sys.exit(75)", 75, ""),
        ("raise ValueError('something')", 1, "ValueError: something"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", 1, "KeyboardInterrupt"),
    ],
)
def test_exit_codes(text, code, told):
    done = warm_process.run(script, text)
    assert done.returncode == code
    assert told in done.stderr


def test_one_that_does_not_end_is_killed():
    waiting = WarmProcess(script, "import signal; signal.pause()")
    with pytest.raises(AssertionError, match="no end after"):
        waiting.wait(timeout=0.1)
    assert waiting.process.exitcode == -signal.SIGKILL


def test_the_command_line():
    done = warm_process.run(pipeline, "train", "--set", "steps=1")
    assert done.returncode == 2
    assert "Missing argument 'CONFIG'" in done.stderr
