"""A corpus as training reads it without a store: token ids in memory, no text, no teacher's rows.

Data path: Document -> TokenWindow -> **corpus in memory** -> packed micro-batches -> student and live teacher.

Axis legend as in storage/rows.py: T tokens, S sequences, R rows, H head entries, C tail entries, X+1 offsets.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.corpus.tokenize import TokenWindow
from storage.plan import HeldoutRule
from storage.rows import ARRAYS, SequenceBatch
from storage.segments import rank_in_row, row_starts

TOKENS_BETWEEN_EVENTS = 1 << 20  # a second or so of tokenisation


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """How far a corpus is read: `documents` of `total`, and `tokens` of them. `seconds` are since the first.

    The last one of a corpus has `notes`: what it holds that a user should know of, in sentences.
    """

    documents: int
    total: int
    tokens: int
    seconds: float
    seconds_left: float
    notes: tuple[str, ...] = ()


class TokenizedCorpus:
    """Sequences in memory, in the order in which they come: 5 bytes a token, 24 a sequence.

    Read like a store's split (`stages.batches.steps.SequenceSource`); rows have no targets.
    """

    def __init__(self, sequences: Iterable[TokenWindow] = ()) -> None:
        # Grown in place: a list of small arrays would take their memory twice while it is joined.
        self._tokens, self._has_row = array("I"), array("B")
        self._ends, self._document, self._window_start = array("q", [0]), array("q"), array("q")
        for sequence in sequences:
            self.add(sequence)

    def add(self, sequence: TokenWindow) -> None:
        """Append a sequence."""
        self._tokens.frombytes(sequence.tokens.astype(np.uint32).tobytes())
        self._has_row.frombytes(sequence.has_row.tobytes())
        self._ends.append(len(self._tokens))
        self._document.append(sequence.document)
        self._window_start.append(sequence.window_start)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._document)

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return len(self._tokens)

    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each sequence, int64 [S]."""
        ends_S = np.frombuffer(self._ends, dtype=np.int64)
        return ends_S[1:] - ends_S[:-1]

    def read(self, indices: Sequence[int] | NDArray[np.integer], *, targets: bool = True) -> SequenceBatch:
        """Return sequences by number, in the order asked. Heads and tails are empty, values of rows 0.

        Args:
            indices: numbers in range(len(self)); repeats are allowed.
            targets: must be False: the rows' targets come from a live teacher.
        """
        if targets:
            raise ValueError("a corpus has no targets: a live teacher gives them")
        wanted_S = np.asarray(indices, dtype=np.int64).reshape(-1)
        length_S = self.lengths()[wanted_S]
        offset = row_starts(length_S)
        at_T = np.repeat(np.frombuffer(self._ends, dtype=np.int64)[wanted_S], length_S) + rank_in_row(length_S)
        has_row_T = np.frombuffer(self._has_row, dtype=np.bool_)[at_T]
        return _without_targets(
            tokens=np.frombuffer(self._tokens, dtype=np.uint32)[at_T],
            has_row=has_row_T,
            token_offset=offset,
            row_offset=row_starts(has_row_T)[offset],
            document=np.frombuffer(self._document, dtype=np.int64)[wanted_S],
            window_start=np.frombuffer(self._window_start, dtype=np.int64)[wanted_S],
        )


def split_corpus(
    sequences: Iterable[TokenWindow], rule: HeldoutRule, *, documents: int
) -> Generator[Tokenized, None, tuple[TokenizedCorpus, TokenizedCorpus]]:
    """Split into training and held-out sequences, by the rule of a store; yield how far it is.

    Args:
        sequences: of whole documents in the corpus's order, taken one by one, so that no text has to stay.
        rule: which documents are held out.
        documents: in the corpus.
    """
    train, heldout = TokenizedCorpus(), TokenizedCorpus()
    began, told = time.perf_counter(), 0
    for sequence in sequences:
        (heldout if rule.holds_out(sequence.document) else train).add(sequence)
        tokens, done = train.tokens + heldout.tokens, sequence.document + 1
        if tokens >= told + TOKENS_BETWEEN_EVENTS:
            told, seconds = tokens, time.perf_counter() - began
            left = seconds / done * (documents - done)
            yield Tokenized(documents=done, total=documents, tokens=tokens, seconds=seconds, seconds_left=left)
    return train, heldout


def _without_targets(**given: Any) -> SequenceBatch:
    """Return a batch of these arrays whose rows hold nothing yet."""
    lengths = {"row": int(given["row_offset"][-1]), "sequence_edge": len(given["row_offset"])}
    absent: dict[str, Any] = {
        item.name: None if item.absent is None else np.zeros(lengths.get(item.axis, 0), item.dtype)
        for item in ARRAYS
        if item.name not in given
    }
    return SequenceBatch(**given, **absent)
