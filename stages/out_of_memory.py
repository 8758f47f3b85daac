"""What running out of memory looks like. Imports no torch: the command line asks before anything heavy is loaded."""

from __future__ import annotations

import sys

_WORDS = ("allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out: Python's, a device's, or the CPU's, of which torch says so in a RuntimeError."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
