"""When a run saves itself, and when it stops: all its processes at the same step, whichever of them was asked.

What each has to say rides on the reduction that a step's gradient needs anyway: that it was asked to stop, and, for the
main process, whose clock counts, that the time between two checkpoints has passed.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config.train import CheckpointConfig
from pipeline.runtime import StopRequest
from stages.parallel.processes import Processes
from storage.errors import StoppedError

_STOP, _SAVE = 0, 1


class Saving:
    """Which steps a run saves.

    Args:
        config: how often.
        asked: whether this process was asked to stop.
        processes: that train together.
    """

    def __init__(self, config: CheckpointConfig, asked: StopRequest, processes: Processes) -> None:
        self._config = config
        self._asked = asked
        self._main = processes.main
        self._alone = processes.mesh is None
        self.saved()

    def wishes(self, device: torch.device) -> Tensor:
        """Return what this process has to say, float32 [2]; summed over all, it is for `stops` and `saves`."""
        due = self._main and time.monotonic() - self._saved >= self._config.seconds
        return torch.tensor([float(self._asked.signal is not None), float(due)], device=device)

    def stops(self, wishes: Tensor) -> bool:
        """Tell whether any process was asked to stop. A process alone says so at once, several agree in a step."""
        return bool(wishes[_STOP] > 0) or (self._alone and self._asked.signal is not None)

    def saves(self, wishes: Tensor, number: int) -> bool:
        """Tell whether step `number` is to be saved, apart from the last one and the one that a run stops at."""
        return bool(wishes[_SAVE] > 0) if self._config.steps is None else number % self._config.steps == 0

    def saved(self) -> None:
        """Begin the time between two checkpoints."""
        self._saved = time.monotonic()

    def stopped(self, run: Path, number: int) -> StoppedError:
        """Return the error of a run that stops at step `number`, which is saved."""
        by = "in another process" if self._asked.signal is None else f"by {self._asked.signal.name}"
        return StoppedError(
            f"stopped {by} after step {number}, which is saved",
            where=str(run),
            fix="run the same command again to go on",
        )
