"""Tokenizer identity, and the difference between two tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages.corpus.tokenizer import (
    encode,
    first_difference,
    load_tokenizer,
    real_tokens,
    tokenizer_files,
    tokenizer_identity,
    vocabulary_sha256,
)
from storage.errors import UsageError


def changed(directory: Path, target: Path, *, old: str, new: str | None) -> Path:
    """Copy a tokenizer with one token renamed, or taken out."""
    shutil.copytree(directory, target)
    content = json.loads((target / "tokenizer.json").read_text())
    model = content["model"]
    index = model["vocab"].pop(old)
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) != old]
    if new is not None:
        model["vocab"][new] = index
    (target / "tokenizer.json").write_text(json.dumps(content))
    return target


def last_token(directory: Path) -> tuple[str, int]:
    vocabulary = load_tokenizer(directory).get_vocab()
    token = max(vocabulary, key=vocabulary.__getitem__)
    return token, vocabulary[token]


def test_the_same_map_has_no_difference(tiny_tokenizer_dir: Path, tiny_teacher_dir: Path) -> None:
    ours, theirs = load_tokenizer(tiny_tokenizer_dir), load_tokenizer(tiny_teacher_dir)
    theirs.bos_token, theirs.chat_template = None, "{{ messages }}"  # roles and template may differ
    assert first_difference(ours, theirs) is None
    assert vocabulary_sha256(ours, 512) == vocabulary_sha256(theirs, 512)


def test_first_difference_names_id_and_tokens(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    token, index = last_token(tiny_tokenizer_dir)
    ours = load_tokenizer(tiny_tokenizer_dir)
    renamed = load_tokenizer(changed(tiny_tokenizer_dir, tmp_path / "renamed", old=token, new="other"))
    assert first_difference(ours, renamed) == f"id {index} is {token!r} in one and 'other' in the other"
    shorter = load_tokenizer(changed(tiny_tokenizer_dir, tmp_path / "shorter", old=token, new=None))
    assert first_difference(ours, shorter) == f"id {index} is {token!r} in one and no token in the other"
    assert vocabulary_sha256(ours, 512) != vocabulary_sha256(renamed, 512)


def test_identity(tiny_teacher_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_teacher_dir)
    files = tokenizer_files(tiny_teacher_dir)
    assert "tokenizer.json" in files
    assert "config.json" not in files
    identity = tokenizer_identity(tokenizer, files, real_tokens(tokenizer))
    assert identity["special_tokens"] == {"bos": 0, "eos": 1, "pad": 2}
    assert set(identity["files"]) == set(files)
    assert real_tokens(tokenizer) == 512


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    """The tokenizers library raises plain `Exception`."""
    shutil.copytree(tiny_tokenizer_dir, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"model": {"type": "nope"}}))
    with pytest.raises(UsageError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)


REPLACE = {"type": "Replace", "pattern": {"String": "e"}, "content": "x" * 10**6}
UNKNOWN = {"SpecialToken": {"id": "<nothing>", "type_id": 0}}
BROKEN: dict[str, dict[str, Any]] = {
    "grows": {"normalizer": REPLACE},
    "grows on one character": {"normalizer": {**REPLACE, "pattern": {"String": "語"}, "content": "x" * 10**4}},
    "panics": {"post_processor": {"type": "TemplateProcessing", "single": [UNKNOWN], "pair": [], "special_tokens": {}}},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_tokenizer_that_fails_is_the_users_to_mend(name: str, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_tokenizer_dir, tmp_path / "broken")
    file = tmp_path / "broken" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | BROKEN[name]))
    with pytest.raises(UsageError, match=r"the tokenizer (makes [\d,]+ (characters|tokens)|fails: .)") as caught:
        encode(load_tokenizer(tmp_path / "broken"), ["the word 語"])
    assert caught.value.where == str(tmp_path / "broken")
