"""Source `jsonl`: one JSON object per line, the text in one field.

Not read through `datasets`: its JSON loader infers a type per column and, where a later row differs, silently
re-encodes every text of that column as a JSON string. Here one pass hashes the file, checks every line and notes
where it begins, so that any range can be read without holding the corpus in memory (8 bytes per document).
"""

from __future__ import annotations

import codecs
import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.corpus.refusals import BadRecords, is_conversation, not_text, other_kind
from stages.corpus.source import SourceSpec
from stages.input_files import FileState, find_files, unchanged
from storage.errors import UsageError
from storage.values import Json


@dataclass(frozen=True, kw_only=True)
class JsonlFile:
    """One checked file: per non-empty line, the byte where it begins and its number counted from 1, both int64 [D]."""

    state: FileState
    sha256: str
    begins: NDArray[np.int64]
    line_numbers: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class JsonlFiles:
    """Files in order, one document per non-empty line."""

    files: tuple[JsonlFile, ...]
    field: str

    @property
    def identity(self) -> Mapping[str, Json]:
        """What makes the content; see `Source`."""
        return {"kind": "jsonl", "field": self.field, "files": [file.sha256 for file in self.files]}

    @property
    def recorded(self) -> Mapping[str, Json]:
        """What may differ for the same content; see `Source`."""
        return {"paths": [str(file.state.path) for file in self.files]}

    def __len__(self) -> int:
        return sum(len(file.begins) for file in self.files)

    def read(self, first: int, end: int) -> list[str]:
        """Return the texts with first <= index < end. Raises IdentityError if a file was changed since the scan."""
        texts: list[str] = []
        offset = 0
        for file in self.files:
            low, high = max(first - offset, 0), min(end - offset, len(file.begins))
            offset += len(file.begins)
            if low < high:
                with unchanged(file.state):
                    texts.extend(_texts(file, self.field, low, high))
        return texts


def _texts(file: JsonlFile, field: str, low: int, high: int) -> Iterator[str]:
    with file.state.path.open("rb") as stream:
        for row in range(low, high):
            stream.seek(int(file.begins[row]))
            yield _text_of(stream.readline(), field, f"{file.state.path}, line {file.line_numbers[row]}")


def open_jsonl(spec: SourceSpec) -> JsonlFiles:
    """Open and check every line of the files that `spec.path` names.

    Raises:
        UsageError: no file, one of another kind (compressed, an array), lines that are not a JSON object, lines without
            the field, or whose field is not a string. Files and lines are named, and the fields there are.
        IdentityError: a file was changed during the scan.
    """
    bad = BadRecords()
    files = tuple(_scan(path, spec.field, bad) for path in find_files(spec.path or ""))
    bad.refuse()
    return JsonlFiles(files=files, field=spec.field)


def _scan(path: Path, field: str, bad: BadRecords) -> JsonlFile:
    digest = hashlib.sha256()
    begins, numbers = array("q"), array("q")
    position = 0
    state = FileState.of(path)
    with unchanged(state), path.open("rb") as stream:
        _refuse_other_kinds(stream.peek(), path)
        for number, line in enumerate(stream, start=1):
            digest.update(line)
            if line.strip():
                try:
                    _text_of(line, field, f"{path}, line {number}")
                except UsageError as error:
                    bad.note(error, file=str(path))
                begins.append(position)
                numbers.append(number)
            position += len(line)
    return JsonlFile(
        state=state,
        sha256=digest.hexdigest(),
        begins=np.array(begins, dtype=np.int64),
        line_numbers=np.array(numbers, dtype=np.int64),
    )


def _refuse_other_kinds(beginning: bytes, path: Path) -> None:
    """Refuse a file that cannot be JSON lines, before its first line, which may be all of it, is read."""
    first = beginning.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")[0].rstrip()
    error = other_kind(beginning, str(path))
    if error is not None and (first == b"{" or not first.startswith(b"{")):
        raise error


def _text_of(line: bytes, field: str, where: str) -> str:
    """Return the text of one line. Raises UsageError naming `where` if it has none."""
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_int=lambda _: 0)  # Python refuses those of 5,000 digits
    except RecursionError as error:
        raise UsageError(
            "the line is nested too deeply to be read",
            where=where,
            fix=f"leave the nested field out: of each line, only {field!r} is used",
        ) from error
    except ValueError as error:  # not UTF-8, not JSON
        raise UsageError(
            f"broken JSON line: {error}", where=where, fix="repair or remove the line; each must be one JSON object"
        ) from error
    if not isinstance(row, dict):
        raise UsageError(f"a line holds {type(row).__name__}, not an object", where=where, fix="write {...} per line")
    if field not in row:
        raise UsageError(
            f"no field {field!r}; the fields are {', '.join(map(repr, row)) or 'none'}",
            where=where,
            fix="set field to the field that holds the text",
        )
    text = row[field]
    if not isinstance(text, str):
        found = "null" if text is None else type(text).__name__
        raise not_text(f"field {field!r} is {found}, not a string", where, conversation=is_conversation(text))
    return _without_surrogates(text, where)


def _without_surrogates(text: str, where: str) -> str:
    """Refuse half a surrogate pair, which JSON can spell and a tokenizer cannot read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text holds a lone surrogate at character {error.start}", where=where, fix="repair the row"
        ) from error
    return text
