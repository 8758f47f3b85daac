"""Columns that a conversion adds: values of one's own beside the rows, from a Parquet file.

Data path: Parquet file -> **the values of a shard, in the order of its rows** -> `convert` -> arrays of the shard.

A file with the columns `document`, `sequence` and `position` (those of an exported store, which name a row) has a value
for every row; one with `document` alone has a value for every document, kept for each of its sequences.

Axis legend: S sequences, R rows.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from storage.arrow import row_keys, schema
from storage.errors import UsageError
from storage.files import storage_errors
from storage.plan import check_columns
from storage.rows import SequenceBatch

ROW_KEYS = ("document", "sequence", "position")
_TYPES = {
    pa.bool_(): "uint8",
    **dict.fromkeys((pa.uint8(), pa.int8()), "uint8"),
    **dict.fromkeys((pa.uint16(), pa.int16()), "uint16"),
    **dict.fromkeys((pa.uint32(), pa.int32()), "uint32"),
    **dict.fromkeys((pa.uint64(), pa.int64()), "uint64"),
    pa.float16(): "float16",
    pa.float32(): "float32",
}


class ColumnFile:
    """One column in a Parquet file.

    Args:
        name: of the column, in the file and in the store.
        path: of the file.

    Attributes:
        axis: `row` or `sequence`.
        dtype: name of the type that is stored.
        sha256: of the file.

    Raises:
        UsageError: no such file or column, or a name or type that cannot be stored.
        StorageUnavailableError: it cannot be read.
    """

    def __init__(self, name: str, path: str | os.PathLike[str]) -> None:
        self.name, self._path = name, Path(path)
        with storage_errors(self._path):
            try:
                self._data = ds.dataset(self._path, format="parquet")
            except (pa.ArrowInvalid, FileNotFoundError) as error:
                raise self._refused(f"no Parquet file: {error}") from error
            with open(self._path, "rb") as file:
                self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        found = self._data.schema
        self.axis = "row" if {"sequence", "position"} <= set(found.names) else "sequence"
        self._keys = ROW_KEYS if self.axis == "row" else ("document",)
        missing = [key for key in (*self._keys, name) if key not in found.names]
        if missing:
            raise self._refused(f"it has no column {missing[0]!r}; it has {', '.join(found.names)}")
        kind = found.field(name).type
        if kind not in _TYPES:
            raise self._refused(f"column {name} has type {kind}", fix="cast it to float32, or to an integer type")
        self.dtype = _TYPES[kind]
        try:
            check_columns({name: self.about})
        except ValueError as error:
            raise self._refused(str(error)) from error
        if name in schema().names:
            raise self._refused(f"rows have a column {name} already")

    @property
    def about(self) -> dict[str, str]:
        """Axis and type, as a plan holds them."""
        return {"axis": self.axis, "dtype": self.dtype}

    def values(self, batch: SequenceBatch, number_S: NDArray[np.int64]) -> NDArray[Any]:
        """Return the values for the rows [R] or sequences [S] of a batch.

        Args:
            batch: whole documents, in order.
            number_S: number of each sequence in its split.

        Raises:
            UsageError: a value is missing, null, negative or given twice.
        """
        wanted = np.stack(row_keys(batch, number_S) if self.axis == "row" else [batch.document], axis=1)
        if len(wanted) == 0:
            return np.zeros(0, self.dtype)
        document = ds.field("document")
        inside = (document >= int(batch.document[0])) & (document <= int(batch.document[-1]))
        with storage_errors(self._path):
            table = self._data.to_table(columns=[*self._keys, self.name], filter=inside)
        found = np.stack([table[key].to_numpy().astype(np.int64) for key in self._keys], axis=1)
        keys, first = np.unique(_records(found), return_index=True)
        if len(keys) < len(found):
            raise self._refused("a value is given twice for one row or document")
        at = np.minimum(np.searchsorted(keys, _records(wanted)), max(len(keys) - 1, 0))
        absent = np.ones(len(wanted), bool) if len(keys) == 0 else keys[at] != _records(wanted)
        if np.any(absent):
            place = ", ".join(
                f"{key} {value}" for key, value in zip(self._keys, wanted[np.argmax(absent)], strict=True)
            )
            raise self._refused(f"{int(absent.sum())} values are missing, the first for {place}")
        return self._checked(table[self.name])[first[at]]

    def _checked(self, column: pa.ChunkedArray) -> NDArray[Any]:
        if column.null_count:
            raise self._refused(f"column {self.name} has nulls", fix="fill them: floats with NaN, integers as you like")
        values = column.to_numpy()
        if values.dtype.kind == "i" and len(values) and int(values.min()) < 0:
            raise self._refused(f"column {self.name} has negative numbers", fix="cast it to float32, or shift it")
        stored: NDArray[Any] = values.astype(self.dtype)
        return stored

    def _refused(self, what: str, fix: str | None = None) -> UsageError:
        return UsageError(f"column {self.name}: {what}", where=str(self._path), fix=fix)


def _records(keys: NDArray[np.int64]) -> NDArray[Any]:
    """Return rows of integers as records that can be compared: one number each if there is one column."""
    if keys.shape[1] == 1:
        return keys[:, 0]
    return np.ascontiguousarray(keys).view([(f"k{column}", np.int64) for column in range(keys.shape[1])])[:, 0]
