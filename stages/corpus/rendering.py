"""How documents become token windows, as a configuration says it and a plan states it.

Data path: configuration -> **Rendering** -> what is done with each document.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from stages.corpus.facts import NEW_RULES, PLAN_KEYS, Fact
from storage.values import Json

TooLong = Literal["drop", "cut_prompt", "window"]
SpecialTokens = Literal["parse", "text"]


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How a document becomes windows.

    Attributes:
        window, overlap, min_tokens: in tokens.
        bos, eos: token ids, or None for no such token.
        vocab_size: ids that the teacher has embeddings for lie below it.
        too_long: what becomes of a document with a prompt that has more tokens than a window.
        special_tokens: whether special tokens spelled in a text are read as such, or as the text that they are.
    """

    window: int
    overlap: int
    min_tokens: int
    bos: int | None
    eos: int | None
    vocab_size: int
    too_long: TooLong = "window"
    special_tokens: SpecialTokens = "parse"

    def to_plan(self, facts: Collection[Fact] = ()) -> dict[str, Json]:
        """Return the `rendering` field of a plan, which holds `vocab_size` elsewhere.

        Args:
            facts: what the corpus holds. Rules that version 0.1 did not have are stated where they change something.
        """
        plan: dict[str, Json] = {
            "input": "text",
            "window": self.window,
            "overlap": self.overlap,
            "min_tokens": self.min_tokens,
            "bos": self.bos,
            "eos": self.eos,
        }
        if self.special_tokens != "parse":
            plan["special_tokens"] = self.special_tokens
        values = {**NEW_RULES, "too_long": self.too_long}
        return plan | {key: values[key] for key in (PLAN_KEYS[fact] for fact in facts if fact in PLAN_KEYS)}
