"""Prompts: read by the teacher as they are, and never a target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.config.extract import SourceConfig
from stages.corpus import SourceSpec, open_corpus
from stages.corpus.source import Document, Prompted
from stages.corpus.tokenize import Rendering, TokenWindow, render
from stages.corpus.tokenizer import load_tokenizer
from storage.errors import UsageError

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


def test_a_token_across_the_border_belongs_to_the_text(tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    text = "The statement"
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    token, (start, end) = next((index, span) for index, span in enumerate(offsets) if index and span[1] - span[0] > 1)
    (sequence,) = windows_of(text[: end - 1], text[end - 1 :], tiny_tokenizer_dir)
    assert start < end - 1
    assert np.flatnonzero(sequence.has_row)[0] == token - 1
