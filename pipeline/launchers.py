"""What launchers say about the processes that they start: torchrun, srun, and Slurm's job arrays."""

from __future__ import annotations

import os

PROCESSES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))  # of one job: the process, and how many


def place_among_processes() -> tuple[int, int]:
    """Return a number for this process, and how many there are: the jobs of an array times the processes of each."""
    counts = [(_number(rank, 0), _number(processes, 1)) for rank, processes in PROCESSES]
    process, processes = next((pair for pair in counts if pair[1] > 1), (0, 1))
    array = _number("SLURM_ARRAY_TASK_ID", 0) - _number("SLURM_ARRAY_TASK_MIN", 0)
    job, jobs = array // _number("SLURM_ARRAY_TASK_STEP", 1), _number("SLURM_ARRAY_TASK_COUNT", 1)
    return job * processes + process, jobs * processes


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
