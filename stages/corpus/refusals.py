"""What a corpus is refused for, told so that it can be mended at once: several bad records together, files of another
kind than the source reads, and columns that hold conversations.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from storage.errors import UsageError

LISTED = 5  # bad records that a message names
MOST = 100  # bad records after which a scan ends

_CONVERSATION = (
    "conversations are not read as they are: write each into a field of text first, with "
    "tokenizer.apply_chat_template(messages, tokenize=False)"
)
# First bytes of a file, what it is, what to do.
_KINDS = (
    (b"\x1f\x8b", "compressed with gzip", "decompress it (gunzip), and name the result"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it (zstd -d), and name the result"),
    (b"\xfd7zXZ\0", "compressed with xz", "decompress it (unxz), and name the result"),
    (b"BZh", "compressed with bzip2", "decompress it (bunzip2), and name the result"),
    (b"PK\3\4", "a zip archive", "unpack it (unzip), and name the files in it"),
    (b"PAR1", "a Parquet file", "set source: parquet"),
    (b"ARROW1", "an Arrow file", "convert it to Parquet"),
    (b"\xff\xfe", "UTF-16 text", "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "UTF-16 text", "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
)
_JSON = (
    (b"[", "one JSON array", "write one object per line (jq -c '.[]' FILE), and read that with source: jsonl"),
    (b"{", "JSON", "write one object per line (jq -c . FILE), and read that with source: jsonl"),
)


@dataclass(kw_only=True)
class BadRecords:
    """Records of a source that cannot be read: a scan notes them and goes on, so that all are mended in one go."""

    count: int = 0
    _noted: list[tuple[UsageError, str]] = field(default_factory=list)
    _alike: bool = True

    def note(self, error: UsageError, *, file: str = "") -> None:
        """Take in what is wrong with a record.

        Args:
            error: names the record.
            file: what its `where` begins with, where several records of one file are told together.

        Raises:
            UsageError: there are so many that the scan need not go on.
        """
        self.count += 1
        self._alike &= not self._noted or error.what == self._noted[0][0].what
        if len(self._noted) < LISTED:
            self._noted.append((error, file))
        if self.count >= MOST:
            self.refuse(whole=False)

    def refuse(self, *, whole: bool = True) -> None:
        """Raise UsageError if there are any: with their number, the first few by name.

        Args:
            whole: whether the scan went to the end.
        """
        if not self._noted:
            return
        first, file = self._noted[0]
        if self.count == 1:
            raise first
        places = [(error.where or "").removeprefix(f"{file}, ") for error, _ in self._noted]
        told = [f"{place}: {error.what}" for place, (error, _) in zip(places, self._noted, strict=True)]
        told = [f"{first.what} in each of them: {places[0]}", *places[1:]] if self._alike else told
        if self.count > len(told):
            told.append(f"and {self.count - len(told)} more")
        number = f"{self.count} records cannot be read" + ("" if whole else " so far, and the rest was not looked at")
        same = all(error.fix == first.fix for error, _ in self._noted)
        raise UsageError(
            f"{number}: {'; '.join(told)}",
            where=file or first.where,
            fix=first.fix if same else "drop or repair these records",
        )


def other_kind(beginning: bytes, where: str, *, json: bool = True) -> UsageError | None:
    """Return what to tell of a file that its source cannot read, by its first bytes; None: nothing better is known.

    Args:
        json: whether it could be JSON that is laid out in another way.
    """
    found = [(what, fix) for magic, what, fix in _KINDS if beginning.startswith(magic)]
    if json:
        text = beginning.removeprefix(codecs.BOM_UTF8).lstrip()
        found += [(what, fix) for magic, what, fix in _JSON if text.startswith(magic)]
    if not found:
        return None
    what, fix = found[0]
    return UsageError(f"the file is {what}, which this source does not read", where=where, fix=fix)


def not_text(what: str, where: str, *, conversation: bool) -> UsageError:
    """Return the refusal of a value or a column that is no text."""
    fix = _CONVERSATION if conversation else "drop or repair the row, or set field to one that holds text"
    return UsageError(what, where=where, fix=fix)


def is_conversation(value: object) -> bool:
    """Tell whether a JSON value is a list of messages, each with who says it."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in value)


def holds_conversations(kind: pa.DataType) -> bool:
    """Tell whether an Arrow type is that of lists of messages, each with who says it."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    return bool({"role", "from"} & {item.name for item in kind.value_type})


def note_nulls(bad: BadRecords, column: pa.ChunkedArray, *, name: str, file: str, first_row: int) -> None:
    """Note the nulls of a column, by their rows of the file; those count from 0, beginning at `first_row`."""
    if column.null_count:
        for row in np.flatnonzero(column.is_null())[:MOST]:
            bad.note(
                UsageError(
                    f"column {name!r} is null", where=f"{file}, row {first_row + row}", fix="drop or repair the row"
                ),
                file=file,
            )
