"""The target: what a row of a store keeps of the teacher's distribution. A part of the plan.

Data path: config -> **target** -> plan -> rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from storage.values import as_float, require_number, require_whole, short

LARGEST_DRAWS = 65_535  # a shard holds counts of draws as uint16
LARGEST_VOCABULARY = 2**24  # a reader holds a number for each token, four times over while it opens a store
LARGEST_K = 2**32 - 1  # sizes of heads are uint32
LARGEST_SEED = 2**64 - 1  # random numbers take it as one uint64
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 0.01, 100.0  # beyond, a row is its greatest logit, or flat


@dataclass(frozen=True)
class Holds:
    """What rows of a kind hold: an exact head of most k entries, which ends at the mass p, and samples."""

    head: bool
    mass: bool
    draws: bool


NAMED_KINDS: Mapping[str, Holds] = {
    "topk": Holds(head=True, mass=False, draws=False),
    "topp": Holds(head=True, mass=True, draws=False),
    "sampled": Holds(head=False, mass=False, draws=True),
    "hybrid": Holds(head=True, mass=False, draws=True),
}
"""The kinds that the format names. Of any other, k, p and draws alone say what its rows hold."""
_NAME = re.compile("[a-z][a-z0-9_]{0,62}")


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """What is kept of the teacher's distribution at each position.

    Attributes:
        kind: `topk` (exact head of k), `topp` (exact head of mass p, at most k), `sampled` (samples only) or `hybrid`
            (exact head of k, and samples of the tail); or another name.
        k: most entries of an exact head; 0 for `sampled`.
        p: mass that the head of `topp` reaches unless k ends it first; None for other kinds.
        draws: samples per row, drawn with replacement from what is outside of the head; 0 for exact kinds.
        seed: key of the counter-based random numbers behind the draws.
        temperatures: temperatures other than 1, rising, from 0.01 to 100, for which tail mass and entropy are stored
            too.
    """

    kind: str
    k: int
    p: float | None = None
    draws: int = 0
    seed: int = 0
    temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        # 1 and 1.0 are the same target, and the same plan.
        object.__setattr__(self, "p", as_float(self.p))
        object.__setattr__(self, "temperatures", tuple(as_float(value) for value in self.temperatures))

    def check(self) -> None:
        """Check that the fields have the right types and fit the kind. Raises ValueError."""
        self._check_types()
        holds = NAMED_KINDS.get(self.kind, Holds(head=self.k > 0, mass=self.p is not None, draws=self.draws > 0))
        if not holds.head and (not holds.draws or holds.mass):
            raise ValueError(f"kind {self.kind} needs k > 0, or k: 0 without p and draws > 0")
        if not holds.head and self.k != 0:
            raise ValueError(f"kind {self.kind} has no exact head, found k: {self.k}; kind hybrid has both")
        if holds.head and self.k < 1:
            raise ValueError(f"kind {self.kind} needs k > 0, found k: {self.k}; kind sampled stores no head")
        if holds.mass and self.p is None:
            raise ValueError(f"kind {self.kind} needs p, the mass that its head reaches, such as p: 0.95")
        if not holds.mass and self.p is not None:
            raise ValueError(f"p belongs to kind topp, found p: {self.p} with kind {self.kind}")
        if self.p is not None and not 0.0 < self.p <= 1.0:
            raise ValueError(f"p must be above 0 and at most 1, found p: {self.p}")
        if not holds.draws and self.draws != 0:
            raise ValueError(f"kind {self.kind} draws no samples, found draws: {self.draws}; kind hybrid has both")
        if holds.draws and not 0 < self.draws <= LARGEST_DRAWS:
            raise ValueError(f"kind {self.kind} needs draws from 1 to {LARGEST_DRAWS}, found draws: {self.draws}")
        self._check_temperatures()

    def describe(self) -> str:
        """Say in words what a row holds."""
        if self.k == 0:
            held = f"{self.draws} draws of the whole distribution"
        else:
            head = (
                f"{self.k} exact entries" if self.p is None else f"exact entries up to mass {self.p}, at most {self.k}"
            )
            held = head + (f", {self.draws} tail draws" if self.draws else "")
        stored = ", ".join(f"{value:g}" for value in (1.0, *self.temperatures))
        return f"{self.kind}: {held}" + (f"; temperatures {stored}" if self.temperatures else "")

    def _check_types(self) -> None:
        if not isinstance(self.kind, str) or not _NAME.fullmatch(self.kind):
            raise ValueError(f"kind must be a name, such as {', '.join(NAMED_KINDS)}, found {short(self.kind)}")
        require_whole("k", self.k, least=0, most=LARGEST_K)
        require_whole("draws", self.draws, least=0, most=LARGEST_DRAWS)
        require_whole("seed", self.seed, least=0, most=LARGEST_SEED)
        if self.p is not None:
            require_number("p", self.p)
        for value in self.temperatures:
            require_number("each of temperatures", value)

    def _check_temperatures(self) -> None:
        values = self.temperatures
        if self.k == 0 and values:
            raise ValueError(
                f"temperatures say how an exact head and its tail share the mass; kind {self.kind} has no head"
            )
        if not all(LEAST_TEMPERATURE <= value <= LARGEST_TEMPERATURE and value != 1.0 for value in values):
            raise ValueError(
                f"temperatures must lie from {LEAST_TEMPERATURE:g} to {LARGEST_TEMPERATURE:g} and be other than 1"
                f" (always stored), found {list(values)}"
            )
        if any(right <= left for left, right in pairwise(values)):
            raise ValueError(f"temperatures must rise, found {list(values)}")
