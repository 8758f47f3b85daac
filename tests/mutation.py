"""Runs tests against a changed copy of the repository: `make mutants` asks which faults they notice.

`Mutation` holds the copy, and a process that has imported the libraries but none of our packages. For each mutant that
process is forked; the fork imports our packages from the copy, in which one file is changed. A change so takes as long
as its test. Processes that a test starts see the change too. The working tree is only read.
"""

from __future__ import annotations

import compileall
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from py_compile import PycInvalidationMode
from types import TracebackType
from typing import Any, Self

COPIED = ("pipeline", "stages", "storage", "tests", "configs", "pyproject.toml")
LIBRARIES = (
    "click",
    "datasets",
    "hypothesis",
    "matplotlib.figure",
    "numcodecs",
    "pandas",
    "pcodec",
    "pydantic",
    "pytest",
    "rich.progress",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "zarr",
)
_OF_THIS_RUN = ("PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")
LONGEST = 120  # seconds that a test may take


@dataclass(frozen=True)
class Mutant:
    """A fault that somebody could make, and the test that notices it.

    Attributes:
        fault: what is wrong then.
        text: stands once in the file.
        becomes: what stands there instead.
        test: `file::function` below tests/, `[parameters]` behind it where one case suffices.
    """

    fault: str
    text: str
    becomes: str
    test: str

    def applied(self, source: str) -> str:
        """Return the changed source.

        Raises:
            ValueError: the text does not stand there once, or what stands there then is no Python or nothing new.
        """
        found = source.count(self.text)
        if found != 1 or self.text == self.becomes:
            raise ValueError(f"{self.fault}: {self.text!r} occurs {found} times, expected 1, and another text instead")
        changed = source.replace(self.text, self.becomes)
        compile(changed, self.fault, "exec")
        return changed


@dataclass(kw_only=True)
class Answer:
    """What became of tests: `outcomes` by test id; `told` is the end of what they wrote.

    An outcome is passed, failed, or what else kept a test from being run to its end: skipped, error.
    """

    outcomes: dict[str, str] = field(default_factory=dict)
    told: str = ""

    def outcome(self, test: str) -> str:
        """Return failed if a case of the test failed, passed if all of them passed, else what became of it."""
        cases = {outcome for name, outcome in self.outcomes.items() if name == test or name.startswith(f"{test}[")}
        if "failed" in cases:
            return "failed"
        return ", ".join(sorted(cases)) or "not run"


class Mutation:
    """A copy of a repository whose tests can be run with changes. A context manager.

    Args:
        root: of the repository.
        libraries: imported once, before our own packages.
    """

    def __init__(self, root: Path, *, libraries: Sequence[str] = LIBRARIES) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="topk-distill-mutants-")
        self.copy = Path(self._scratch.name, "copy")
        self._libraries = libraries
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, self.copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            elif (root / name).exists():
                shutil.copy(root / name, self.copy / name)

    def __enter__(self) -> Self:
        # Compiled files are held against the source, not its date: two mutants may be of one size and second.
        compileall.compile_dir(self.copy, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        command = [sys.executable, __file__, str(self.copy), *self._libraries]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=self.copy, env=_environment(self.copy), **pipes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(BrokenPipeError):
            self._process.communicate(timeout=LONGEST)
        self._scratch.cleanup()

    def run(self, *tests: str) -> Answer:
        """Run tests, `tests/file.py::function`, in the copy as it is."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(tests) + "\n")
        self._process.stdin.flush()
        return Answer(**json.loads(self._process.stdout.readline()))

    def run_with(self, mutant: Mutant, file: str) -> Answer:
        """Run the test of a mutant with it. Raises ValueError as `Mutant.applied`."""
        path = self.copy / file
        source = path.read_text()
        path.write_text(mutant.applied(source))
        try:
            return self.run("-x", f"tests/{mutant.test}")
        finally:
            path.write_text(source)


def _environment(copy: Path) -> dict[str, str]:
    scratch = copy.parent / "tmp"
    scratch.mkdir()
    own = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_THIS_RUN}
    return {**inherited, **own}


def _serve(copy: Path, libraries: Sequence[str]) -> None:
    """Answer each line of stdin, a list of tests, with a line on stdout."""
    sys.path[0] = str(copy)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    for name in libraries:
        import_module(name)
    for line in sys.stdin:
        result, output = copy.parent / "result.json", copy.parent / "output.txt"
        result.unlink(missing_ok=True)
        output.write_bytes(b"")
        child = os.fork()
        if child == 0:
            _run_tests(copy, json.loads(line), result, output)
        _, status = os.waitpid(child, 0)
        told = output.read_text(errors="replace")[-4000:]
        if os.WIFSIGNALED(status):
            told += f"\nended by signal {os.WTERMSIG(status)}"
        outcomes = json.loads(result.read_text()) if result.exists() else {}
        print(json.dumps({"outcomes": outcomes, "told": told}), file=answers, flush=True)


def _run_tests(copy: Path, tests: Sequence[str], result: Path, output: Path) -> None:
    """Run tests in this process, which ends here."""
    import pytest

    outcomes: dict[str, str] = {}

    class Outcomes:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or not report.passed:
                outcomes[report.nodeid] = report.outcome if report.when == "call" or report.skipped else "error"

    try:
        signal.alarm(LONGEST * len(tests))
        with output.open("wb") as file, open(os.devnull) as nothing:
            for number, stream in enumerate((nothing, file, file)):
                os.dup2(stream.fileno(), number)
        imported = "ignore::pytest.PytestAssertRewriteWarning"  # of libraries that bring plugins for pytest
        options = ["-m", "", "-W", imported, "-p", "no:cacheprovider", f"--basetemp={copy.parent / 'pytest'}"]
        pytest.main([*options, *tests], plugins=[Outcomes()])
        result.write_text(json.dumps(outcomes))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2:])
