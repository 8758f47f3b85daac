"""Targets: what is kept of the teacher's distribution at each position.

Data path: logits chunk -> **target rows -> SequenceBatch** -> store.

To add a kind: write a function logits -> `TargetRows`, list it in `KINDS`, and add its name to the configuration's
and the plan's `kind`. The tests run over the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from stages.targets.assemble import assemble
from stages.targets.positions import Positions
from stages.targets.rows import TargetRows, fixed_rows, mass_rows
from storage.plan import TargetSpec

__all__ = ["KINDS", "Positions", "TargetRows", "assemble"]

KINDS: Mapping[str, Callable[[Tensor, Positions, TargetSpec], TargetRows]] = {
    "topk": fixed_rows,
    "topp": mass_rows,
    "sampled": fixed_rows,
    "hybrid": fixed_rows,
}
