"""Documents become token windows: the sequences that the teacher sees.

Data path: Document -> **TokenWindow** -> teacher. Every function here is a pure function of document and rendering.

Axis legend: T tokens of a document or of one window, C characters of a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from stages.corpus.source import Document
from stages.corpus.tokenizer import encode
from storage.errors import UsageError
from storage.segments import row_starts
from storage.values import Json

DOCUMENTS_PER_CALL = 64  # the tokenizer works on lists in parallel


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How a document becomes windows.

    Attributes:
        window, overlap, min_tokens: in tokens.
        bos, eos: token ids, or None for no such token.
        vocab_size: ids that the teacher has embeddings for lie below it.
    """

    window: int
    overlap: int
    min_tokens: int
    bos: int | None
    eos: int | None
    vocab_size: int

    def to_plan(self) -> dict[str, Json]:
        """Return the `rendering` field of a plan, which holds `vocab_size` elsewhere."""
        return {
            "input": "text",
            "window": self.window,
            "overlap": self.overlap,
            "min_tokens": self.min_tokens,
            "bos": self.bos,
            "eos": self.eos,
        }


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
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, rendering: Rendering
) -> Iterator[TokenWindow]:
    """Yield the windows of each document in order; documents and windows below `min_tokens` are left out.

    Raises:
        UsageError: the tokenizer gives an id that the teacher has no embedding for.
    """
    for document, tokens_T, end_byte_T, prompt in tokenize(documents, tokenizer, rendering):
        if len(tokens_T) and int(tokens_T.max()) >= rendering.vocab_size:
            raise UsageError(
                f"token id {int(tokens_T.max())} is beyond the teacher's {rendering.vocab_size} embeddings",
                where=f"document {document.number}",
                fix="use the tokenizer that belongs to the teacher",
            )
        if len(tokens_T) < rendering.min_tokens:
            continue
        for start, end, first_row in windows(len(tokens_T), rendering.window, rendering.overlap):
            has_row_T = np.zeros(end - start, dtype=np.bool_)
            has_row_T[max(first_row, prompt - 1) - start : -1] = True
            if end - start >= rendering.min_tokens and has_row_T.any():
                yield TokenWindow(
                    document=document.number,
                    window_start=start,
                    tokens=tokens_T[start:end],
                    token_end_byte=end_byte_T[start:end],
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


def tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, rendering: Rendering
) -> Iterator[tuple[Document, NDArray[np.uint32], NDArray[np.uint32], int]]:
    """Yield each document with its token ids uint32 [T], token_end_byte uint32 [T], and how many tokens are prompt.

    Begin and end tokens are included; the begin token ends at byte 0, the end token at the last byte of the text. A
    token that reaches beyond the prompt is not part of it.
    """
    stream = iter(documents)
    while batch := list(islice(stream, DOCUMENTS_PER_CALL)):
        encoded = encode(
            tokenizer,
            [document.text for document in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,  # no warning that a document is longer than the model's context: windows see to that
        )
        for document, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            byte_of_C = character_bytes(document.text)
            offsets_T2 = np.array(offsets, dtype=np.int64).reshape(-1, 2)
            ends = end_bytes(offsets_T2, byte_of_C)
            head = [] if rendering.bos is None else [rendering.bos]
            tail = [] if rendering.eos is None else [rendering.eos]
            tokens_T = np.array([*head, *ids, *tail], dtype=np.uint32)
            end_byte_T = np.concatenate([[0] * len(head), ends, [byte_of_C[-1]] * len(tail)]).astype(np.uint32)
            prompt = int((offsets_T2[:, 1] <= document.prompt).sum()) if document.prompt else 0
            yield document, tokens_T, end_byte_T, len(head) + prompt


def character_bytes(text: str) -> NDArray[np.int64]:
    """Return where each character begins in the text's UTF-8 form, int64 [C+1]; the last value is its length."""
    points_C = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes_C = 1 + (points_C >= 0x80).astype(np.int64) + (points_C >= 0x800) + (points_C >= 0x10000)
    return row_starts(sizes_C)


def end_bytes(offsets_T2: NDArray[np.int64], byte_of_C: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the end of each token in bytes [T] from its offsets in characters [T, 2].

    Several tokens may share one character (byte-level tokens of a character beyond ASCII): all but the last of them
    end where the character begins, because until then it is not complete.
    """
    start_T, end_T = offsets_T2[:, 0], offsets_T2[:, 1].copy()
    if len(end_T) > 1:
        end_T[:-1] = np.where(start_T[1:] < end_T[:-1], start_T[1:], end_T[:-1])
    return byte_of_C[np.maximum.accumulate(end_T)] if len(end_T) else end_T
