"""What a tokenizer makes of a text: ids and their offsets. Of a prompt with its text, what it makes of each of them.

Data path: Document -> **Pieces** -> TokenizedDocument.

Axis legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from stages.corpus.tokenizer import encode


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Token ids, and int64 [T, 2] where in the text each begins and ends, in characters."""

    ids: list[int]
    offsets: NDArray[np.int64]

    def starts_with(self, other: Pieces) -> bool:
        """Tell whether these ids start with all of the other's."""
        return self.ids[: len(other.ids)] == other.ids

    def own_begin(self, token: int | None, text: str) -> int | None:
        """Return the index of a token that the text itself begins with, but for white space before it; None without."""
        if token not in self.ids:
            return None
        first = self.ids.index(token)
        return None if text[: int(self.offsets[first, 0])].strip() else first

    def own_end(self, token: int | None, text: str) -> int | None:
        """Return the index of a token that the text itself ends with, but for white space behind it; None without."""
        if token not in self.ids:
            return None
        last = len(self.ids) - 1 - self.ids[::-1].index(token)
        return None if text[int(self.offsets[last, 1]) :].strip() else last


def pieces_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special_as_text: bool) -> list[Pieces]:
    """Tokenise texts as they are, without begin and end tokens.

    Args:
        special_as_text: read special tokens that a text spells as the text that they are.
    """
    if not texts:
        return []
    encoded = encode(
        tokenizer,
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,  # no warning that a document is longer than the model's context: windows see to that
        **({"split_special_tokens": True} if special_as_text else {}),  # else as the tokenizer's own files say
    )
    return [
        Pieces(ids=ids, offsets=np.array(offsets, dtype=np.int64).reshape(-1, 2))
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def cut_at_the_prompt(
    whole: Pieces, prompt: Pieces, rest: Pieces, begin: int, tokenizer: PreTrainedTokenizerBase
) -> Pieces | None:
    """Join what a prompt and the text behind it are made of alone; None if that spells something else than the whole.

    It does where a tokenizer puts a space before every text.

    Args:
        whole: both together.
        begin: character where the text behind the prompt begins.
    """
    apart = Pieces(ids=prompt.ids + rest.ids, offsets=np.concatenate([prompt.offsets, rest.offsets + begin]))
    spelled, wanted = (
        tokenizer.decode(pieces.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for pieces in (apart, whole)
    )
    return apart if spelled == wanted else None
