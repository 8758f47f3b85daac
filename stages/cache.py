"""Where on this machine things may be kept that can always be made again: converted models, measured rates."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Return the user's cache directory of this product (below XDG_CACHE_HOME or ~/.cache); it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "topk_distill"
