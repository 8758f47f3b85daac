"""The target: what a row of a store keeps of the teacher's distribution. A part of the plan.

Data path: config -> **target** -> plan -> rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from storage.values import as_float, require_number, require_whole, short

Kind = Literal["topk", "topp", "sampled", "hybrid"]
LARGEST_DRAWS = 65_535  # a shard holds counts of draws as uint16
LARGEST_VOCABULARY = 2**32 - 1  # ids are uint32, and all ones stands for no id
LARGEST_SEED = 2**64 - 1  # random numbers take it as one uint64
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 0.01, 100.0  # beyond, a row is its greatest logit, or flat


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """What is kept of the teacher's distribution at each position.

    Attributes:
        kind: `topk` (exact head of k), `topp` (exact head of mass p, at most k), `sampled` (samples only) or `hybrid`
            (exact head of k, and samples of the tail).
        k: most entries of an exact head; 0 for `sampled`.
        p: mass that the head of `topp` reaches unless k ends it first; None for other kinds.
        draws: samples per row, drawn with replacement from what is outside of the head; 0 for exact kinds.
        seed: key of the counter-based random numbers behind the draws.
        temperatures: temperatures other than 1, rising, from 0.01 to 100, for which tail mass and entropy are stored
            too.
    """

    kind: Kind
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
        if self.kind == "sampled" and self.k != 0:
            raise ValueError(f"kind sampled has no exact head, found k: {self.k}; kind hybrid has both")
        if self.kind != "sampled" and self.k < 1:
            raise ValueError(f"kind {self.kind} needs k > 0, found k: {self.k}; kind sampled stores no head")
        if self.kind == "topp" and self.p is None:
            raise ValueError("kind topp needs p, the mass that its head reaches, such as p: 0.95")
        if self.kind != "topp" and self.p is not None:
            raise ValueError(f"p belongs to kind topp, found p: {self.p} with kind {self.kind}")
        if self.p is not None and not 0.0 < self.p <= 1.0:
            raise ValueError(f"p must be above 0 and at most 1, found p: {self.p}")
        if self.kind in ("topk", "topp") and self.draws != 0:
            raise ValueError(f"kind {self.kind} draws no samples, found draws: {self.draws}; kind hybrid has both")
        if self.kind in ("sampled", "hybrid") and not 0 < self.draws <= LARGEST_DRAWS:
            raise ValueError(f"kind {self.kind} needs draws from 1 to {LARGEST_DRAWS}, found draws: {self.draws}")
        self._check_temperatures()

    def describe(self) -> str:
        """Say in words what a row holds."""
        head = {
            "topk": f"{self.k} exact entries",
            "topp": f"exact entries up to mass {self.p}, at most {self.k}",
            "sampled": f"{self.draws} draws of the whole distribution",
            "hybrid": f"{self.k} exact entries, {self.draws} tail draws",
        }[self.kind]
        stored = ", ".join(f"{value:g}" for value in (1.0, *self.temperatures))
        return f"{self.kind}: {head}" + (f"; temperatures {stored}" if self.temperatures else "")

    def _check_types(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, found {short(self.kind)}")
        require_whole("k", self.k, least=0, most=LARGEST_VOCABULARY)
        require_whole("draws", self.draws, least=0, most=LARGEST_DRAWS)
        require_whole("seed", self.seed, least=0, most=LARGEST_SEED)
        if self.p is not None:
            require_number("p", self.p)
        for value in self.temperatures:
            require_number("each of temperatures", value)

    def _check_temperatures(self) -> None:
        values = self.temperatures
        if self.kind == "sampled" and values:
            raise ValueError("temperatures say how an exact head and its tail share the mass; kind sampled has no head")
        if not all(LEAST_TEMPERATURE <= value <= LARGEST_TEMPERATURE and value != 1.0 for value in values):
            raise ValueError(
                f"temperatures must lie from {LEAST_TEMPERATURE:g} to {LARGEST_TEMPERATURE:g} and be other than 1"
                f" (always stored), found {list(values)}"
            )
        if any(right <= left for left, right in pairwise(values)):
            raise ValueError(f"temperatures must rise, found {list(values)}")
