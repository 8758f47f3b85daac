"""How damage is told: which store, shard, array and documents, and the commands that mend it."""

from __future__ import annotations

from dataclasses import dataclass

from storage.commit.records import PLAN
from storage.errors import CorruptionError
from storage.files.base import Files
from storage.plan import Plan, ShardSpec


def written_by(plan: Plan) -> str:
    """Return the command that writes a store of this plan, and computes what is missing in it."""
    return "pipeline extract" if plan.derived_from is None else "pipeline convert"


def damaged_plan(files: Files, problem: str) -> CorruptionError:
    """Return the error for a damaged plan of a store."""
    fix = f"bring {PLAN} back from a copy: nothing else says what the store holds"
    return CorruptionError(f"{PLAN} is damaged: {problem}", where=files.place(PLAN), fix=fix)


@dataclass(frozen=True)
class Damage:
    """The errors for damage in one store."""

    files: Files
    plan: Plan

    def shard(self, spec: ShardSpec, problem: str, *, name: str | None = None, whole: bool = False) -> CorruptionError:
        """Return the error for a damaged shard.

        Args:
            problem: what is wrong, with values found and expected.
            name: path of the damaged file or array inside the store.
            whole: whether all that is the shard's is there, so that a repair is enough.
        """
        documents = f"documents {spec.first_document} to {spec.end_document - 1}"
        return self._error(f"shard {spec.index} ({spec.split}, {documents})", problem, name, whole=whole)

    def file(self, name: str, problem: str) -> CorruptionError:
        """Return the error for a damaged file that belongs to the whole store."""
        return self._error(name, problem, name)

    def _error(self, what: str, problem: str, name: str | None, *, whole: bool = False) -> CorruptionError:
        then = ": it moves away what is too much" if whole else f", then the same `{written_by(self.plan)}` again"
        return CorruptionError(
            f"{what} is damaged: {problem}",
            where=self.files.place(name) if name else str(self.files),
            fix=f"run `pipeline repair {self.files}`{then}",
        )
