"""Run directories named on a command line: what to call them, and which store they learned from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stages.training.run import read_record
from storage.errors import UsageError


def name_models(paths: Sequence[Path]) -> dict[str, Path]:
    """Name each run or model directory: by its last part, or by the whole path where that is not enough."""
    short = [path.resolve().name for path in paths]
    return {str(path) if short.count(name) > 1 else name: path for name, path in zip(short, paths, strict=True)}


def find_store(runs: Sequence[Path]) -> Path:
    """Return the store that the runs learned from, as the first one that knows it says.

    Raises:
        UsageError: none of them is a run, its record is damaged, or it learned from a live teacher.
    """
    for run in runs:
        record = run / "run.json"
        if record.is_file():
            learned_from = read_record(record)["store"]
            if "path" not in learned_from:
                raise UsageError(
                    "the run learned from a live teacher: it has no store with held-out rows",
                    where=str(run),
                    fix="extract held-out documents with the same teacher, and name that store with --store PATH",
                )
            return Path(str(learned_from["path"]))
    raise UsageError(
        "none of these is a training run, so the store is not known",
        where=", ".join(str(run) for run in runs),
        fix="name it with --store PATH",
    )
