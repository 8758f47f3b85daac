"""Where `make torture` leaves what it did: benchmarks/results/torture.json, and the same as a table in torture.md."""

from __future__ import annotations

import json
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "benchmarks" / "results"
PACKAGES = ("topk-distill", "numpy", "pcodec", "numcodecs", "google-crc32c")
HEADER = """# What `make torture` did

Written by the run itself: each line is a study of tests/ that ended without a finding. The same seed and
versions give the same damages, crashes and faults again; random kills are timed, so those land elsewhere.

"""


def save(study: str, *, started: float, **numbers: Any) -> None:
    """Note one study: what was counted, its seed, versions, and how long it took since `started`."""
    path = FOLDER / "torture.json"
    FOLDER.mkdir(exist_ok=True)
    studies = json.loads(path.read_text()) if path.exists() else {}
    studies[study] = {
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - started),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        **numbers,
    }
    path.write_text(json.dumps(studies, indent=1, sort_keys=True) + "\n")
    (FOLDER / "torture.md").write_text(_table(studies))
    print(f"\n{study}: {_told(studies[study])}", flush=True)


def _told(entry: dict[str, Any]) -> str:
    names = sorted(entry.keys() - {"date", "seconds", "versions", "names"})
    return ", ".join(f"{name.replace('_', ' ')} {entry[name]}" for name in names)


def _table(studies: dict[str, Any]) -> str:
    lines = ["| study | what was done | date | s |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {_told(entry)} | {entry['date']} | {entry['seconds']} |" for name, entry in sorted(studies.items())
    ]
    for name, entry in sorted(studies.items()):
        if "names" in entry:
            lines += ["", f"{name}:", "", *(f"* {one}: caught by {by}" for one, by in sorted(entry["names"].items()))]
    versions = sorted(
        {f"{package} {number}" for entry in studies.values() for package, number in entry["versions"].items()}
    )
    return HEADER + "\n".join(lines) + "\n\nVersions: " + ", ".join(versions) + ".\n"
