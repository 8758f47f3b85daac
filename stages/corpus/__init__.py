"""The corpus: sources of documents, and documents rendered as token windows.

Data path: configuration -> **Source -> Document -> TokenWindow** -> teacher.

To add a source: write a file with a class that satisfies `Source` and a function that opens it and checks all of it,
and list that in `SOURCES`. Configuration, schema and tests read the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pkgutil import resolve_name

from stages.corpus.source import Corpus, Document, Prompted, Source, SourceSpec
from storage.errors import UsageError

__all__ = ["SOURCES", "Corpus", "Document", "Source", "SourceSpec", "open_corpus"]


@dataclass(frozen=True, kw_only=True)
class SourceKind:
    """One kind of source.

    Attributes:
        about: what it reads, for the documentation of `corpus.source`.
        opener: `module:function`, SourceSpec -> Source, which checks all of it.
        path: whether it needs a path; else it takes none.
        fields: whether its documents have fields, of which one holds the text and another may hold a prompt.
    """

    about: str
    opener: str
    path: bool = True
    fields: bool = True

    def open(self, spec: SourceSpec) -> Source:
        """Open and check it. Raises UsageError."""
        source: Source = resolve_name(self.opener)(spec)
        return source


SOURCES: Mapping[str, SourceKind] = {
    "text": SourceKind(about="one document per file", opener="stages.corpus.text:open_text", fields=False),
    "jsonl": SourceKind(about="one document per line", opener="stages.corpus.jsonl:open_jsonl"),
    "parquet": SourceKind(about="one document per row", opener="stages.corpus.parquet:open_parquet"),
    "dataset": SourceKind(
        about="a Hugging Face dataset by name or local directory", opener="stages.corpus.dataset:open_dataset"
    ),
    "topics": SourceKind(
        about="the Python documentation topics that every Python installation carries",
        opener="stages.corpus.topics:open_topics",
        path=False,
        fields=False,
    ),
}


def open_corpus(specs: Iterable[SourceSpec]) -> Corpus:
    """Open and check every source, and join them in the order given.

    Raises:
        UsageError: an unknown kind of source, or whatever is wrong with one of them.
    """
    sources = []
    for spec in specs:
        if spec.source not in SOURCES:
            raise UsageError(f"unknown source {spec.source!r}", where="source", fix=f"use {', '.join(SOURCES)}")
        source = SOURCES[spec.source].open(spec)
        if spec.prompt_field is not None:
            prompts = SOURCES[spec.source].open(replace(spec, field=spec.prompt_field))
            source = Prompted(prompts=prompts, texts=source)
        sources.append(source)
    return Corpus(sources)
