"""Source `text`: one document per file, files sorted by path."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.corpus.refusals import BadRecords, other_kind
from stages.corpus.source import SourceSpec
from stages.input_files import FileState, find_files, unchanged
from storage.errors import UsageError
from storage.values import Json


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """UTF-8 text files."""

    files: tuple[FileState, ...]
    hashes: tuple[str, ...]

    @property
    def identity(self) -> Mapping[str, Json]:
        """What makes the content; see `Source`."""
        return {"kind": "text", "files": list(self.hashes)}

    @property
    def recorded(self) -> Mapping[str, Json]:
        """What may differ for the same content; see `Source`."""
        return {"paths": [str(file.path) for file in self.files]}

    def __len__(self) -> int:
        return len(self.files)

    def read(self, first: int, end: int) -> list[str]:
        """Return the texts with first <= index < end. Raises IdentityError if a file was changed since the scan."""
        return [_decode(file.path, _read(file)) for file in self.files[first:end]]


def open_text(spec: SourceSpec) -> TextFiles:
    """Open the files that `spec.path` names, and check that each is UTF-8.

    Raises:
        UsageError: no file, or some that are not UTF-8 (named, with the position, or with what else they are).
        IdentityError: a file was changed during the scan.
    """
    files = tuple(FileState.of(path) for path in find_files(spec.path or ""))
    hashes = []
    bad = BadRecords()
    for file in files:
        data = _read(file)
        try:
            _decode(file.path, data)
        except UsageError as error:
            bad.note(other_kind(data, str(file.path), json=False) or error)
        hashes.append(hashlib.sha256(data).hexdigest())
    bad.refuse()
    return TextFiles(files=files, hashes=tuple(hashes))


def _read(file: FileState) -> bytes:
    with unchanged(file):
        return file.path.read_bytes()


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"not UTF-8 text: byte {data[error.start]:#04x} at position {error.start}",
            where=str(path),
            fix="convert the file to UTF-8, or narrow the pattern to text files",
        ) from error
