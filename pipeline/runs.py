"""Run directories named on a command line: what to call them, and what they learned from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from stages.training.run import read_record
from storage.commit.manifest import read_plan
from storage.errors import DistillError, UsageError
from storage.files import open_files
from storage.plan import HeldoutRule, Plan
from storage.values import Json


def name_models(paths: Sequence[Path]) -> dict[str, Path]:
    """Name each run or model directory: by its last part, or by the whole path where another one has that name.

    `teacher` is the name of the teacher.
    """
    short = [path.resolve().name for path in paths]
    taken = [*short, "teacher"]
    return {
        str(path.resolve()) if taken.count(name) > 1 else name: path for name, path in zip(short, paths, strict=True)
    }


def find_store(runs: Sequence[Path]) -> Path:
    """Return the store that the runs learned from, as the first one that knows it says.

    Raises:
        UsageError: none of them is a run, its record is damaged, or it learned from a live teacher.
    """
    for run in runs:
        record = run / "run.json"
        if os.path.lexists(record):
            learned_from = read_record(record)["store"]
            store = _recorded_store(learned_from)
            if store is None:
                raise UsageError(
                    "the run learned from a live teacher: it has no store with held-out rows",
                    where=str(run),
                    fix="extract held-out documents with the same teacher, and name that store with --store PATH",
                )
            return store
    raise UsageError(
        "none of these is a training run, so the store is not known",
        where=", ".join(str(run) for run in runs),
        fix="name it with --store PATH",
    )


def _recorded_store(learned_from: Mapping[str, Json]) -> Path | None:
    """Return where a run's store was: a directory of this machine, never an address; None without a store."""
    path = Path(str(learned_from["path"])) if "path" in learned_from else None
    if path is not None and not path.is_absolute():
        what = f"the run's record names no directory of this machine: {path}"
        raise UsageError(what, where="run.json: store.path", fix="name the store with --store PATH")
    return path


def find_record(path: Path) -> Path | None:
    """Return run.json of a run, named by its own directory or by its model's; None if `path` is of no run."""
    for place in (path, path.absolute().parent):
        if os.path.lexists(place / "run.json") and os.path.lexists(place / "config.yaml"):
            return place / "run.json"
    return None


def learned_rendering(path: Path) -> Mapping[str, Json]:
    """Return how the documents were rendered that a run learned from; empty if that is not known.

    Args:
        path: run or model directory.

    Raises:
        UsageError: the run's record is damaged.
    """
    record = find_record(path)
    learned_from = {} if record is None else read_record(record)["store"]
    found = learned_from.get("rendering", learned_from.get("identity", {}).get("rendering"))
    return found if isinstance(found, dict) else {}


def warn_if_trained_on(path: Path, plan: Plan, documents: Sequence[int]) -> str | None:
    """Say whether a run may have learned from documents that it is to be scored on.

    Args:
        path: run or model directory.
        plan: of the store whose held-out documents these are.
        documents: their numbers.

    Returns:
        One line; None if it held all of them out, or if nothing tells what it learned from.

    Raises:
        UsageError: the run's record is damaged.
    """
    record = find_record(path)
    learned = None if record is None else _corpus_and_rule(record)
    if learned is None:
        return None
    corpus, rule = learned
    stored = [dict(source) for source in plan.corpus]
    if corpus != stored:
        if not _contents(corpus) & _contents(stored):
            return None
        return f"{path} learned from files that the store's corpus holds too, maybe from what it is scored on"
    trained = sum(not rule.holds_out(number) for number in documents)
    if trained == 0:
        return None
    return (
        f"{path} may have learned from {trained} of the {len(documents)} documents that it is scored on, so its scores "
        f"may be too good: hold out what the store holds out, heldout: {{fraction: {plan.heldout.fraction}, "
        f"seed: {plan.heldout.seed}}}"
    )


def _corpus_and_rule(record: Path) -> tuple[list[Json], HeldoutRule] | None:
    """Return a run's corpus and what it held out: from its record, or from its store's plan if that is still there.

    Raises:
        UsageError: the record is damaged.
    """
    try:
        learned_from = read_record(record)["store"]
    except DistillError:  # a model may lie beside a run.json of something else
        return None
    store = _recorded_store(learned_from)
    if store is not None:
        with suppress(DistillError):  # whatever has become of that store
            plan = read_plan(open_files(store))
            if plan is not None and plan.store_id == learned_from.get("id"):
                return [dict(source) for source in plan.corpus], plan.heldout
        return None
    try:
        identity = learned_from["identity"]
        rule = HeldoutRule(**identity["heldout"])
        rule.check()
        return [dict(source) for source in identity["corpus"]], rule
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"the run's record does not say what it learned from: {error!r}",
            where=str(record),
            fix="restore it; a copy of the run's model can be scored without it",
        ) from error


def _contents(corpus: list[Json]) -> set[str]:
    """Return every sha256 that identifies a corpus: of its files, or of the texts themselves."""
    return set(re.findall(r"\b[0-9a-f]{64}\b", json.dumps(corpus)))
