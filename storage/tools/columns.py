"""Columns that a conversion adds: values of one's own beside the rows, from a Parquet file.

Data path: Parquet file -> **the values of a shard, in the order of its rows** -> `convert` -> arrays of the shard.

A file with the columns `document`, `sequence` and `position` (those of an exported store, which name a row) has a value
for every row; one with `document` alone has a value for every document, kept for each of its sequences.

Axis legend: S sequences, R rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from storage.errors import IdentityError, UsageError, storage_errors
from storage.exchange.arrow import row_keys, schema
from storage.exchange.jsonl import KEYS
from storage.files.base import Stamp
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
    """One column in a Parquet file, which must not change from here on until its last value is read.

    Args:
        name: of the column, in the file and in the store.

    Attributes:
        axis: `row` or `sequence`.
        dtype: name of the type that is stored.
        sha256: of the file.

    Raises:
        UsageError: no such file or column, keys that are not whole numbers, or a name or type that cannot be stored.
        IdentityError: the file was changed meanwhile.
        StorageUnavailableError: it cannot be read.
    """

    def __init__(self, name: str, path: str | os.PathLike[str]) -> None:
        self.name, self._path = name, Path(path)
        with storage_errors(self._path):
            if not self._path.is_file():
                raise self._refused("no such file")
            self._state = self._state_now()
        with self._reading():
            self._data = ds.dataset(self._path, format="parquet")
            with open(self._path, "rb") as file:
                self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.axis = "row" if {"sequence", "position"} <= set(self._data.schema.names) else "sequence"
        self._keys = ROW_KEYS if self.axis == "row" else ("document",)
        for key in self._keys:
            if not pa.types.is_integer(kind := self._type_of(key)):
                raise self._refused(
                    f"column {key} has type {kind}", fix="cast it to int64: it says where a value belongs"
                )
        kind = self._type_of(name)
        if kind not in _TYPES:
            raise self._refused(f"column {name} has type {kind}", fix="cast it to float32, or to an integer type")
        self.dtype = _TYPES[kind]
        try:
            check_columns({name: self.about})
        except ValueError as error:
            raise self._refused(str(error)) from error
        if name in KEYS.union(schema().names):
            raise self._refused("exports have something of that name already", fix="give the column another name")

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
            UsageError: a value is missing, null, negative or given twice, or the file is damaged.
            IdentityError: the file was changed.
            StorageUnavailableError: it is gone, or cannot be read.
        """
        wanted = np.stack(row_keys(batch, number_S) if self.axis == "row" else [batch.document], axis=1)
        if len(wanted) == 0:
            return np.zeros(0, self.dtype)
        document = ds.field("document")
        inside = (document >= int(batch.document[0])) & (document <= int(batch.document[-1]))
        with self._reading():
            table = self._data.to_table(columns=[*self._keys, self.name], filter=inside)
        for key in self._keys:
            if table[key].null_count:
                raise self._refused(f"column {key} has nulls", fix="drop these lines: nothing says where they belong")
        found = np.stack([table[key].to_numpy().astype(np.int64) for key in self._keys], axis=1)
        keys, first = np.unique(_records(found), return_index=True)
        if len(keys) < len(found):
            raise self._refused("a value is given twice for one row or document")
        at = np.minimum(np.searchsorted(keys, _records(wanted)), max(len(keys) - 1, 0))
        absent = np.ones(len(wanted), bool) if len(keys) == 0 else keys[at] != _records(wanted)
        if np.any(absent):
            where = ", ".join(
                f"{key} {value}" for key, value in zip(self._keys, wanted[np.argmax(absent)], strict=True)
            )
            raise self._refused(f"{int(absent.sum())} values are missing, the first for {where}")
        return self._checked(table[self.name])[first[at]]

    def _checked(self, column: pa.ChunkedArray) -> NDArray[Any]:
        if column.null_count:
            raise self._refused(f"column {self.name} has nulls", fix="fill them: floats with NaN, integers as you like")
        values = column.to_numpy()
        if values.dtype.kind == "i" and len(values) and int(values.min()) < 0:
            raise self._refused(f"column {self.name} has negative numbers", fix="cast it to float32, or shift it")
        stored: NDArray[Any] = values.astype(self.dtype)
        return stored

    def _type_of(self, name: str) -> pa.DataType:
        found = self._data.schema
        number = found.names.count(name)
        if number != 1:
            raise self._refused(f"it has {number or 'no'} column {name!r}; it has {', '.join(found.names)}")
        return found.field(name).type

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Check after a read that the file is still the same, and tell what is wrong in it."""
        with storage_errors(self._path):
            try:
                yield
            except (pa.ArrowException, OSError) as error:
                self._require_same()  # what is replaced while it is read may seem damaged
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                reason = str(error).partition("\n")[0]
                raise self._refused(f"no readable Parquet file: {reason}", fix="write the file again") from error
            self._require_same()

    def _state_now(self) -> tuple[Stamp, int]:
        """Return the stamp and the time of the last status change: these files have no checksums of their own."""
        status = self._path.stat()
        return Stamp.of(status), status.st_ctime_ns

    def _require_same(self) -> None:
        if self._state_now() != self._state:
            raise IdentityError(
                "the file was changed while the conversion was reading it",
                where=str(self._path),
                fix="put its content back and run the same command again: what is committed is kept; "
                "for the new content name another target",
            )

    def _refused(self, what: str, fix: str | None = None) -> UsageError:
        return UsageError(f"column {self.name}: {what}", where=str(self._path), fix=fix)


def _records(keys: NDArray[np.int64]) -> NDArray[Any]:
    """Return rows of integers as records that can be compared: one number each if there is one column."""
    if keys.shape[1] == 1:
        return keys[:, 0]
    return np.ascontiguousarray(keys).view([(f"k{column}", np.int64) for column in range(keys.shape[1])])[:, 0]
