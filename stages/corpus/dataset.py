"""Source `dataset`: a Hugging Face dataset, by hub name or local directory, one document per row.

Read through `datasets`, memory-mapped from its cache. Its fingerprint depends on paths and library versions, so the
identity is a hash over the texts themselves; the fingerprint is recorded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.corpus.refusals import BadRecords, holds_conversations, not_text, note_nulls
from stages.corpus.source import SourceSpec
from stages.input_files import user_path
from storage.errors import UsageError
from storage.values import Json

ROWS_PER_READ = 1024


@dataclass(frozen=True, kw_only=True)
class DatasetRows:
    """One column of one split."""

    rows: Any  # datasets.Dataset: the library exports no usable types
    field: str
    sha256: str
    recorded: Mapping[str, Json]

    @property
    def identity(self) -> Mapping[str, Json]:
        """What makes the content; see `Source`."""
        return {"kind": "dataset", "field": self.field, "sha256": self.sha256}

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, first: int, end: int) -> list[str]:
        """Return the texts with first <= index < end."""
        return list(self.rows[first:end][self.field])


def open_dataset(spec: SourceSpec) -> DatasetRows:
    """Load a split and check its column.

    Raises:
        UsageError: no such dataset, configuration or split; no such column (the columns are listed); a column that is
            not text; nulls in it (the rows are named).
    """
    rows = _load(spec)
    where = f"dataset {spec.path}, split {spec.split}"
    if spec.field not in rows.column_names:
        raise UsageError(
            f"no column {spec.field!r}; the columns are {', '.join(map(repr, rows.column_names))}",
            where=where,
            fix="set field to the column that holds the text",
        )
    rows = rows.select_columns([spec.field])
    kind = rows.features[spec.field]
    # Not the Arrow type: the JSON loader of `datasets` stores a column of mixed types as JSON-encoded strings.
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        conversation = holds_conversations(rows.features.arrow_schema.field(spec.field).type)
        raise not_text(f"column {spec.field!r} holds {kind}, not text", where, conversation=conversation)
    return DatasetRows(
        rows=rows,
        field=spec.field,
        sha256=_content_sha256(rows.with_format("arrow"), where),
        recorded={
            "path": spec.path,
            "name": spec.name,
            "split": spec.split,
            "revision": spec.revision,
            "fingerprint": rows._fingerprint,
        },
    )


def _load(spec: SourceSpec) -> Any:
    import datasets  # half a second: only when a dataset is asked for

    datasets.disable_progress_bars()
    path = str(spec.path)
    local = user_path(path, key="path")
    saved = [name for name in ("dataset_dict.json", "state.json") if (local / name).is_file()]
    try:
        if saved:
            return _part_of_saved(datasets.load_from_disk(str(local)), spec)
        where = str(local) if local.exists() else path
        return datasets.load_dataset(where, name=spec.name, split=spec.split, revision=spec.revision)
    except (OSError, ValueError, KeyError, AssertionError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"cannot load dataset {path!r}: {reason}",
            where=f"name: {spec.name!r}, split: {spec.split!r}, revision: {spec.revision!r}",
            fix="check name, configuration and split; offline, it must be in the cache; `hf auth login` for gated ones",
        ) from error


def _part_of_saved(saved: Any, spec: SourceSpec) -> Any:
    """Return the rows of a saved dataset that a split asks for, in the words of `datasets`: "train[:10]+test".

    A saved dataset of one split has the name that it was saved with; one without a name is `train`.
    """
    import datasets

    parts = saved if isinstance(saved, dict) else {"train" if saved.split is None else str(saved.split): saved}
    if spec.split in parts:
        return parts[spec.split]
    lengths = {name: len(rows) for name, rows in parts.items()}
    try:
        spans = datasets.ReadInstruction.from_spec(spec.split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        some = next(iter(parts))
        raise UsageError(
            f"the saved dataset holds split {', '.join(map(repr, parts))}, asked for is split {spec.split!r}: {error}",
            where=f"dataset {spec.path}",
            fix=f"set split: {some!r}, or a part of it such as '{some}[:100]', or name the directory of another split",
        ) from error
    return datasets.concatenate_datasets([parts[span.splitname].select(range(span.from_, span.to)) for span in spans])


def _content_sha256(rows: Any, where: str) -> str:
    """Hash the texts in order, each led by its length in bytes; refuse nulls."""
    digest = hashlib.sha256()
    bad = BadRecords()
    for first in range(0, len(rows), ROWS_PER_READ):
        column = rows[first : first + ROWS_PER_READ].column(0)
        note_nulls(bad, column, name=rows.column_names[0], file=where, first_row=first)
        for text in column.drop_null().to_pylist():
            data = text.encode()
            digest.update(len(data).to_bytes(8, "big"))
            digest.update(data)
    bad.refuse()
    return digest.hexdigest()
