"""Named points at which a test can stop the process, to prove that stopping anywhere loses nothing.

A point costs one dictionary look-up. `TOPK_DISTILL_FAULT=name:n` kills the process with SIGKILL the n-th time it
reaches `name` (n counts from 1); the name is printed to stderr first, so that a test sees which phase it hit.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter

ENVIRONMENT_VARIABLE = "TOPK_DISTILL_FAULT"

_hits: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Die here if the environment asks for it; otherwise do nothing."""
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted is None:
        return
    _hits[name] += 1
    if wanted == f"{name}:{_hits[name]}":
        print(f"fault point {wanted} reached: killing process {os.getpid()}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
