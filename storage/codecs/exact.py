"""The `exact` codec: float32 log-probabilities as they are. For tests, and for measuring what the others lose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.values import Json

ROUNDING = 1e-3  # nats by which a log-probability or entropy may pass its limit through rounding


@dataclass(frozen=True)
class Exact:
    """Stores log-probabilities and all other numbers of a row as float32, unchanged: every bit comes back.

    The head is not scaled to 1 - r on reading, for that would change bits.
    """

    id: ClassVar[str] = "exact"
    about: ClassVar[str] = "log-probabilities and all other numbers of a row as float32, unchanged"
    dtype: ClassVar[np.dtype[np.generic]] = np.dtype("<f4")
    row_dtype: ClassVar[np.dtype[np.generic]] = np.dtype("<f4")
    renormalises: ClassVar[bool] = False

    def encode(self, logprob_H: NDArray[np.float32], head_size_R: NDArray[np.int32]) -> NDArray[np.generic]:
        """Return the values themselves [H]."""
        del head_size_R
        return logprob_H.astype("<f4")

    def decode(self, codes_H: NDArray[np.generic], head_size_R: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the values themselves [H]. Raises ValueError for what is no log-probability."""
        del head_size_R
        return _checked(codes_H)

    def decode_ranks(self, codes_KR: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return the values themselves [K, R]. Raises ValueError as `decode` does."""
        return _checked(codes_KR)

    def round_numbers(self, values: NDArray[np.float32]) -> NDArray[np.generic]:
        """Return the values themselves."""
        return values.astype("<f4")

    def error_bound(self, logprob_H: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return zeros [H]."""
        return np.zeros(len(logprob_H))

    def parameters(self) -> dict[str, Json]:
        """Return the id alone."""
        return {"id": self.id}


def _checked(codes: NDArray[np.generic]) -> NDArray[np.float32]:
    values: NDArray[np.float32] = codes.astype(np.float32)
    if values.size and not -np.inf < values.min() <= values.max() <= ROUNDING:
        raise ValueError(f"log-probabilities go from {values.min()} to {values.max()}, or one is NaN")
    return values
