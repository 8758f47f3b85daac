"""Prompts: read by the teacher as they are, and never a target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.config.extract import SourceConfig
from stages.corpus import SourceSpec, open_corpus, scan
from stages.corpus.facts import Fact
from stages.corpus.rendering import Rendering
from stages.corpus.source import Document, Prompted
from stages.corpus.tokenize import TokenWindow, cut, render
from stages.corpus.tokenized import DOCUMENTS_PER_CALL, TokenizedDocument, tokenize
from stages.corpus.tokenizer import load_tokenizer
from storage.errors import UsageError

RULES: dict[str, Any] = {"overlap": 0, "min_tokens": 1, "vocab_size": 512}
PAIRS = [
    ("What is a class?", " A class – naïve 語🙂 – is a kind."),
    ("", "no prompt at all here"),
    ("only a prompt", ""),
]


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in PAIRS))
    return path


def windows_of(prompt: str, answer: str, directory: Path, **changes: int | None) -> list[TokenWindow]:
    rendering = Rendering(
        **{"window": 512, "overlap": 0, "min_tokens": 1, "bos": None, "eos": None, "vocab_size": 512, **changes}  # type: ignore[arg-type]
    )
    document = Document(number=0, text=prompt + answer, prompt=len(prompt))
    return list(render([document], load_tokenizer(directory), rendering))


def test_documents_are_prompt_and_text_joined(corpus_file: Path) -> None:
    spec = SourceSpec(source="jsonl", path=str(corpus_file), field="answer", prompt_field="prompt")
    corpus = open_corpus([spec])
    documents = list(corpus.documents(range(len(corpus))))
    assert [(document.text, document.prompt) for document in documents] == [(a + b, len(a)) for a, b in PAIRS]
    assert corpus.sources[0].identity["prompt_field"] == "prompt"
    plain = open_corpus([SourceSpec(source="jsonl", path=str(corpus_file), field="answer")])
    assert "prompt_field" not in plain.sources[0].identity
    assert {document.prompt for document in plain.documents(range(3))} == {0}


def test_prompts_are_read_once(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SourceSpec(source="jsonl", path=str(corpus_file), field="answer", prompt_field="prompt")
    corpus = open_corpus([spec])
    prompts = cast(Prompted, corpus.sources[0]).prompts
    spans, read = [], prompts.read
    monkeypatch.setattr(type(prompts), "read", lambda self, *span: (spans.append(self is prompts), read(*span))[1])
    list(corpus.documents(range(len(corpus))))
    assert spans.count(True) == 1


def test_a_prompt_field_that_is_not_there_is_told(corpus_file: Path) -> None:
    with pytest.raises(UsageError, match="no field 'question'"):
        open_corpus([SourceSpec(source="jsonl", path=str(corpus_file), field="answer", prompt_field="question")])
    with pytest.raises(ValidationError, match="takes no prompt_field"):
        SourceConfig(source="topics", prompt_field="prompt")


@pytest.mark.parametrize("special", [{}, {"bos": 0, "eos": 1}])
@pytest.mark.parametrize(("prompt", "answer"), PAIRS)
def test_rows_predict_what_follows_the_prompt(
    prompt: str, answer: str, special: dict[str, int], tiny_tokenizer_dir: Path
) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    found = windows_of(prompt, answer, tiny_tokenizer_dir, **special)
    if not answer and not special:
        assert found == []
        return
    (sequence,) = found
    predicted = sequence.tokens[np.flatnonzero(sequence.has_row) + 1]
    wanted = tokenizer(prompt + answer, add_special_tokens=False, return_offsets_mapping=True)
    # The first token of the text itself needs a context: prompt or begin token.
    spans = zip(wanted["input_ids"], wanted["offset_mapping"], strict=True)
    answers = [token for token, (_, end) in spans if end > len(prompt)]
    answers = answers[0 if prompt or special else 1 :] + ([1] if special else [])
    assert predicted.tolist() == answers


@pytest.mark.parametrize("overlap", [0, 3])
def test_windows_inside_the_prompt_are_left_out(overlap: int, tiny_tokenizer_dir: Path) -> None:
    prompt, answer = "The class statement defines a class object. " * 4, "It is executed."
    whole = windows_of(prompt, answer, tiny_tokenizer_dir)[0]
    cut = windows_of(prompt, answer, tiny_tokenizer_dir, window=16, overlap=overlap)
    assert cut[0].window_start > 0
    rows = {int(at) + part.window_start for part in cut for at in np.flatnonzero(part.has_row)}
    expected = set(np.flatnonzero(whole.has_row).tolist())
    if overlap:
        assert rows == expected
    else:  # the first token of a window is predicted by none
        assert rows == {at for at in expected if (at + 1) % 16}


def merging_tokenizer(*, prefix_space: bool) -> PreTrainedTokenizerBase:
    """Letters, ".memory" and "s." as single tokens; with a prefix space, every text begins with one."""
    letters = sorted(set("usememory. add▁"))
    merges, vocabulary = [], [*letters, "</s>"]
    for word in (".memory", "s."):
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary.append(word[:end])
    model = BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    if prefix_space:
        prepend = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(prepend)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def document_of(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> TokenizedDocument:
    values = {"window": 512, "overlap": 0, "min_tokens": 1, "bos": None, "eos": None, "vocab_size": 512, **changes}
    (found,) = tokenize([Document.of(0, prompt, answer)], tokenizer, Rendering(**values))
    return found


def test_prompt_and_text_that_would_merge_are_cut_where_they_meet() -> None:
    tokenizer = merging_tokenizer(prefix_space=False)
    prompt, answer = "use .", "memory.add"
    assert ".memory" in tokenizer.tokenize(prompt + answer)
    found = document_of(prompt, answer, tokenizer)
    assert found.tokens.tolist() == tokenizer(prompt)["input_ids"] + tokenizer(answer)["input_ids"]
    assert found.prompt == len(prompt)
    assert found.facts == {Fact.BORDER_CUT}
    assert found.token_end_byte.tolist() == list(range(1, len(prompt + answer) + 1))


def test_prompt_and_text_that_do_not_merge_are_tokenised_together() -> None:
    tokenizer = merging_tokenizer(prefix_space=False)
    found = document_of("use ", ".memory.add", tokenizer)
    assert found.tokens.tolist() == tokenizer("use .memory.add")["input_ids"]
    assert found.facts == frozenset()


def test_prompt_and_text_that_cannot_be_spelled_apart_are_told() -> None:
    """A token across the border belongs to the text: the prompt must not tell of it."""
    tokenizer = merging_tokenizer(prefix_space=True)
    found = document_of("use .", "memory.add", tokenizer)
    assert found.tokens.tolist() == tokenizer("use .memory.add")["input_ids"]
    assert found.prompt == len("▁use▁")
    assert found.facts == {Fact.BORDER_MERGED}


@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize(("prompt", "answer"), [*PAIRS, ("The stat", "ement"), ("naïve caf", "e\u0301!"), ("x ", "y")])
def test_a_prompt_has_the_ids_that_it_has_alone(
    prompt: str, answer: str, eos: int | None, tiny_tokenizer_dir: Path
) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    found = document_of(prompt, answer, tokenizer, bos=0, eos=eos)
    alone = [0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    assert found.tokens[: found.prompt].tolist() == alone
    assert tokenizer.decode(found.tokens[1 : len(found.tokens) - (eos is not None)].tolist()) == prompt + answer


LONG = ("code 4711. " * 12, "4711 it is")


@pytest.mark.parametrize("bos", [None, 0])
def test_a_document_longer_than_a_window(bos: int | None, tiny_tokenizer_dir: Path) -> None:
    """No way of reading it, but the one that is asked for by name, has a row that does not see what it must."""
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    whole = document_of(*LONG, tokenizer, bos=bos, eos=1)
    text_T = whole.tokens[whole.prompt :]
    window = len(whole.tokens) - 5
    ways = {
        too_long: document_of(*LONG, tokenizer, bos=bos, eos=1, window=window, too_long=too_long)
        for too_long in ("drop", "cut_prompt", "window")
    }
    assert {way: found.facts - whole.facts for way, found in ways.items()} == {
        "drop": {Fact.TEXT_CUT},
        "cut_prompt": {Fact.PROMPT_CUT},
        "window": {Fact.WINDOWED},
    }
    np.testing.assert_array_equal(ways["drop"].tokens, whole.tokens[:window])
    assert ways["drop"].prompt == whole.prompt
    np.testing.assert_array_equal(ways["window"].tokens, whole.tokens)
    cut_document = ways["cut_prompt"]
    begin = [] if bos is None else [bos]
    assert cut_document.tokens.tolist() == begin + whole.tokens[len(begin) + 5 :].tolist()
    assert cut_document.tokens[cut_document.prompt :].tolist() == text_T.tolist()
    (window_of_it,) = cut(cut_document, Rendering(**RULES, window=window, bos=bos, eos=1))
    assert int(window_of_it.has_row.sum()) == len(text_T)
    assert cut_document.token_end_byte[-1] == len("".join(LONG).encode())


def test_windows_that_prompt_or_text_fill_alone(tiny_tokenizer_dir: Path) -> None:
    """A prompt that fills one leaves no row, unless its beginning may go; a text that fills one cannot be helped."""
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    prompt, text = (len(tokenizer(part)["input_ids"]) for part in LONG)

    def read(window: int, too_long: str, prompt: str = LONG[0]) -> tuple[int, int, set[Fact]]:
        found = document_of(prompt, LONG[1], tokenizer, window=window, too_long=too_long)
        return found.prompt, len(found.tokens), set(found.facts)

    assert read(prompt, "drop") == (0, 0, {Fact.LEFT_OUT})
    assert read(prompt + 1, "drop") == (prompt, prompt + 1, {Fact.TEXT_CUT})
    assert read(text + 1, "cut_prompt") == (1, text + 1, {Fact.PROMPT_CUT})
    assert read(text, "cut_prompt") == (0, 0, {Fact.LEFT_OUT})
    short = "4711"
    assert read(text, "cut_prompt", short)[2] == read(text, "drop", short)[2] == {Fact.TEXT_CUT}


@pytest.mark.parametrize("too_long", ["drop", "cut_prompt", "window"])
def test_documents_without_a_prompt_are_cut_into_windows(too_long: str, tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    found = document_of("", "".join(LONG), tokenizer, window=8, too_long=too_long)
    assert found.tokens.tolist() == tokenizer("".join(LONG))["input_ids"]
    assert found.facts == frozenset()


@pytest.mark.parametrize("form", [None, normalizers.NFKC()], ids=["as it is", "NFKC"])
def test_a_plan_tokenises_what_may_bring_a_key(
    form: Any, corpus_file: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every document with a prompt: those that may be too long, after one that the border was cut in."""
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    tokenizer.backend_tokenizer.normalizer = form
    lines = [("The stat", "ement"), *[("The class", " is here.")] * 2 * DOCUMENTS_PER_CALL, ("4711 ", "\ufdfa" * 9)]
    corpus_file.write_text("".join(json.dumps({"prompt": a, "text": b}) + "\n" for a, b in lines))
    corpus = open_corpus([SourceSpec(source="jsonl", path=str(corpus_file), prompt_field="prompt")])
    rules = Rendering(**{**RULES, "min_tokens": 2}, window=40, bos=None, eos=1, too_long="drop")
    read: list[Document] = []
    monkeypatch.setattr(
        scan, "tokenize", lambda stream, *rest: tokenize((read.append(it) or it for it in stream), *rest)
    )  # type: ignore[func-returns-value]
    (long,) = tokenize([document := Document.of(0, *lines[-1])], tokenizer, rules)
    assert scan.facts_for_plan(corpus, tokenizer, rules) == {Fact.BORDER_CUT} | (long.facts & {Fact.TEXT_CUT})
    assert len(read) <= DOCUMENTS_PER_CALL + 1
    assert form is None or (Fact.TEXT_CUT in long.facts and len(document.text.encode()) < 40)
