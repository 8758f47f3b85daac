"""What launchers say about the processes that they start: torchrun, srun, and Slurm's job arrays."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from storage.errors import UsageError

PROCESSES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))  # of one job: the process, and how many


def place_among_processes() -> tuple[int, int]:
    """Return a number for this process, and how many there are: the jobs of an array times the processes of each.

    Raises:
        UsageError: a variable of the launcher is not a whole number.
    """
    counts = [(whole_number(rank), whole_number(processes, least=1)) for rank, processes in PROCESSES]
    process, processes = next((pair for pair in counts if pair[1] > 1), (0, 1))
    array = whole_number("SLURM_ARRAY_TASK_ID") - whole_number("SLURM_ARRAY_TASK_MIN")
    job = array // whole_number("SLURM_ARRAY_TASK_STEP", least=1)
    jobs = whole_number("SLURM_ARRAY_TASK_COUNT", least=1)
    return job * processes + process, jobs * processes


def tell_launcher(lines: Sequence[str]) -> None:
    """Leave an error where torchrun looks for it: it then ends with these lines in place of advice of its own."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": "\n".join(lines), "timestamp": str(int(time.time()))}
        with suppress(OSError):  # torchrun's own record of a failure that has been told already
            Path(path).write_text(json.dumps({"message": {"message": lines[0], "extraInfo": extra}}))


def whole_number(name: str, *, least: int = 0) -> int:
    """Return what an environment variable says; `least` if it is not set.

    Raises:
        UsageError: it is not a whole number of at least `least`.
    """
    said = os.environ.get(name, str(least))
    if not said.isascii() or not said.isdigit() or int(said) < least:
        raise UsageError(
            f"{name} is {said!r}, not a whole number of at least {least}",
            where="environment",
            fix=f"start with torchrun or srun, which set it, or unset {name} to run one process",
        )
    return int(said)
