"""The `sqrt-delta` codec: log-probabilities rounded in the square root of p, then differenced along the rank.

The error that a rounding of sqrt(p) makes in KL is about the same for every p (Fisher information of a multinomial is
flat in sqrt(p)), so equal steps there spend bits where they count. For small p such steps would be coarse in log p;
from the point where they reach `log_step` on, steps are equal in log p instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.segments import cumsum_rows, diff_rows, sum_ranks
from storage.values import Json

LARGEST_CODE = np.iinfo(np.uint16).max
LOWEST = -1000.0  # nats that every choice of steps must reach: e to this is 0 in any precision


@dataclass(frozen=True)
class SqrtDelta:
    """Square-root companding with a stated bound, delta coded within each row, as uint16.

    With D = root_step, E = log_step, l = log p and the joint at l0 = 2 ln(D/E):

        code = rint(2/D (1 - exp(l/2)))       for l >= l0   (steps of D/2 in sqrt p)
        code = rint(2/D - 2/E + (l0 - l)/E)   for l <  l0   (steps of E in log p)

    Both branches and their slopes meet at l0. A row stores its first code, then the differences, which are never
    negative because l falls.

    Bound, before the reader scales the head to 1 - r: |sqrt p' - sqrt p| <= D/4 for l >= l0 and |l' - l| <= E/2 for
    l < l0; in log p it is at most 0.53 E everywhere (`error_bound` gives it per value). The largest code stands for
    l0 - (65535 - 2/D + 2/E) E, -8185 nats by default; values below come back as that. Steps so fine that it lies
    above -1000 nats are refused: they leave too few codes for small p, or none.

    The numbers that a row has one of are rounded to multiples of F = row_step, then to float16. Half a step of
    tail_logit costs a KL of at most F^2/32.

    Attributes:
        root_step: D, twice the step in sqrt(p).
        log_step: E, the step in log p for small p, nats; at most 1.
        row_step: F, nats; at most 1.
    """

    root_step: float = 0.02
    log_step: float = 0.125
    row_step: float = 1.0 / 64.0

    id: ClassVar[str] = "sqrt-delta"
    about: ClassVar[str] = "log-probabilities rounded in the square root of p, within stated bounds"
    dtype: ClassVar[np.dtype[np.generic]] = np.dtype("<u2")
    row_dtype: ClassVar[np.dtype[np.generic]] = np.dtype("<f2")
    renormalises: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("root_step", "log_step", "row_step"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, found {value!r}")
            object.__setattr__(self, name, float(value))  # 1 and 1.0 are the same codec, and the same plan
        if not 0.0 < self.root_step < self.log_step <= 1.0:
            raise ValueError(
                f"root_step {self.root_step} and log_step {self.log_step} must satisfy 0 < root_step < log_step <= 1"
            )
        if not 0.0 < self.row_step <= 1.0:
            raise ValueError(f"row_step {self.row_step} must be above 0 and at most 1")
        joint, joint_code = self._joint
        lowest = joint - (LARGEST_CODE - joint_code) * self.log_step
        if not lowest <= LOWEST:
            raise ValueError(
                f"root_step {self.root_step} and log_step {self.log_step} are too fine: 65536 codes must reach"
                f" {LOWEST:.0f} nats, and they end at {min(lowest, 0.0):.0f}"
            )

    @property
    def _joint(self) -> tuple[float, float]:
        """The log-probability l0 where the branches meet, and its code (not rounded)."""
        return 2.0 * float(np.log(self.root_step / self.log_step)), 2.0 / self.root_step - 2.0 / self.log_step

    @lru_cache(maxsize=4)  # noqa: B019  # equal codecs share a table, and there are never many
    def _table(self) -> NDArray[np.float32]:
        """Return the log-probability of each code, float32 [65536]."""
        joint, joint_code = self._joint
        code = np.arange(LARGEST_CODE + 1, dtype=np.float64)
        root = np.maximum(1.0 - code * (self.root_step / 2.0), self.root_step / self.log_step)
        table = np.where(code < joint_code, 2.0 * np.log(root), joint - (code - joint_code) * self.log_step)
        return table.astype(np.float32)

    def encode(self, logprob_H: NDArray[np.float32], head_size_R: NDArray[np.int32]) -> NDArray[np.generic]:
        """Return codes [H], uint16: the first of each row, then differences."""
        joint, joint_code = self._joint
        value = np.minimum(logprob_H.astype(np.float64), 0.0)
        root_code = (2.0 / self.root_step) * (1.0 - np.exp(value / 2.0))
        code = np.where(value >= joint, root_code, joint_code + (joint - value) / self.log_step)
        rounded = np.rint(np.minimum(code, LARGEST_CODE)).astype(np.uint16)
        return diff_rows(rounded, head_size_R)

    def decode(self, codes_H: NDArray[np.generic], head_size_R: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return log-probabilities [H]. Raises ValueError if the codes of a row sum beyond the largest code."""
        code = cumsum_rows(codes_H, head_size_R)
        if len(code) and int(code.max()) > LARGEST_CODE:
            raise ValueError("the codes of a row sum beyond 65535")
        logprob_H: NDArray[np.float32] = self._table()[code]
        return logprob_H

    def decode_ranks(self, codes_KR: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return log-probabilities [K, R] of rows of K entries each. Raises ValueError as `decode` does."""
        logprob_KR: NDArray[np.float32] = self._table().take(sum_ranks(codes_KR))
        return logprob_KR

    def round_numbers(self, values: NDArray[np.float32]) -> NDArray[np.generic]:
        """Return the nearest multiples of the row step, float16. What is beyond float16 becomes infinite."""
        with np.errstate(over="ignore"):
            rounded: NDArray[np.generic] = (np.rint(values / self.row_step) * self.row_step).astype("<f2")
        return rounded

    def error_bound(self, logprob_H: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the promised |l' - l| [H], nats, with a margin of 1e-5 (1 + |l|) for float32."""
        value = np.minimum(logprob_H.astype(np.float64), 0.0)
        joint, _ = self._joint
        root = np.exp(np.maximum(value, joint) / 2.0)
        in_root = -2.0 * np.log(np.maximum(1.0 - self.root_step / 4.0 / root, 1e-9))
        bound = np.where(value >= joint, in_root, self.log_step / 2.0)
        lowest = float(self._table()[LARGEST_CODE])
        beyond = np.maximum(lowest - value, 0.0)
        return np.maximum(bound, beyond) + 1e-5 * (1.0 + np.abs(value))

    def parameters(self) -> dict[str, Json]:
        """Return the id and the steps."""
        return {
            "id": self.id,
            "root_step": self.root_step,
            "log_step": self.log_step,
            "row_step": self.row_step,
        }
