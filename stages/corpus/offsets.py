"""Where tokens end in a text: from the tokenizer's offsets in characters to bytes of the source.

Data path: text, offsets -> **ends in bytes** -> TokenWindow. A tokenizer that normalises tells only the first of the
characters that it composed into one, and the places of reordered accents as if they had stayed; both are mended here.

Axis legend: T tokens, C characters.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers.normalizers import Sequence
from transformers import PreTrainedTokenizerBase

from storage.segments import row_starts

Form = Literal["NFD", "NFKD"]
FIRST_MARK = "\u0300"  # no character below it is joined to the one before it
ACCENTS = "\u0307\u0323"  # the second one comes first in every Unicode normal form
HALF_WIDTH = "\uff9e"  # an accent that the forms with a K write in another way


def character_bytes(text: str) -> NDArray[np.int64]:
    """Return where each character begins in the text's UTF-8 form, int64 [C+1]; the last value is its length."""
    points_C = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes_C = 1 + (points_C >= 0x80).astype(np.int64) + (points_C >= 0x800) + (points_C >= 0x10000)
    return row_starts(sizes_C)


def end_characters(offsets_T2: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the end of each token in whole characters [T], as the offsets say. Ends never fall.

    Several tokens may share one character (byte-level tokens of a character beyond ASCII): all but the last of them
    end where the character begins, because until then it is not complete.
    """
    start_T, end_T = offsets_T2[:, 0], offsets_T2[:, 1].copy()
    if len(end_T) > 1:
        end_T[:-1] = np.where(start_T[1:] < end_T[:-1], start_T[1:], end_T[:-1])
    return np.maximum.accumulate(end_T)


def whole_ends(
    offsets_T2: NDArray[np.int64], text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[NDArray[np.int64], bool]:
    """Return `end_characters`, moved behind all characters that a token was made from, and whether any was moved.

    Accents and conjoining letters that the tokenizer composed with the character before them, or dropped, belong to
    that character's token: they lie between its end and the beginning of the next one. Where it took accents out of
    their order, every token with a part in them ends after the last of them.
    """
    told_T = end_characters(offsets_T2)
    if not _has_marks(text, tokenizer):
        return told_T, False
    end_T = told_T.copy()
    next_T = np.append(offsets_T2[1:, 0], len(text))
    for token in np.flatnonzero(next_T > offsets_T2[:, 1]):
        end_T[token] = max(end_T[token], _after_marks(text, int(offsets_T2[token, 1]), int(next_T[token])))
    normalise = tokenizer.backend_tokenizer.normalizer.normalize_str
    if form := _form(normalise):
        for first, end in _mixed_marks(text, normalise, form):
            end_T[(end_T >= first) & (end_T < end)] = end
    end_T = np.maximum.accumulate(end_T)
    return end_T, not np.array_equal(end_T, told_T)


def may_move_ends(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether `whole_ends` could move an end of this text, without tokenising it."""
    if not _has_marks(text, tokenizer):
        return False
    normalizer = tokenizer.backend_tokenizer.normalizer
    # Several steps may lose the places of accents that they leave as they are.
    return isinstance(normalizer, Sequence) or _marks(text) != _marks(normalizer.normalize_str(text))


def _has_marks(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a text holds what this tokenizer could compose, drop or reorder."""
    if text.isascii() or tokenizer.backend_tokenizer.normalizer is None:
        return False
    return any(map(continues, set(text)))


def _marks(text: str) -> list[str]:
    return [char for char in text if continues(char)]


def _after_marks(text: str, first: int, end: int) -> int:
    """Return where the run of characters that continue another one ends, from `first` and at most to `end`."""
    while first < end and continues(text[first]):
        first += 1
    return first


def _mixed_marks(text: str, normalise: Callable[[str], str], form: Form) -> Iterator[tuple[int, int]]:
    """Yield where tokens take accents out of their order: the least end of a token that has a part in it, their end.

    A form puts accents into its own order, and composes a character with a later accent than the one behind it.
    """
    at = 0
    while at < len(text):
        end = _after_marks(text, at, len(text))
        run = text[max(at - 1, 0) : end]
        if end > at and _marks(normalise(run)) != _marks(run):
            together = unicodedata.normalize(form, run)
            composed = "".join(unicodedata.normalize(form, char) for char in normalise(run)) != together
            if composed or "".join(unicodedata.normalize(form, char) for char in run) != together:
                with_base = at > 0 and (composed or len(unicodedata.normalize(form, run[0])) > 1)
                yield at if with_base else at + 1, end
        at = end + 1


@cache
def continues(char: str) -> bool:
    """Tell whether a character can be composed with the one before it: an accent, or a later part of a Hangul syllable.

    Half-width and compatibility forms count: NFKC composes them too.
    """
    if char < FIRST_MARK:
        return False
    return all(
        unicodedata.category(part).startswith("M") or "\u1160" <= part <= "\u11ff"
        for part in unicodedata.normalize("NFKD", char)
    )


def _form(normalise: Callable[[str], str]) -> Form | None:
    """Return the form in whose order a normaliser puts accents, None if it leaves them as they are or drops them."""
    if ACCENTS[::-1] not in normalise(f"q{ACCENTS}"):
        return None
    return "NFD" if HALF_WIDTH in normalise(HALF_WIDTH) else "NFKD"
