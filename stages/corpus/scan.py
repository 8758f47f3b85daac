"""Which rules that version 0.1 did not have a corpus meets anywhere: what its plan has to state, exactly.

Data path: corpus, tokenizer, rendering -> **facts** -> plan. All texts are read. Tokenised are documents with a prompt,
and of the others those that may meet a rule which none before them has met.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from stages.corpus.facts import PLAN_KEYS, Fact
from stages.corpus.offsets import may_move_ends
from stages.corpus.rendering import Rendering
from stages.corpus.source import Corpus, Document
from stages.corpus.tokenized import tokenize


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
        self._with_prompts = {"prompt_border"} | ({"too_long"} if rendering.too_long != "window" else set())

    def suspects(self, document: Document) -> bool:
        """Tell whether a document may hold what was not met yet."""
        met, text = {PLAN_KEYS[fact] for fact in self.met}, document.text
        return (
            (document.prompt > 0 and not self._with_prompts <= met)
            or (document.byte_order_mark and "byte_order_mark" not in met)
            or (self._begin is not None and "begin_token" not in met and text.lstrip().startswith(self._begin))
            or (self._end is not None and "end_token" not in met and text.rstrip().endswith(self._end))
            or ("token_end" not in met and may_move_ends(text, self._tokenizer))
        )


def _spelling(tokenizer: PreTrainedTokenizerBase, token: int | None) -> str | None:
    """Return how a text spells a special token; "", which every text begins and ends with, if in several ways."""
    if token is None:
        return None
    known = tokenizer.added_tokens_decoder.get(token)
    return "" if known is None or known.normalized else known.content
