"""What a store holds, in words: tokens in their context, and what the teacher believed would come next.

Data path: store -> `StoreReader` -> **rows as text** -> terminal or report. Tokens are decoded with the tokenizer files
that the store carries; neither the teacher nor a network is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from storage.errors import UsageError
from storage.plan import Split
from storage.reader import StoreReader
from storage.rows import SequenceBatch
from storage.segments import sigmoid

CONTEXT = 12  # tokens shown before a position
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One entry of a row's head.

    Attributes:
        text: the token, decoded.
        probability: the teacher's.
        follows: whether it is the token that follows in the corpus.
    """

    text: str
    probability: float
    follows: bool


@dataclass(frozen=True, kw_only=True)
class RowText:
    """One target row.

    Attributes:
        position: index in the sequence of the last token that the teacher had seen.
        context: the text up to that token.
        next_text: the token that follows in the corpus.
        next_probability: what the teacher gave it.
        candidates: the most probable tokens, falling.
        head_mass: probability of the exact head; None for rows of samples alone.
        entropy: of the teacher's whole distribution, nats.
        tail: sampled tokens outside the head, decoded, with how often each was drawn; most frequent first.
    """

    position: int
    context: str
    next_text: str
    next_probability: float
    candidates: tuple[Candidate, ...]
    head_mass: float | None
    entropy: float
    tail: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class SequenceText:
    """One sequence with some of its rows.

    Attributes:
        number: global index in its split.
        document: number of the document it was cut from.
        window_start: index of its first token in the document.
        tokens: how many it has.
        rows: how many target rows it has.
        head_mass: mean probability of the exact head over its rows; None for rows of samples alone.
        entropy: mean entropy, nats.
        text: the whole sequence, decoded.
        shown: neighbouring rows, in order.
    """

    number: int
    document: int
    window_start: int
    tokens: int
    rows: int
    head_mass: float | None
    entropy: float
    text: str
    shown: tuple[RowText, ...]


class TokenText:
    """Token ids of a store as text.

    Args:
        files: the store's tokenizer files by name.

    Raises:
        UsageError: the store carries no fast tokenizer.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        if TOKENIZER_FILE not in files:
            raise UsageError(
                f"the store carries no {TOKENIZER_FILE}, so its tokens cannot be shown as text",
                fix="use --format json, which gives token ids",
            )
        self._tokenizer = Tokenizer.from_buffer(files[TOKENIZER_FILE])

    def join(self, ids: Sequence[int]) -> str:
        """Decode a run of tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def after(self, previous: int, token: int) -> str:
        """Decode one token as it reads after another: decoders drop the space of a token that stands alone."""
        before, both = self.join([previous]), self.join([previous, token])
        return both[len(before) :] if both.startswith(before) else self.join([token])


def open_store(path: Path, split: Split) -> StoreReader:
    """Open a store for looking at it; the shards committed so far suffice.

    Raises:
        UsageError: there is no store, or nothing in the split.
        CorruptionError: it is damaged.
    """
    reader = StoreReader(path, split=split, allow_partial=True)
    if len(reader) == 0:
        committed = "in the committed shards" if not reader.shards else "in the store"
        raise UsageError(f"no {split} sequences {committed}", where=str(path), fix=f"pipeline status {path}")
    return reader


def choose(reader: StoreReader, count: int, seed: int) -> list[int]:
    """Draw numbers of sequences without repetition; a smaller sample is the beginning of a larger one."""
    generator = np.random.default_rng(seed)
    drawn: dict[int, None] = {}
    while len(drawn) < min(count, len(reader)):
        drawn[int(generator.integers(len(reader)))] = None
    return list(drawn)


def sample_sequences(
    reader: StoreReader, *, count: int, seed: int = 0, rows: int = 8, candidates: int = 5
) -> list[SequenceText]:
    """Choose sequences and show neighbouring rows of each: the same choice for the same store and seed.

    Args:
        count: sequences wanted; fewer if the split has fewer.
        rows: target rows shown per sequence, starting at a chosen one.
        candidates: most probable tokens shown per row.
    """
    text = TokenText(reader.tokenizer_files())
    found: list[SequenceText] = []
    for number in choose(reader, count, seed):
        batch = reader.read([number])
        first = int(np.random.default_rng([seed, number]).integers(0, max(1, batch.rows - rows + 1)))
        shown = tuple(row_text(batch, row, text, candidates) for row in range(first, min(first + rows, batch.rows)))
        found.append(_sequence_text(number, batch, shown, text))
    return found


def _sequence_text(number: int, batch: SequenceBatch, shown: tuple[RowText, ...], text: TokenText) -> SequenceText:
    return SequenceText(
        number=number,
        document=int(batch.document[0]),
        window_start=int(batch.window_start[0]),
        tokens=len(batch.tokens),
        rows=batch.rows,
        head_mass=float(np.mean(head_mass)) if (head_mass := _head_mass(batch)) is not None else None,
        entropy=float(batch.entropy.mean()) if batch.rows else 0.0,
        text=text.join(batch.tokens.tolist()),
        shown=shown,
    )


def row_text(batch: SequenceBatch, row: int, text: TokenText, candidates: int) -> RowText:
    """Describe row number `row` of a batch that holds one sequence."""
    position = int(np.flatnonzero(batch.has_row)[row])
    ids = batch.tokens.tolist()
    following = ids[position + 1]
    head = slice(int(batch.head_size[:row].sum()), int(batch.head_size[: row + 1].sum()))
    tail = slice(int(batch.tail_size[:row].sum()), int(batch.tail_size[: row + 1].sum()))
    best = list(zip(batch.head_ids[head].tolist(), batch.logprob[head].tolist(), strict=True))[:candidates]
    drawn = zip(batch.tail_ids[tail].tolist(), batch.count[tail].tolist(), strict=True)
    frequent = sorted(drawn, key=lambda item: -item[1])
    head_mass = _head_mass(batch)
    return RowText(
        position=position,
        context=text.join(ids[max(0, position + 1 - CONTEXT) : position + 1]),
        next_text=text.after(ids[position], following),
        next_probability=float(np.exp(batch.next_logprob[row])),
        candidates=tuple(
            Candidate(
                text=text.after(ids[position], token), probability=float(np.exp(value)), follows=token == following
            )
            for token, value in best
        ),
        head_mass=None if head_mass is None else float(head_mass[row]),
        entropy=float(batch.entropy[row]),
        tail=tuple((text.after(ids[position], token), count) for token, count in frequent),
    )


def _head_mass(batch: SequenceBatch) -> np.ndarray[tuple[int], np.dtype[np.float64]] | None:
    """Return 1 - r for r = sigmoid(tail_logit), without cancellation; None without rows or without any head."""
    if len(batch.head_ids) == 0:
        return None
    return sigmoid(-batch.tail_logit)
