"""What a corpus source is, and the corpus: its sources one after the other, numbered through.

Data path: configuration -> **sources -> Document** -> TokenWindow -> teacher. A document's number is its index in the
concatenated sources before any filter; it never changes, and draws, held-out rule and shards depend on it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from storage.errors import UsageError
from storage.values import Json

READ_AHEAD = 256  # documents per read of a source
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """What a configuration says about one source; see `SourceConfig` for the meaning of each field."""

    source: str
    path: str | None = None
    field: str = "text"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    prompt_field: str | None = None


@dataclass(frozen=True, kw_only=True)
class Document:
    """One item of the corpus.

    Attributes:
        number: its index in the corpus.
        text: prompt and what follows it, without the byte order mark that a source may have put before either.
        prompt: how many characters of the text are a prompt.
        byte_order_mark: whether there was one.
    """

    number: int
    text: str
    prompt: int = 0
    byte_order_mark: bool = False

    @classmethod
    def of(cls, number: int, prompt: str, text: str) -> Document:
        """Join a prompt, which may be empty, and the text behind it."""
        parts = [part.removeprefix(BYTE_ORDER_MARK) for part in (prompt, text)]
        return cls(number=number, text="".join(parts), prompt=len(parts[0]), byte_order_mark=parts != [prompt, text])


class Source(Protocol):
    """Texts in a fixed order that can be read from any position.

    Opening a source checks all of it: every text exists and is a string, so that nothing is found out hours later.
    """

    @property
    def identity(self) -> Mapping[str, Json]:
        """What makes the content: kind, field, and a sha256 per file or over the content. No paths."""
        ...

    @property
    def recorded(self) -> Mapping[str, Json]:
        """What may differ for the same content: paths, names, revisions."""
        ...

    def __len__(self) -> int:
        """Return the number of documents."""
        ...

    def read(self, first: int, end: int) -> list[str]:
        """Return the texts with first <= index < end."""
        ...


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """A source whose documents are a prompt and what follows it, from two fields, joined as they are.

    Attributes:
        prompts, texts: the same source, opened for one field and for the other.
    """

    prompts: Source
    texts: Source

    @property
    def identity(self) -> Mapping[str, Json]:
        """What makes the content; see `Source`."""
        return {**self.texts.identity, "prompt_field": self.prompts.identity["field"]}

    @property
    def recorded(self) -> Mapping[str, Json]:
        """What may differ for the same content; see `Source`."""
        return self.texts.recorded

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, first: int, end: int) -> list[str]:
        """Return prompt and text joined, for first <= index < end."""
        return [prompt + text for prompt, text in self.read_pairs(first, end)]

    def read_pairs(self, first: int, end: int) -> list[tuple[str, str]]:
        """Return each prompt and its text, for first <= index < end."""
        return list(zip(self.prompts.read(first, end), self.texts.read(first, end), strict=True))


class Corpus:
    """Sources in order.

    Raises:
        UsageError: there is no document in any of them.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self._ends = list(accumulate(len(source) for source in self.sources))
        if len(self) == 0:
            named = "; ".join(
                ", ".join(source.recorded.get("paths", ())) or str(source.identity["kind"]) for source in self.sources
            )
            raise UsageError("the corpus is empty: no documents", where=named, fix="name files with text")

    def __len__(self) -> int:
        return self._ends[-1]

    def documents(self, numbers: Iterable[int]) -> Iterator[Document]:
        """Yield the documents with these rising numbers, reading neighbours together."""
        for source_index, wanted in self._runs(numbers):
            first = self._ends[source_index] - len(self.sources[source_index])
            source, span = self.sources[source_index], (wanted[0] - first, wanted[-1] + 1 - first)
            pairs = (
                source.read_pairs(*span)
                if isinstance(source, Prompted)
                else [("", text) for text in source.read(*span)]
            )
            for number in wanted:
                prompt, text = pairs[number - wanted[0]]
                yield Document.of(number, prompt, text)

    def _runs(self, numbers: Iterable[int]) -> Iterator[tuple[int, list[int]]]:
        """Split rising numbers into runs within one source that span at most READ_AHEAD documents."""
        run: list[int] = []
        owner = 0
        for number in numbers:
            source_index = bisect_right(self._ends, number)
            if run and (source_index != owner or number - run[0] >= READ_AHEAD):
                yield owner, run
                run = []
            owner = source_index
            run.append(number)
        if run:
            yield owner, run
