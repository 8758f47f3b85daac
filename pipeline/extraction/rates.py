"""Measured rates: what an extraction achieved, kept in the user's cache so that `pipeline plan` can tell the time.

A cache in the plain sense: deleting it, or failing to write it, costs nothing but an "unknown".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.runtime import cache_directory
from storage.values import canonical_json, is_amount, parse_json


@dataclass(frozen=True, kw_only=True)
class RateKey:
    """What a rate belongs to.

    Attributes:
        model_config: sha256 of the teacher's config.json: its shape, not its weights, sets the pace.
        dtype, device, threads: how it ran.
        window: tokens per sequence at most.
    """

    model_config: str
    dtype: str
    device: str
    threads: int
    window: int


def read_rate(key: RateKey) -> float | None:
    """Return the measured tokens per second, or None if nothing was measured."""
    try:
        value = parse_json(_path(key).read_bytes(), most=1_000)["tokens_per_second"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if is_amount(value) and value > 0 else None


def write_rate(key: RateKey, tokens_per_second: float) -> None:
    """Keep a rate, if the cache can be written."""
    path = _path(key)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"tokens_per_second": round(tokens_per_second, 1)}))
        temporary.replace(path)


def _path(key: RateKey) -> Path:
    return cache_directory() / "rates" / f"{hashlib.sha256(canonical_json(asdict(key))).hexdigest()[:32]}.json"
