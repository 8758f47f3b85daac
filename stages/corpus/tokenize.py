"""Documents become token windows: the sequences that the teacher sees.

Data path: Document -> TokenizedDocument -> **TokenWindow** -> teacher. Windows are a pure function of document and
rendering.

Axis legend: T tokens of a document or of one window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from stages.corpus.facts import Tally
from stages.corpus.rendering import Rendering
from stages.corpus.source import Document
from stages.corpus.tokenized import TokenizedDocument, tokenize
from stages.corpus.tokenizer import encode
from storage.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TokenWindow:
    """One token window of a document.

    Attributes:
        document: number of the document.
        window_start: index in the document's tokens of the first token here.
        tokens: uint32 [T].
        token_end_byte: uint32 [T], bytes of the document's text that tokens up to this one cover in whole characters.
        has_row: bool [T], positions whose next token gets a target row here: it lies in this window, no earlier
            window has predicted it, and it is not part of the prompt.
    """

    document: int
    window_start: int
    tokens: NDArray[np.uint32]
    token_end_byte: NDArray[np.uint32]
    has_row: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)


def resolve_special(tokenizer: PreTrainedTokenizerBase, bos: str, *, eos: bool) -> tuple[int | None, int | None]:
    """Return the begin and end token ids that a policy asks for; `bos` is auto, always or never.

    Raises:
        UsageError: the policy asks for a token that the tokenizer has not.
    """
    wants_bos = bos == "always" or (bos == "auto" and _adds_bos(tokenizer))
    if wants_bos and tokenizer.bos_token_id is None:
        raise UsageError("the tokenizer has no begin token", where="bos: always", fix="set bos: never")
    if eos and tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end token", where="eos: true", fix="set eos: false")
    return (tokenizer.bos_token_id if wants_bos else None), (tokenizer.eos_token_id if eos else None)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = encode(tokenizer, ["a"])["input_ids"][0]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def render(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    tally: Tally | None = None,
) -> Iterator[TokenWindow]:
    """Yield the windows of each document in order; documents and windows below `min_tokens` are left out.

    Args:
        tally: counts each document before its first window is yielded.

    Raises:
        UsageError: the tokenizer gives an id that the teacher has no embedding for.
    """
    for tokenized in tokenize(documents, tokenizer, rendering):
        if tally is not None:
            tally.add(tokenized.facts, tokenized.special)
        yield from cut(tokenized, rendering)


def cut(tokenized: TokenizedDocument, rendering: Rendering) -> Iterator[TokenWindow]:
    """Yield the windows of one document; it or a window below `min_tokens` is left out.

    Raises:
        UsageError: an id that the teacher has no embedding for.
    """
    tokens_T = tokenized.tokens
    if len(tokens_T) and int(tokens_T.max()) >= rendering.vocab_size:
        raise UsageError(
            f"token id {int(tokens_T.max())} is beyond the teacher's {rendering.vocab_size} embeddings",
            where=f"document {tokenized.document.number}",
            fix="use the tokenizer that belongs to the teacher",
        )
    if len(tokens_T) < rendering.min_tokens:
        return
    for start, end, first_row in windows(len(tokens_T), rendering.window, rendering.overlap):
        has_row_T = np.zeros(end - start, dtype=np.bool_)
        has_row_T[max(first_row, tokenized.prompt - 1) - start : -1] = True
        if end - start >= rendering.min_tokens and has_row_T.any():
            yield TokenWindow(
                document=tokenized.document.number,
                window_start=start,
                tokens=tokens_T[start:end],
                token_end_byte=tokenized.token_end_byte[start:end],
                has_row=has_row_T,
            )


def windows(tokens: int, window: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Cut `tokens` tokens into windows: (start, end, first position with a row).

    A window begins `overlap` tokens before the end of the one before it. Positions start .. end-2 predict tokens of
    the window; those whose token an earlier window holds as a prediction are skipped. With overlap >= 1 that makes
    exactly one row per token but the first; with overlap 0 the first token of each window is predicted by none.
    """
    start = predicted = 0  # tokens below `predicted` are predicted already, or have no context (token 0)
    while start < tokens:
        end = min(start + window, tokens)
        yield start, end, max(start, predicted - 1)
        if end == tokens:
            return
        predicted = end
        start = end - overlap
