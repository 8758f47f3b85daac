"""How damage is told: which store, shard, array and documents, and the command that repairs it."""

from __future__ import annotations

from pathlib import Path

from storage.errors import CorruptionError
from storage.plan import ShardSpec
from storage.records import PLAN


def repair_command(root: Path) -> str:
    """Return the command that repairs a store."""
    return f"run `pipeline repair {root}`, then the same `pipeline extract` again"


def describe(spec: ShardSpec) -> str:
    """Return a shard's name for people."""
    return f"shard {spec.index} ({spec.split}, documents {spec.first_document} to {spec.end_document - 1})"


def damaged_shard(root: Path, spec: ShardSpec, problem: str, *, name: str | None = None) -> CorruptionError:
    """Return the error for a damaged shard.

    Args:
        root: of the store.
        spec: the shard.
        problem: what is wrong, with values found and expected.
        name: path of the damaged file or array inside the store.
    """
    return CorruptionError(
        f"{describe(spec)} is damaged: {problem}",
        where=str(root / name) if name else str(root),
        fix=repair_command(root),
    )


def damaged_file(root: Path, name: str, problem: str) -> CorruptionError:
    """Return the error for a damaged file that belongs to the whole store."""
    if name == PLAN:
        fix = "bring plan.json back from a copy: nothing else says what the store holds"
        return CorruptionError(f"{name} is damaged: {problem}", where=str(root / name), fix=fix)
    return CorruptionError(f"{name} is damaged: {problem}", where=str(root / name), fix=repair_command(root))
