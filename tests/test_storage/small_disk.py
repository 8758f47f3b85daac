"""Run as a program in a mount namespace of its own: writes stores on disks that are too small, or read-only.

`unshare --user --map-root-user --mount python small_disk.py FOLDER STEP` prints JSON: runs, refusals, findings. Nothing
is mounted outside of the namespace.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import storage_cases as cases
from power_loss import BATCH, small_plan

from storage.errors import DistillError, OutOfSpaceError, StorageUnavailableError

LARGEST = 640  # KiB; every file takes whole pages of 4


def mount(*arguments: str) -> None:
    """Call the system's mount."""
    subprocess.run(["mount", *arguments], check=True)


def outcome(path: Path, shards: list[int] | None = None) -> DistillError | None:
    """Write a store, or some of its shards; the error that ended it."""
    try:
        cases.write_store(path, small_plan(2), shards=shards, **BATCH)
    except DistillError as error:
        return error
    return None


def too_small(disk: Path, size: int, reference: dict[str, bytes]) -> list[str]:
    """What goes wrong on a disk of so many KiB, which then grows."""
    mount("-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk))
    problems = []
    try:
        outcome(disk / "store", shards=[0])
        committed = {name: data for name, data in cases.tree(disk / "store").items() if _is_final(name)}
        error = outcome(disk / "store")
        refused = error is not None
        if refused and not isinstance(error, OutOfSpaceError):
            problems.append(f"{size} KiB: {error!r}")
        left = cases.tree(disk / "store")
        if any(left.get(name) != data for name, data in committed.items()):
            problems.append(f"{size} KiB: what was committed is touched")
        mount("-o", "remount,size=8m", str(disk))
        if outcome(disk / "store") is not None or cases.tree(disk / "store") != reference:
            problems.append(f"{size} KiB: with more room, another tree")
        COUNTS["runs"] += 1
        COUNTS["refused"] += refused
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return problems


def read_only(disk: Path, reference: dict[str, bytes]) -> list[str]:
    """What goes wrong on a disk that becomes read-only before the second shard."""
    mount("-t", "tmpfs", "tmpfs", str(disk))
    problems = []
    try:
        outcome(disk / "store", shards=[0])
        before = cases.tree(disk / "store")
        mount("-o", "remount,ro", str(disk))
        error = outcome(disk / "store")
        if not isinstance(error, StorageUnavailableError):
            problems.append(f"read-only: {error!r}")
        if cases.tree(disk / "store") != before:
            problems.append("read-only: changed")
        mount("-o", "remount,rw", str(disk))
        if outcome(disk / "store") is not None or cases.tree(disk / "store") != reference:
            problems.append("writable again: another tree")
        COUNTS["runs"] += 1
        COUNTS["refused"] += error is not None
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return problems


def _is_final(name: str) -> bool:
    return name.split("/")[0] in ("plan.json", "commits", "shards")


COUNTS = {"runs": 0, "refused": 0}


def main(folder: Path, step: int) -> None:
    """Try every size, print what came."""
    disk = folder / "disk"
    disk.mkdir()
    cases.write_store(folder / "reference", small_plan(2), **BATCH)
    reference = cases.tree(folder / "reference")
    findings = [problem for size in range(4, LARGEST, step) for problem in too_small(disk, size, reference)]
    findings += read_only(disk, reference)
    print(json.dumps({**COUNTS, "findings": findings}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
