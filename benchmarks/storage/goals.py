"""What the numbers are held against, and how they are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
DEGREES = {"hybrid 12+4": 5.0, "hybrid 32+8": 2.5}
BYTES = {"topk 64": 118.0, "sampled 50": 48.0, "hybrid 12+4": 41.0, "hybrid 32+8": 80.0}  # of the whole corpus
KL = 3e-4
ENCODE_SHARE, ENCODE_ROWS = 0.02, 150_000.0
OVER_ZARR, OVER_PARQUET = 3.0, 2.0
PLAIN = "without dictionary"  # Parquet as no writer writes it by default: shown, but not a goal
OPENING_SECONDS = 10.0
EXPORT_ROWS, SLICE_MICROSECONDS = 300_000.0, 20.0
MEMORY_GROWTH = 1.5

Goal = tuple[str, float, float, bool]  # what, measured, goal, met


def goals(found: dict[str, Any]) -> list[Goal]:
    """Return every number that has a goal."""
    at_most = [(what, value, limit, value <= limit) for what, value, limit in _at_most(found)]
    return at_most + [(what, value, limit, value >= limit) for what, value, limit in _at_least(found)]


def _at_most(found: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    kinds, memory = found["kinds"], found["memory"]
    for name, limit in DEGREES.items():
        yield f"{name}: angle, degrees", kinds[name]["angle"], limit
    for name, kind in kinds.items():
        if "decode_kl" in kind:
            yield f"{name}: divergence of decoded rows, nats", kind["decode_kl"], KL
    for name, limit in BYTES.items() if found["full"] else ():
        yield f"{name}: bytes per row", kinds[name]["all_in"], limit
    yield "encode, share of the teacher's time", found["writing"]["encode_share_of_teacher"], ENCODE_SHARE
    yield "opening 100,000 shards, seconds", found["opening"]["seconds"], OPENING_SECONDS
    yield "a sequence as a slice, microseconds", found["looking"]["slice_microseconds"], SLICE_MICROSECONDS
    for order in ("sequential", "random"):
        yield f"memory of a {order} pass, 16x over 1x", memory[f"{order} 16x"] / memory[f"{order} 1x"], MEMORY_GROWTH


def _at_least(found: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    yield "encode, rows per second and core", found["writing"]["encode_rows_per_second"], ENCODE_ROWS
    yield "Parquet export, rows per second", found["looking"]["export_rows_per_second"], EXPORT_ROWS
    for order in ("sequential", "random"):
        ratio = found[order]["ratio"]
        for name in sorted(name for name in ratio if not name.startswith("ours") and not name.endswith(PLAIN)):
            yield f"{order}: over {name}", ratio[name], OVER_ZARR if name.startswith("zarr") else OVER_PARQUET


def save(found: dict[str, Any]) -> None:
    """Write all numbers as JSON, and those with a goal as a table."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "storage.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        "# Storage: size, fidelity, speed and memory",
        "",
        "Written by `python -m benchmarks.storage --save`; all numbers are in storage.json.",
        "",
        "| measured | value | goal | |",
        "|---|---|---|---|",
    ]
    for what, value, limit, met in found["goals"]:
        lines.append(f"| {what} | {value:,.4g} | {limit:,.4g} | {'met' if met else 'MISSED'} |")
    (RESULTS / "storage.md").write_text("\n".join(lines) + "\n")
