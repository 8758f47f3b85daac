"""Documents become token ids: with begin and end tokens, their ends in the text, and how many are prompt.

Data path: Document -> Pieces -> **TokenizedDocument** -> TokenWindow.

Axis legend: T tokens of a document, C characters of its text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from stages.corpus.facts import Fact
from stages.corpus.offsets import character_bytes, whole_ends
from stages.corpus.pieces import Pieces, cut_at_the_prompt, pieces_of
from stages.corpus.rendering import Rendering
from stages.corpus.source import Document

DOCUMENTS_PER_CALL = 64  # the tokenizer works on lists in parallel


@dataclass(frozen=True, kw_only=True)
class TokenizedDocument:
    """A document as token ids.

    Attributes:
        document: where they come from.
        tokens: uint32 [T], begin and end tokens included; none if the document is left out.
        token_end_byte: uint32 [T], as in `TokenWindow`.
        prompt: how many tokens are prompt, the begin token included.
        facts: what a user should know of.
        special: how often the text spells special tokens, by id; a begin and an end token of its own left out.
    """

    document: Document
    tokens: NDArray[np.uint32]
    token_end_byte: NDArray[np.uint32]
    prompt: int
    facts: frozenset[Fact]
    special: Counter[int]

    def noting(self, facts: Mapping[Fact, bool]) -> TokenizedDocument:
        """Return it with those of the facts that are true of it."""
        return replace(self, facts=self.facts.union(fact for fact, is_true in facts.items() if is_true))

    def taking(self, kept: NDArray[np.int64], *, prompt: int) -> TokenizedDocument:
        """Return it with some of its tokens, of which so many are prompt."""
        tokens, ends = self.tokens[kept], self.token_end_byte[kept]
        return replace(self, tokens=tokens, token_end_byte=ends, prompt=prompt)


def tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, rendering: Rendering
) -> Iterator[TokenizedDocument]:
    """Yield each document as token ids, with its begin and end token unless its text has them itself.

    The begin token ends at byte 0, the end token at the last byte of the text; the text's own begin token ends behind
    itself. They are the first and the last token: white space outside of the text's own has no tokens. The ids of a
    prompt are those that it has alone, so that they are what a student is asked with, wherever the tokenizer can spell
    prompt and text apart; else a token that reaches beyond the prompt is not part of it.
    """
    as_text, special = rendering.special_tokens == "text", special_names(tokenizer).keys()
    stream = iter(documents)
    while batch := list(islice(stream, DOCUMENTS_PER_CALL)):
        wholes = pieces_of(tokenizer, [item.text for item in batch], special_as_text=as_text)
        prompts = pieces_of(tokenizer, [item.text[: item.prompt] for item in batch], special_as_text=as_text)
        for document, whole, prompt in zip(batch, wholes, prompts, strict=True):
            pieces = whole
            if not whole.starts_with(prompt):
                (rest,) = pieces_of(tokenizer, [document.text[document.prompt :]], special_as_text=as_text)
                pieces = cut_at_the_prompt(whole, prompt, rest, document.prompt, tokenizer) or whole
            spelled = Counter(index for index in pieces.ids if index in special)
            tokenized = _complete(document, pieces, prompt, spelled, tokenizer, rendering)
            facts = {Fact.BORDER_CUT: pieces is not whole, Fact.BORDER_MERGED: not pieces.starts_with(prompt)}
            yield _fitted(tokenized.noting(facts), rendering)


def special_names(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the special tokens by id: what a text can spell and the tokenizer reads as one token."""
    return {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def _complete(
    document: Document,
    pieces: Pieces,
    prompt: Pieces,
    spelled: Counter[int],
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
) -> TokenizedDocument:
    """Add begin and end tokens to what a document is made of, and find where tokens and prompt end.

    Args:
        prompt: what the prompt alone is made of.
        spelled: how often each special token is among the pieces.
    """
    text, byte_of_C = document.text, character_bytes(document.text)
    end_T, moved = whole_ends(pieces.offsets, text, tokenizer)
    begin, end = ([] if token is None else [token] for token in (rendering.bos, rendering.eos))
    own_begin, own_end = pieces.own_begin(rendering.bos, text), pieces.own_end(rendering.eos, text)
    head, tail = (begin if own_begin is None else []), (end if own_end is None else [])
    spelled.subtract(begin * (own_begin is not None) + end * (own_end is not None))
    in_prompt = len(prompt.ids)
    if not pieces.starts_with(prompt):
        in_prompt = int((np.maximum(pieces.offsets[:, 1], end_T) <= document.prompt).sum())
    # White space outside of the text's own begin and end token has no tokens: it belongs to these two.
    first, stop = own_begin or 0, len(pieces.ids) if own_end is None else own_end + 1
    if own_end is not None:
        end_T[own_end] = len(text)
    end_T = end_T[first:stop]
    ends = [np.zeros(len(head)), byte_of_C[end_T], np.full(len(tail), byte_of_C[-1])]
    tokenized = TokenizedDocument(
        document=document,
        tokens=np.array([*head, *pieces.ids[first:stop], *tail], dtype=np.uint32),
        token_end_byte=np.concatenate(ends).astype(np.uint32),
        prompt=len(head) + max(0, min(in_prompt, stop) - first),
        facts=frozenset(),
        special=+spelled,
    )
    return tokenized.noting(
        {
            Fact.BYTE_ORDER_MARK: document.byte_order_mark,
            Fact.OWN_BEGIN: own_begin is not None,
            Fact.OWN_END: own_end is not None,
            Fact.MOVED_ENDS: moved,
            Fact.SPECIAL_TOKENS: bool(+spelled),
            Fact.DROPPED_END: int(end_T.max(initial=0)) < len(text),
        }
    )


def _fitted(tokenized: TokenizedDocument, rendering: Rendering) -> TokenizedDocument:
    """Do with a document that has a prompt and more tokens than a window what the configuration says."""
    surplus = len(tokenized.tokens) - rendering.window
    if not tokenized.document.prompt or surplus <= 0:
        return tokenized
    if rendering.too_long == "window":
        return tokenized.noting({Fact.WINDOWED: True})
    begin = int(tokenized.tokens[0] == rendering.bos)
    if rendering.too_long == "cut_prompt" and tokenized.prompt - begin > surplus:
        kept = np.r_[:begin, begin + surplus : len(tokenized.tokens)]
        return tokenized.taking(kept, prompt=tokenized.prompt - surplus).noting({Fact.PROMPT_CUT: True})
    if tokenized.prompt < rendering.window:
        return tokenized.taking(np.arange(rendering.window), prompt=tokenized.prompt).noting({Fact.TEXT_CUT: True})
    return tokenized.taking(np.arange(0), prompt=0).noting({Fact.LEFT_OUT: True})
