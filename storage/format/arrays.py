"""The arrays that make up a shard: name, axis and stored type of each, as a function of the plan.

What they hold is stated field by field in `rows.py`; FORMAT.md tells the same in prose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from storage.codecs import logprob_codec
from storage.format.chunks import DTYPES, LARGEST_CHUNK, ArrayLayout
from storage.plan import Plan
from storage.rows import ARRAYS

CHUNK_UNITS = 4096  # tokens or rows per chunk, about


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a shard.

    Attributes:
        name: of the array, and of its directory.
        axis: token, token_byte (8 positions packed into a byte), sequence, sequence_edge (sequences + 1), row, head
            or tail.
        dtype: of the stored values.
        ranks: length of a second axis, the rank in the head or the number of the temperature; None for a flat array.
        by_rank: whether it is stored with its axes swapped, rank after rank.
        second: name of the second axis.
    """

    name: str
    axis: str
    dtype: np.dtype[Any]
    ranks: int | None = None
    by_rank: bool = False
    second: str = "rank"

    def layout(self, length: int, *, tokens: int, rows: int) -> ArrayLayout:
        """Cut the array into chunks of about 4096 tokens or rows, equal up to rounding: the longest that it may have.

        Arrays with one value per sequence are one chunk. The head and tail axes have as many chunks as the row axis,
        or more where a chunk would pass `LARGEST_CHUNK`.
        """
        units = {"token": tokens, "token_byte": tokens, "row": rows, "head": rows, "tail": rows}
        size = length * (self.ranks or 1) * self.dtype.itemsize
        pieces = max(1, round(units.get(self.axis, 0) / CHUNK_UNITS), -(-size // LARGEST_CHUNK))
        return ArrayLayout(
            axis=self.axis,
            dtype=self.dtype,
            length=length,
            chunk=max(1, -(-length // pieces)),
            ranks=self.ranks,
            by_rank=self.by_rank,
            second=self.second,
        )


def smallest_uint(largest: int) -> np.dtype[Any]:
    """Return the smaller of uint16 and uint32 that holds `largest`: pcodec takes no bytes, and beats zstd on counts."""
    return np.dtype("<u2" if largest < 2**16 else "<u4")


def is_even(plan: Plan, *, rows: int, head: int) -> bool:
    """Tell whether every head of a shard has k entries, from its numbers of rows and head entries (none exceeds k).

    Then `head_ids` and `logprob` have two axes, row and rank; else they are flat along the head axis.
    """
    return head > 0 and head == rows * plan.target.k


def array_specs(plan: Plan, *, end_bytes: bool, even: bool) -> Mapping[str, ArraySpec]:
    """Return the arrays of a shard, by name, in order.

    Args:
        end_bytes: whether the shard has `token_end_byte` (it has not when its input was token ids).
        even: whether every head has k entries.
    """
    target, codec = plan.target, logprob_codec(plan.codecs["logprob"])
    temperatures = len(target.temperatures)
    amounts: Mapping[str | None, int] = {
        None: 1,
        "end_bytes": end_bytes,
        "k": target.k,
        "draws": target.draws,
        "temperatures": temperatures,
    }
    dtypes: Mapping[str, np.dtype[Any]] = {
        "id": smallest_uint(plan.vocab_size - 1),
        "real": codec.row_dtype,
        "logprob": codec.dtype,
        "bits": np.dtype("u1"),
        "uint32": np.dtype("<u4"),
        "uint64": np.dtype("<u8"),
    }
    specs = {}
    for item in ARRAYS:
        amount = amounts[item.only_with]
        if not amount:
            continue
        spec = ArraySpec(
            name=item.name,
            axis="token_byte" if item.stored == "bits" else item.axis,
            dtype=smallest_uint(amount) if item.stored == "uint" else dtypes[item.stored],
        )
        if item.axis == "head" and even:
            spec = replace(spec, axis="row", ranks=target.k, by_rank=item.stored == "logprob")
        elif item.by_temperature:
            spec = replace(spec, ranks=temperatures, by_rank=True, second="temperature")
        specs[item.name] = spec
    for name, about in plan.columns.items():
        array = column_array(name)
        specs[array] = ArraySpec(name=array, axis=about["axis"], dtype=DTYPES[about["dtype"]])
    return specs


def column_array(name: str) -> str:
    """Return the name of the array that holds an added column. No other array has a name like it."""
    return f"column_{name}"


def array_lengths(*, sequences: int, tokens: int, rows: int, head: int, tail: int) -> dict[str, int]:
    """Return the length of each axis."""
    return {
        "token": tokens,
        "token_byte": -(-tokens // 8),
        "sequence": sequences,
        "sequence_edge": sequences + 1,
        "row": rows,
        "head": head,
        "tail": tail,
    }
