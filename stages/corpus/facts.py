"""What is met in a corpus that a user should know of before the teacher reads it, counted by document.

Data path: TokenizedDocument -> **tally -> sentences** of `pipeline plan`, and the keys that a plan states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

COMMON_TOKENS = 5  # special tokens named in a sentence


class Fact(Enum):
    """Something about one document. All but the last four change tokens, rows or end bytes; version 0.1 did not."""

    BYTE_ORDER_MARK = auto()  # begins with one, which is no part of the text
    OWN_BEGIN = auto()  # begins with the begin token: gets no second one
    OWN_END = auto()  # ends with the end token: gets no second one
    MOVED_ENDS = auto()  # has tokens made from several characters, and they end after the last of these
    BORDER_CUT = auto()  # prompt and text would have merged: each is tokenised for itself
    TEXT_CUT = auto()  # has a prompt and more tokens than a window: ends with the window
    LEFT_OUT = auto()  # the same, and the prompt alone fills the window: left out
    PROMPT_CUT = auto()  # the same: the prompt loses its beginning
    WINDOWED = auto()  # the same: later windows do not show how the prompt began
    BORDER_MERGED = auto()  # prompt and text merge and cannot be told apart
    SPECIAL_TOKENS = auto()  # holds special tokens in its text, which are read as such
    DROPPED_END = auto()  # ends with characters that the tokenizer drops


# The key that a plan's `rendering` has once a corpus holds such a document. A plan without keys is that of 0.1.
PLAN_KEYS: Mapping[Fact, str] = {
    Fact.BYTE_ORDER_MARK: "byte_order_mark",
    Fact.OWN_BEGIN: "begin_token",
    Fact.OWN_END: "end_token",
    Fact.MOVED_ENDS: "token_end",
    Fact.BORDER_CUT: "prompt_border",
    Fact.TEXT_CUT: "too_long",
    Fact.LEFT_OUT: "too_long",
    Fact.PROMPT_CUT: "too_long",
}
# What these keys say; `too_long` says what the configuration says.
NEW_RULES: Mapping[str, str] = {
    "byte_order_mark": "left out",
    "begin_token": "once",
    "end_token": "once",
    "token_end": "all characters",
    "prompt_border": "cut",
}

_LONGER = "with a prompt and more tokens than rendering.window {is}"
_SENTENCES: Mapping[Fact, str] = {
    Fact.BYTE_ORDER_MARK: "begin{s} with a byte order mark, which is left out",
    Fact.OWN_BEGIN: "begin{s} with the begin token: no second one is put before",
    Fact.OWN_END: "end{s} with the end token: no second one is put behind",
    Fact.BORDER_CUT: "would merge prompt and text into one token: each is tokenised for itself, as a prompt is when "
    "a model answers it",
    Fact.TEXT_CUT: f"{_LONGER} read up to there, since the rest would not show how the prompt began; a longer window "
    "keeps them whole",
    Fact.LEFT_OUT: "with a prompt that fills rendering.window {is} left out; a longer window keeps them, "
    "rendering.too_long: cut_prompt their ends",
    Fact.PROMPT_CUT: f"{_LONGER} read without the beginning of the prompt",
    Fact.WINDOWED: f"{_LONGER} learned in windows that do not show how the prompt began; rendering.too_long: drop "
    "leaves out such windows",
    Fact.BORDER_MERGED: "merge{s} prompt and text, and this tokenizer cannot spell them apart: a student learns tokens "
    "there that no prompt alone ends with",
    Fact.SPECIAL_TOKENS: "spell{s} special tokens, which are read as such ({tokens}): right for rendered "
    "conversations; for prose set rendering.special_tokens: text",
    Fact.DROPPED_END: "end{s} with characters that the tokenizer drops",
}


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Counts: documents by fact, and special tokens in their texts by id."""

    documents: Counter[Fact] = field(default_factory=Counter)
    special: Counter[int] = field(default_factory=Counter)

    def add(self, facts: Iterable[Fact], special: Mapping[int, int]) -> None:
        """Count one document."""
        self.documents.update(facts)
        self.special.update(special)

    def sentences(self, names: Mapping[int, str], *, scale: float = 1.0, met: Iterable[Fact] = ()) -> tuple[str, ...]:
        """Say what was met, one sentence a fact.

        Args:
            names: special tokens by id.
            scale: documents of the corpus for each one counted.
            met: facts that the corpus holds, counted or not.
        """
        common = self.special.most_common(COMMON_TOKENS)
        tokens = ", ".join(f"{names.get(token, token)}: {round(count * scale):,}" for token, count in common)
        counts = {fact: round(self.documents[fact] * scale) for fact in (*met, *self.documents)}
        return tuple(
            f"{_documents(counts[fact], about=scale > 1)} "
            + sentence.format(
                s="s" * (counts[fact] == 1), tokens=tokens, **{"is": "is" if counts[fact] == 1 else "are"}
            )
            for fact, sentence in _SENTENCES.items()
            if fact in counts
        )


def _documents(count: int, *, about: bool) -> str:
    if count == 0:
        return "a few documents"
    return f"{'about ' if about else ''}{count:,} document{'' if count == 1 else 's'}"
