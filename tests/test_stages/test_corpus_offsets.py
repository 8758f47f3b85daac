"""Where tokens end in a text that the tokenizer normalises: one battery over its normalisers."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stages.corpus.facts import Fact
from stages.corpus.offsets import may_move_ends
from stages.corpus.rendering import Rendering
from stages.corpus.source import Document
from stages.corpus.tokenized import TokenizedDocument, tokenize

NORMALIZERS: dict[str, Any] = {
    "none": None,
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "Lowercase": normalizers.Lowercase(),
    "StripAccents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "StripAccents alone": normalizers.StripAccents(),
    "Bert": normalizers.BertNormalizer(),
    "Nmt": normalizers.Nmt(),
    "Strip": normalizers.Strip(),
    "Replace": normalizers.Replace(" ", "▁"),
    "Replace spaces": normalizers.Replace(Regex(" {2,}"), " "),
    "Prepend": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "NFD, NFC": normalizers.Sequence([normalizers.NFD(), normalizers.NFC()]),
}
HANGUL = unicodedata.normalize("NFD", "한국어 x")
TEXTS = {
    "hangul": HANGUL,
    "accent": unicodedata.normalize("NFD", "un café, déjà vu"),
    "vietnamese": unicodedata.normalize("NFD", "Việt Nam"),
    "reordered": "a\u0301\u0323b q\u0307\u0323\u0301",
    "half-width": "ｶﾞｷﾞ ㄱㅏ",
    "expanded": "ﬁn… İx ½",
    "hindi": "नमस्ते दुनिया",
    "emoji": "👩‍👧 ☃️ ok",
    "spaces": "a  b\r\n c\u00a0d ",
    "ascii": "The end.",
}
ALPHABET = "aeqAİ ½ﬁ…한\u0301\u0323\u0307\u0316é\u1112\u1161\u11abｶﾞㄱㅏ\u200d\n"


def characters(normalizer: Any) -> PreTrainedTokenizerBase:
    """Tokens are single characters of the normalised text."""
    vocabulary = sorted({char for text in [*TEXTS.values(), ALPHABET] for char in normalised(normalizer, text)})
    everything = [*vocabulary, *(chr(code) for code in range(0x1100, 0x1200))]
    known = dict.fromkeys([*everything, *map(chr, range(0xC0, 0x3100)), *map(chr, range(0xAC00, 0xD7A4))])
    model = Unigram([("<unk>", 0.0), *((char, -1.0) for char in known)], unk_id=0)
    return wrapped(model, normalizer, None)


def bytes_of(normalizer: Any) -> PreTrainedTokenizerBase:
    vocabulary = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return wrapped(BPE(vocab=vocabulary, merges=[]), normalizer, pre_tokenizers.ByteLevel(add_prefix_space=False))


def pieces(normalizer: Any) -> PreTrainedTokenizerBase:
    vocabulary = sorted({char for text in TEXTS.values() for char in normalised(normalizer, text)} | {"▁"})
    model = Unigram([("<unk>", 0.0), *((char, -1.0) for char in vocabulary)], unk_id=0)
    return wrapped(model, normalizer, pre_tokenizers.Metaspace())


def words(normalizer: Any) -> PreTrainedTokenizerBase:
    return wrapped(WordLevel({"<unk>": 0}, unk_token="<unk>"), normalizer, pre_tokenizers.WhitespaceSplit())


MODELS = {"characters": characters, "bytes": bytes_of, "pieces": pieces, "words": words}


def normalised(normalizer: Any, text: str) -> str:
    return text if normalizer is None else str(normalizer.normalize_str(text))


def wrapped(model: Any, normalizer: Any, pre_tokenizer: Any) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tokenized(text: str, tokenizer: PreTrainedTokenizerBase, *, prompt: int = 0) -> TokenizedDocument:
    rendering = Rendering(window=4096, overlap=0, min_tokens=1, bos=None, eos=None, vocab_size=1 << 20)
    (found,) = tokenize([Document(number=0, text=text, prompt=prompt)], tokenizer, rendering)
    return found


def check_ends(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ends are of whole characters and never fall; the slices between them are the text, or the rest is told."""
    found = tokenized(text, tokenizer)
    ends = found.token_end_byte.astype(np.int64)
    assert np.all(np.diff(ends) >= 0)
    data, edges = text.encode(), [0, *ends.tolist()]
    slices = [data[begin:end].decode() for begin, end in pairwise(edges)]
    assert text.startswith("".join(slices))
    assert ("".join(slices) == text) == (Fact.DROPPED_END not in found.facts)
    assert may_move_ends(text, tokenizer) or Fact.MOVED_ENDS not in found.facts
    return [len(data[:end].decode()) for end in ends]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_slices_between_ends_are_the_text(normalizer: str, model: str) -> None:
    make: Callable[[Any], PreTrainedTokenizerBase] = MODELS[model]
    tokenizer = make(NORMALIZERS[normalizer])
    for text in TEXTS.values():
        check_ends(text, tokenizer)


@pytest.mark.parametrize("normalizer", [name for name in NORMALIZERS if name not in ("Strip", "Prepend")])
def test_an_end_covers_all_that_a_token_was_made_from(normalizer: str) -> None:
    """What is before a token's end, normalised, begins with all tokens up to this one."""
    tokenizer, normalize = characters(NORMALIZERS[normalizer]), NORMALIZERS[normalizer]

    @given(st.text(ALPHABET, max_size=12))
    def check(text: str) -> None:
        ends = check_ends(text, tokenizer)
        whole = normalised(normalize, text)
        assert len(ends) == len(whole)
        starts = [start for start, _ in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
        for count, (start, end) in enumerate(zip(starts, ends, strict=True), start=1):
            if end > start:  # else the next token has the rest of this character
                assert normalised(normalize, text[:end]).startswith(whole[:count])

    for text in TEXTS.values():
        check.hypothesis.inner_test(text)  # type: ignore[attr-defined]
    check()


@pytest.mark.parametrize(
    ("normalizer", "text", "ends"),
    [
        ("NFC", HANGUL[:3], [9]),
        ("NFKC", HANGUL[:3] + "x", [9, 10]),
        ("NFC", "cafe\u0301s", [1, 2, 3, 6, 7]),
        ("NFKC", "ｶﾞx", [6, 7]),
        ("StripAccents", "e\u0301x", [3, 4]),
        ("NFC", "a\u0301\u0323b", [5, 5, 6]),
        ("NFD", "a\u0301\u0323b", [1, 5, 5, 6]),
        ("NFC", "a\u0316\u0301b", [5, 5, 6]),
        ("NFC", "é\u0316b", [2, 4, 5]),
        ("Lowercase", "e\u0301x", [1, 3, 4]),
        ("none", "e\u0301x", [1, 3, 4]),
    ],
)
def test_ends_in_bytes(normalizer: str, text: str, ends: list[int]) -> None:
    assert tokenized(text, characters(NORMALIZERS[normalizer])).token_end_byte.tolist() == ends


def test_a_prompt_ends_before_a_token_that_reaches_beyond_it() -> None:
    text = "cafe\u0301 x"
    found = tokenized(text, characters(NORMALIZERS["NFC"]), prompt=4)
    assert found.prompt == 3
    assert Fact.BORDER_MERGED in found.facts
