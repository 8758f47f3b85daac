"""Processes forked from one that has imported what they need already: a start takes milliseconds instead of 8 s.

The parent is the fork server of multiprocessing. It imports and does nothing else, so that no thread and no device is
forked. A child has an environment, a folder, output and signals of its own, can be killed, and ends in an exit code, as
if it had been started from a shell. That the real commands start is proved elsewhere, once for each kind of process.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

PRELOAD = [
    "pipeline.cli",
    "pipeline.extract",
    "pipeline.train",
    "pipeline.training.estimate",
    "pipeline.report.plots",
    "pipeline.terminal.progress",
    "storage.tools.convert",
    "pandas",  # which pyarrow imports as soon as it makes an array
    "transformers.models.llama.modeling_llama",
]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(PRELOAD)


class WarmProcess:
    """A process that calls a function. `wait` for it: only then is it gone for certain.

    Args:
        call: importable by name.
        arguments: of the function.
        environment: what differs from the environment of the test.
        folder: to work in; default: that of the test.
    """

    def __init__(
        self,
        call: Callable[..., object],
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._output = tempfile.TemporaryDirectory(prefix="topk-distill-process-")
        self._files = [Path(self._output.name, name) for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        whole = {**os.environ, **(environment or {})}
        place = folder or Path.cwd()
        begin = (self._files, whole, place, call, arguments)
        self.process = _SERVER.Process(target=_begin, args=begin, daemon=True)
        self.process.start()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Return exit code (negative for a signal) and output; after so many seconds, kill it and fail."""
        self.process.join(timeout)
        late = self.process.exitcode is None
        self.process.kill()
        self.process.join()
        out, err = (file.read_text() for file in self._files)
        self._output.cleanup()
        assert not late, f"no end after {timeout} s: {err}"
        return subprocess.CompletedProcess([], self.process.exitcode or 0, out, err)


def run(
    call: Callable[..., object],
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Call a function in a process, and wait for its end."""
    return WarmProcess(call, *arguments, environment=environment, folder=folder).wait()


def wait_for_all(processes: list[WarmProcess]) -> list[subprocess.CompletedProcess[str]]:
    """Wait for processes that depend on each other; none outlives the test."""
    try:
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            process.process.kill()


def pipeline(*arguments: object) -> None:
    """What `python -m pipeline` does with these arguments."""
    from pipeline.cli import main

    main([str(argument) for argument in arguments], prog_name="pipeline")


def pipeline_on_terminal(terminal: str, *arguments: object) -> None:
    """Do the same as the leader of a session whose terminal this is."""
    os.setsid()
    descriptor = os.open(terminal, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(descriptor, number)
    pipeline(*arguments)


def script(text: str) -> None:
    """What `python -c` does with this text."""
    exec(text, {"__name__": "__main__"})


def _begin(
    output: list[Path],
    environment: Mapping[str, str],
    folder: Path,
    call: Callable[..., object],
    arguments: tuple[object],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(output, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = [getattr(call, "__name__", "")]
    call(*arguments)
