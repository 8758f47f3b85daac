"""Source `topics`: the documentation topics that every Python installation carries, one document per topic.

About 465 kB of real English technical text, always there: the corpus of the demo.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from platform import python_version

from stages.corpus.source import SourceSpec
from storage.values import Json, canonical_json


@dataclass(frozen=True, kw_only=True)
class Topics:
    """Topic texts in sorted key order. They change with the Python version, hence the hash over the content."""

    texts: tuple[str, ...]

    @property
    def identity(self) -> Mapping[str, Json]:
        """What makes the content; see `Source`."""
        return {"kind": "topics", "sha256": hashlib.sha256(canonical_json(list(self.texts))).hexdigest()}

    @property
    def recorded(self) -> Mapping[str, Json]:
        """What may differ for the same content; see `Source`."""
        return {"python": python_version()}

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, first: int, end: int) -> list[str]:
        """Return the texts with first <= index < end."""
        return list(self.texts[first:end])


def open_topics(spec: SourceSpec) -> Topics:
    """Open the topics; nothing in `spec` matters."""
    del spec
    from pydoc_data.topics import topics  # 0.5 MB of strings: only when asked for

    return Topics(texts=tuple(topics[key] for key in sorted(topics)))
