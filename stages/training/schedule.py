"""Learning rate and share of the divergence as pure functions of the step: a resumed run needs no scheduler state.

Data path: step -> **factor of the peak learning rate, kd_ratio** -> optimizer, loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over the steps, as a factor of the peak.

    Attributes:
        kind: cosine: warm up, then half a cosine. wsd: warm up, stay, decay linearly at the end. constant: warm up,
            stay.
        steps: all steps of the run.
        warmup_steps: steps of linear warm-up; the last of them has factor 1.
        decay_steps: wsd: steps of the final decay; None: a fifth of all steps.
        min_factor: what cosine and wsd come down to; the step after the last one would have it.
    """

    kind: Literal["cosine", "wsd", "constant"]
    steps: int
    warmup_steps: int = 0
    decay_steps: int | None = None
    min_factor: float = 0.0

    def factor(self, step: int) -> float:
        """Return the factor of step number `step`, 0 <= step < steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.decline(step)

    def decline(self, step: int) -> float:
        """Return the same without the warm-up: 1 until the learning rate begins to fall."""
        if step < self.warmup_steps:
            return 1.0
        return self.min_factor + (1.0 - self.min_factor) * self._above_minimum(step)

    def _above_minimum(self, step: int) -> float:
        if self.kind == "cosine":
            done = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
            return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
        if self.kind == "wsd":
            decay_steps = self.decay_steps or max(self.steps // 5, 1)
            return min(1.0, max(self.steps - step, 0) / decay_steps)
        return 1.0


@dataclass(frozen=True, kw_only=True)
class RatioSchedule:
    """kd_ratio over the steps: rise linearly, hold, and fall with the learning rate if wanted.

    Attributes:
        peak: the configured kd_ratio.
        warmup_steps: steps of the rise; the last of them has the peak.
        falls_with: the learning rate's schedule; None: the peak is held.
    """

    peak: float
    warmup_steps: int = 0
    falls_with: Schedule | None = None

    def ratio(self, step: int) -> float:
        """Return kd_ratio of step number `step`, counted from 0."""
        risen = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.peak * risen * (1.0 if self.falls_with is None else self.falls_with.decline(step))
