"""The corpus: sources of documents, and documents rendered as token windows.

Data path: configuration -> **Source -> Document -> TokenWindow** -> teacher.

To add a source: write a file with a class that satisfies `Source` and a function that opens it and checks all of it,
and list it in `SOURCES`. The tests run over the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from stages.corpus.dataset import open_dataset
from stages.corpus.jsonl import open_jsonl
from stages.corpus.parquet import open_parquet
from stages.corpus.source import Corpus, Document, Prompted, Source, SourceSpec
from stages.corpus.text import open_text
from stages.corpus.topics import open_topics
from storage.errors import UsageError

__all__ = ["SOURCES", "Corpus", "Document", "Source", "SourceSpec", "open_corpus"]

SOURCES: Mapping[str, Callable[[SourceSpec], Source]] = {
    "text": open_text,
    "jsonl": open_jsonl,
    "parquet": open_parquet,
    "dataset": open_dataset,
    "topics": open_topics,
}


def open_corpus(specs: Iterable[SourceSpec]) -> Corpus:
    """Open and check every source, and join them in the order given.

    Raises:
        UsageError: an unknown kind of source, or whatever is wrong with one of them.
    """
    sources = []
    for spec in specs:
        if spec.source not in SOURCES:
            raise UsageError(f"unknown source {spec.source!r}", where="corpus.source", fix=f"use {', '.join(SOURCES)}")
        source = SOURCES[spec.source](spec)
        if spec.prompt_field is not None:
            prompts = SOURCES[spec.source](replace(spec, field=spec.prompt_field))
            source = Prompted(prompts=prompts, texts=source)
        sources.append(source)
    return Corpus(sources)
