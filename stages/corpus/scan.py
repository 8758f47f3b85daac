"""Which rules that version 0.1 did not have a corpus meets anywhere: what its plan has to state, exactly.

Data path: corpus, tokenizer, rendering -> **facts** -> plan. All texts are read. Tokenised are only documents that
may meet a rule which none before them has met: with a prompt, all until one of them would merge with its text, and then
those that may not fit a window.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from stages.corpus.facts import PLAN_KEYS, Fact
from stages.corpus.offsets import may_move_ends
from stages.corpus.rendering import Rendering
from stages.corpus.source import Corpus, Document
from stages.corpus.tokenized import tokenize

# Tokens that a document may have beyond its bytes: begin and end token, a space that the tokenizer puts before prompt
# and text, a character that they compose together and not apart.
MORE_TOKENS = 16


def facts_for_plan(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> frozenset[Fact]:
    """Return the facts with a key in the plan of which the corpus holds at least one document.

    Raises:
        IdentityError, StorageUnavailableError: a file of the corpus was changed since it was checked, or is gone.
    """
    search = _Search(tokenizer, rendering)
    suspects = (document for document in corpus.documents(range(len(corpus))) if search.suspects(document))
    for tokenized in tokenize(suspects, tokenizer, rendering):
        search.met |= tokenized.facts & PLAN_KEYS.keys()
    return frozenset(search.met)


class _Search:
    """What was met so far, and which documents may meet more."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> None:
        self.met: set[Fact] = set()
        self._tokenizer = tokenizer
        self._begin, self._end = (_spelling(tokenizer, token) for token in (rendering.bos, rendering.eos))
        self._cuts_prompted, self._window = rendering.too_long != "window", rendering.window

    def suspects(self, document: Document) -> bool:
        """Tell whether a document may hold what was not met yet."""
        met, text = {PLAN_KEYS[fact] for fact in self.met}, document.text
        return (
            (document.prompt > 0 and "prompt_border" not in met)
            or (document.prompt > 0 and self._cuts_prompted and "too_long" not in met and self._may_be_too_long(text))
            or (document.byte_order_mark and "byte_order_mark" not in met)
            or (self._begin is not None and "begin_token" not in met and text.lstrip().startswith(self._begin))
            or (self._end is not None and "end_token" not in met and text.rstrip().endswith(self._end))
            or ("token_end" not in met and may_move_ends(text, self._tokenizer))
        )

    def _may_be_too_long(self, text: str) -> bool:
        """Tell whether a text may have more tokens than a window. No token stands for less than a byte of it."""
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        normal = text if normalizer is None else normalizer.normalize_str(text)  # NFKC makes 18 letters of one
        return len(normal.encode()) + MORE_TOKENS > self._window


def _spelling(tokenizer: PreTrainedTokenizerBase, token: int | None) -> str | None:
    """Return how a text spells a special token; "", which every text begins and ends with, if in several ways."""
    if token is None:
        return None
    known = tokenizer.added_tokens_decoder.get(token)
    return "" if known is None or known.normalized else known.content
