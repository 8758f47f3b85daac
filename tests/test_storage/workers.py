"""Real processes that work on a store, and can be killed, stopped and woken: the near end of `store_worker.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """How a worker ended.

    Attributes:
        code: exit code, negative for a signal; None if it is only stopped.
        made: commit records that it has made.
        error: what it says went wrong.
    """

    code: int | None
    made: list[str] = field(default_factory=list)
    error: str = ""


class Workers:
    """Starts workers. Close it in the end."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(HERE / "store_worker.py")],
            env={**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def start(self, path: Path, *, shards: int = 1, longest: int = 6, **options: Any) -> int:
        """Start a worker on a store; options as `store_worker.write` lists them. Returns its process number."""
        child: int = self._ask(do="start", job={"path": str(path), "shards": shards, "longest": longest, **options})[
            "child"
        ]
        return child

    def wait(self, child: int, *, kill_after: float | None = None) -> Ended:
        """Wait until it stops or ends; kill it after so many seconds."""
        answer = self._ask(do="wait", child=child, kill_after=kill_after)
        if answer["status"] == "stopped":
            return Ended(None)
        told = answer["told"]
        return Ended(answer["status"], told.get("made", []), told.get("error", ""))

    def run(self, path: Path, **options: Any) -> Ended:
        """Start a worker and wait for it."""
        return self.wait(self.start(path, **options))

    def wake(self, child: int) -> None:
        """Let a stopped worker go on."""
        self._ask(do="signal", child=child, signal=int(signal.SIGCONT))

    def close(self) -> None:
        """End the program that starts workers."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(30)
