"""Does reading take more memory from a larger store? Growth of the high-water mark, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from storage.reader import StoreReader

SEQUENCES_PER_READ = 16


def growth(store: Path, order: str, cache_bytes: int) -> float:
    """Return the MiB by which a fresh process grows while it reads every sequence once, beyond what opening took."""
    argument = json.dumps({"store": str(store), "order": order, "cache_bytes": cache_bytes})
    command = [sys.executable, "-m", "benchmarks.storage.memory", argument]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _status(key: str) -> int:
    """Return a line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def _main(argument: str) -> None:
    wanted = json.loads(argument)
    reader = StoreReader(wanted["store"], cache_bytes=wanted["cache_bytes"])
    order = np.arange(len(reader))
    if wanted["order"] == "random":
        order = np.random.default_rng(0).permutation(order)
    before = _status("VmRSS")
    for first in range(0, len(order), SEQUENCES_PER_READ):
        reader.read(order[first : first + SEQUENCES_PER_READ])
    print((_status("VmHWM") - before) / 1024)


if __name__ == "__main__":
    _main(sys.argv[1])
