"""A corpus as training reads it without a store: token ids in memory, no text, no teacher's rows.

Data path: Document -> TokenWindow -> **corpus in memory** -> packed micro-batches -> student and live teacher.

Axis legend as in storage/rows.py: T tokens, S sequences, R rows, H head entries, C tail entries, X+1 offsets.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.corpus.tokenize import TokenWindow
from storage.plan import HeldoutRule
from storage.rows import SequenceBatch

TOKENS_BETWEEN_EVENTS = 1 << 20  # a second or so of tokenisation


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """How far a corpus is read: `documents` of `total`, and `tokens` of them. `seconds` are since the first."""

    documents: int
    total: int
    tokens: int
    seconds: float
    seconds_left: float


class TokenizedCorpus:
    """Sequences in memory, in the order in which they come: 5 bytes a token, 24 a sequence.

    Read like a store's split (`stages.batches.steps.Source`); rows have no targets.
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
        offset_S = np.concatenate([[0], np.cumsum(length_S)]).astype(np.int64)
        # Where each token lies: the start of its sequence here, shifted to the start of that sequence in memory.
        start_S = np.frombuffer(self._ends, dtype=np.int64)[wanted_S]
        at_T = np.arange(offset_S[-1]) + np.repeat(start_S - offset_S[:-1], length_S)
        has_row_T = np.frombuffer(self._has_row, dtype=np.bool_)[at_T]
        row_S = np.concatenate([[0], np.cumsum(has_row_T)]).astype(np.int64)[offset_S]
        return _without_targets(
            tokens=np.frombuffer(self._tokens, dtype=np.uint32)[at_T],
            has_row=has_row_T,
            token_offset=offset_S,
            row_offset=row_S,
            document=np.frombuffer(self._document, dtype=np.int64)[wanted_S],
            window_start=np.frombuffer(self._window_start, dtype=np.int64)[wanted_S],
        )


def split_corpus(
    sequences: Iterable[TokenWindow], rule: HeldoutRule, *, documents: int
) -> Generator[Tokenized, None, tuple[TokenizedCorpus, TokenizedCorpus]]:
    """Training and held-out sequences, by the rule of a store; on the way, how far it is.

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


def _without_targets(
    *,
    tokens: NDArray[np.uint32],
    has_row: NDArray[np.bool_],
    token_offset: NDArray[np.int64],
    row_offset: NDArray[np.int64],
    document: NDArray[np.int64],
    window_start: NDArray[np.int64],
) -> SequenceBatch:
    """A batch whose rows hold nothing yet."""
    rows, no_entry = int(row_offset[-1]), np.zeros_like(token_offset)
    value_R = np.zeros(rows, np.float32)
    return SequenceBatch(
        tokens=tokens,
        token_offset=token_offset,
        row_offset=row_offset,
        head_offset=no_entry,
        tail_offset=no_entry,
        document=document,
        window_start=window_start,
        token_end_byte=None,
        has_row=has_row,
        head_size=np.zeros(rows, np.int32),
        tail_size=np.zeros(rows, np.int32),
        head_ids=np.empty(0, np.uint32),
        logprob=np.empty(0, np.float32),
        tail_ids=np.empty(0, np.uint32),
        count=np.empty(0, np.uint16),
        tail_logit=value_R,
        logsumexp=value_R,
        entropy=value_R,
        next_logprob=value_R,
    )
