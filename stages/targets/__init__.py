"""Targets: what is kept of the teacher's distribution at each position.

Data path: logits chunk -> **target rows -> SequenceBatch** -> store.

To add a kind: write a function logits -> `TargetRows` in a file of this folder and list it in `KINDS`. Configuration,
schema and tests read the table. It is here without a model library, which a configuration must not load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch import Tensor

    from stages.targets.positions import Positions
    from stages.targets.rows import TargetRows
    from storage.plan import TargetSpec

    RowsOf = Callable[[Tensor, Positions, TargetSpec], TargetRows]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of target.

    Attributes:
        about: what a row holds, for the documentation of `target.kind`.
        rows: `module:function` that computes the rows of a chunk of logits.
        k, draws: the defaults of its configuration.
        from_candidates: whether a teacher that gives finished rows of its most probable tokens serves it too.
    """

    about: str
    rows: str
    k: int = 32
    draws: int = 0
    from_candidates: bool = False

    def load(self) -> RowsOf:
        """Return the function that `rows` names."""
        return cast("RowsOf", resolve_name(self.rows))


KINDS: Mapping[str, Kind] = {
    "hybrid": Kind(
        about="exact head of k entries plus samples of the tail, an unbiased target",
        rows="stages.targets.rows:fixed_rows",
        draws=8,
    ),
    "sampled": Kind(
        about="samples of the whole distribution, unbiased and lean, for forward KL at temperature 1",
        rows="stages.targets.rows:fixed_rows",
        k=0,
        draws=50,
    ),
    "topk": Kind(
        about="exact head of k entries only",
        rows="stages.targets.rows:fixed_rows",
        from_candidates=True,
    ),
    "topp": Kind(
        about="exact head of the fewest entries that reach probability p, at most k",
        rows="stages.targets.rows:mass_rows",
        from_candidates=True,
    ),
}
