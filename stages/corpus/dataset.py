"""Source `dataset`: a Hugging Face dataset, by hub name or local directory, one document per row.

Read through `datasets`, memory-mapped from its cache. Its fingerprint depends on paths and library versions, so the
identity is a hash over the texts themselves; the fingerprint is recorded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.corpus.parquet import refuse_nulls
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
            not text; a null in it (the row is named).
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
        raise UsageError(f"column {spec.field!r} holds {kind}, not text", where=where)
    return DatasetRows(
        rows=rows,
        field=spec.field,
        sha256=_content_sha256(rows.with_format("arrow"), f"{where}, row"),
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
    try:
        if (local / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(local))[spec.split]
        if (local / "state.json").is_file():
            return _with_split(datasets.load_from_disk(str(local)), spec)
        where = str(local) if local.exists() else path
        return datasets.load_dataset(where, name=spec.name, split=spec.split, revision=spec.revision)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"cannot load dataset {path!r}: {reason}",
            where=f"name: {spec.name!r}, split: {spec.split!r}, revision: {spec.revision!r}",
            fix="check name, configuration and split; offline, it must be in the cache; `hf auth login` for gated ones",
        ) from error


def _with_split(rows: Any, spec: SourceSpec) -> Any:
    """Refuse a single saved dataset that is another split than the one asked for; one without a name is `train`."""
    found = "train" if rows.split is None else str(rows.split)
    if found != spec.split:
        raise UsageError(
            f"the saved dataset is split {found!r}, asked for is split {spec.split!r}",
            where=f"dataset {spec.path}",
            fix=f"set split: {found!r}, or name the directory of the other split",
        )
    return rows


def _content_sha256(rows: Any, where: str) -> str:
    """Hash the texts in order, each led by its length in bytes; refuse nulls on the way."""
    digest = hashlib.sha256()
    for first in range(0, len(rows), ROWS_PER_READ):
        column = rows[first : first + ROWS_PER_READ].column(0)
        refuse_nulls(column, where, first)
        for text in column.to_pylist():
            data = text.encode()
            digest.update(len(data).to_bytes(8, "big"))
            digest.update(data)
    return digest.hexdigest()
