"""Documents to windows: which rows exist, where tokens end, which special tokens are added."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.corpus.facts import Fact
from stages.corpus.offsets import character_bytes, end_characters
from stages.corpus.rendering import Rendering
from stages.corpus.source import Document
from stages.corpus.tokenize import TokenWindow, render, resolve_special, windows
from stages.corpus.tokenized import tokenize
from stages.corpus.tokenizer import load_tokenizer
from storage.errors import UsageError

TEXT = "The naïve café costs 3 €: 語 and 🙂🙂, said the snowman ☃. " * 3


def rendering(**changes: int | None) -> Rendering:
    values: dict[str, int | None] = {"window": 16, "overlap": 0, "min_tokens": 2, "bos": None, "eos": None}
    return Rendering(**{"vocab_size": 512, **values, **changes})  # type: ignore[arg-type]


def sequences_of(text: str, directory: Path, **changes: int | None) -> list[TokenWindow]:
    return list(render([Document(number=7, text=text)], load_tokenizer(directory), rendering(**changes)))


@given(tokens=st.integers(0, 200), window=st.integers(2, 40), share=st.floats(0.0, 1.0, exclude_max=True))
def test_each_token_is_predicted_once(tokens: int, window: int, share: float) -> None:
    overlap = int(share * window)
    predicted: Counter[int] = Counter()
    covered: Counter[int] = Counter()
    starts = []
    for start, end, first in windows(tokens, window, overlap):
        assert end - start <= window
        assert start <= first
        starts.append(start)
        covered.update(range(start, end))
        predicted.update(position + 1 for position in range(first, end - 1))
    assert sorted(covered) == list(range(tokens))
    assert all(count == 1 for count in predicted.values())
    missing = set(range(tokens)) - set(predicted)
    assert missing == (set(starts) if overlap == 0 else set(range(min(tokens, 1))))


@pytest.mark.parametrize("overlap", [0, 1, 5, 15])
def test_windows_of_a_document(overlap: int, tiny_tokenizer_dir: Path) -> None:
    whole = sequences_of(TEXT, tiny_tokenizer_dir, window=10_000)[0]
    parts = sequences_of(TEXT, tiny_tokenizer_dir, overlap=overlap)
    predicted = Counter()
    for part in parts:
        begin = part.window_start
        np.testing.assert_array_equal(part.tokens, whole.tokens[begin : begin + len(part)])
        np.testing.assert_array_equal(part.token_end_byte, whole.token_end_byte[begin : begin + len(part)])
        assert part.document == 7
        assert part.has_row.any()
        assert not part.has_row[-1]
        predicted.update((begin + 1 + np.flatnonzero(part.has_row)).tolist())
    assert set(predicted.values()) == {1}
    if overlap:
        assert sorted(predicted) == list(range(1, len(whole)))


def test_short_documents_and_windows_are_left_out(tiny_tokenizer_dir: Path) -> None:
    tokens = len(sequences_of(TEXT, tiny_tokenizer_dir, window=10_000)[0])
    assert sequences_of(TEXT, tiny_tokenizer_dir, min_tokens=tokens + 1) == []
    lengths = [len(part) for part in sequences_of(TEXT, tiny_tokenizer_dir, min_tokens=16)]
    assert lengths == [16] * (tokens // 16)
    assert sequences_of("", tiny_tokenizer_dir) == []
    assert sequences_of("", tiny_tokenizer_dir, eos=1, min_tokens=1) == []  # one token: nothing to predict


def test_token_ends_are_byte_positions_of_whole_characters(tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    [whole] = sequences_of(TEXT, tiny_tokenizer_dir, window=10_000, bos=0, eos=1)
    data = TEXT.encode()
    assert whole.token_end_byte[0] == 0
    assert list(whole.token_end_byte[-2:]) == [len(data)] * 2
    assert np.all(np.diff(whole.token_end_byte.astype(np.int64)) >= 0)
    for index in range(1, len(whole) - 1):
        read = data[: whole.token_end_byte[index]].decode()  # raises where a character is cut
        spelled = tokenizer.decode(whole.tokens[1 : index + 1].tolist())
        assert spelled.rstrip("\ufffd") == read.rstrip("\ufffd")


def test_ends_of_tokens_that_share_a_character() -> None:
    byte_of_C = character_bytes("a🙂b")
    assert byte_of_C.tolist() == [0, 1, 5, 6]
    offsets = np.array([[0, 1], [1, 2], [1, 2], [1, 2], [2, 3]])
    assert byte_of_C[end_characters(offsets)].tolist() == [1, 1, 1, 5, 6]


@given(st.text(max_size=40).filter(lambda text: text.isprintable()))
def test_character_bytes(text: str) -> None:
    assert character_bytes(text).tolist() == [len(text[:end].encode()) for end in range(len(text) + 1)]


def test_special_tokens(tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    assert resolve_special(tokenizer, "auto", eos=True) == (None, 1)  # this tokenizer adds none by itself
    assert resolve_special(tokenizer, "always", eos=False) == (0, None)
    assert resolve_special(tokenizer, "never", eos=False) == (None, None)
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match="no begin token"):
        resolve_special(tokenizer, "always", eos=False)
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no end token"):
        resolve_special(tokenizer, "never", eos=True)


def test_bos_auto_follows_the_tokenizer(tiny_tokenizer_dir: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert resolve_special(tokenizer, "auto", eos=False) == (0, None)


def test_rendering_does_not_depend_on_neighbours(tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    documents = [Document(number=number, text=TEXT[number:]) for number in range(100)]
    together = list(render(documents, tokenizer, rendering(eos=1)))
    alone = [part for document in documents for part in render([document], tokenizer, rendering(eos=1))]
    assert len(together) == len(alone)
    for left, right in zip(together, alone, strict=True):
        assert (left.document, left.window_start) == (right.document, right.window_start)
        np.testing.assert_array_equal(left.tokens, right.tokens)


def test_an_id_beyond_the_teacher_is_refused(tiny_tokenizer_dir: Path) -> None:
    with pytest.raises(UsageError, match=r"token id \d+ is beyond the teacher's 300 embeddings"):
        sequences_of(TEXT, tiny_tokenizer_dir, vocab_size=300)


SPELLED = {
    "neither": ("The end", 1, 1),
    "begin": ("<s>The end", 0, 1),
    "end": ("The end</s>", 1, 0),
    "both": ("<s>The end</s>", 0, 0),
    "both, in white space": (" <s>The end</s>\n", 0, 0),
    "the other way round": ("</s>The end<s>", 1, 1),
    "inside": ("The <s>quick</s> end", 1, 1),
    "end alone": ("</s>", 1, 0),
}


@pytest.mark.parametrize(("text", "begins", "ends"), SPELLED.values(), ids=SPELLED)
def test_one_begin_and_one_end_token(text: str, begins: int, ends: int, tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    (found,) = tokenize([Document(number=0, text=text)], tokenizer, rendering(bos=0, eos=1, min_tokens=1))
    assert found.tokens.tolist() == [0] * begins + tokenizer(text.strip())["input_ids"] + [1] * ends
    assert (Fact.OWN_BEGIN in found.facts, Fact.OWN_END in found.facts) == (not begins, not ends)
    assert found.token_end_byte[-1] == len(text)
    assert sum(found.special.values()) == len(re.findall("</?s>", text)) - (not begins) - (not ends)


@pytest.mark.parametrize("split", range(len(" \n <s>é a</s>\n ") + 1))
def test_own_begin_and_end_tokens_are_first_and_last_and_cover_the_white_space(
    split: int, tiny_tokenizer_dir: Path
) -> None:
    """Wherever the prompt ends: the slices between ends, joined, are the text, and no row teaches white space."""
    text = " \n <s>é a</s>\n "
    document = Document(number=0, text=text, prompt=split)
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    (found,) = tokenize([document], tokenizer, rendering(bos=0, eos=1, min_tokens=1))
    if " \n <s>" in text[:split] or split <= 3:  # not inside of the begin token, which is text then
        assert found.tokens.tolist()[0] == 0
        assert int(found.token_end_byte[0]) == len(" \n <s>")
        assert found.tokens.tolist().count(0) == 1
    if "</s>" in text[split:] or "</s>" in text[:split]:
        assert found.tokens.tolist()[-1] == 1
        assert found.tokens.tolist().count(1) == 1
    assert found.token_end_byte[-1] == len(text.encode())
    assert 0 <= found.prompt <= len(found.tokens)


def test_one_token_that_is_begin_and_end_of_texts(tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    for text, wanted in (("a", [1, 1]), ("</s>a", [1, 1]), ("a</s>", [1, 1]), ("</s>a</s>", [1, 1]), ("</s>", [1])):
        (found,) = tokenize([Document(number=0, text=text)], tokenizer, rendering(bos=1, eos=1, min_tokens=1))
        assert [token for token in found.tokens.tolist() if token == 1] == wanted


def test_special_tokens_in_prose_can_stay_text(tiny_tokenizer_dir: Path) -> None:
    tokenizer, text = load_tokenizer(tiny_tokenizer_dir), "End a text with </s>"
    for special_tokens, read in (("parse", 1), ("text", 0)):
        rules = replace(rendering(bos=0, eos=1), special_tokens=special_tokens)
        (found,) = tokenize([Document(number=0, text=text)], tokenizer, rules)
        assert found.tokens.tolist().count(1) == 1  # its own, or the one that is put behind
        assert (Fact.OWN_END in found.facts) == bool(read)
        assert tokenizer.decode(found.tokens[1 : len(found.tokens) - 1 + read].tolist()) == text
    assert tokenizer(text)["input_ids"][-1] == 1  # the tokenizer itself reads as ever
