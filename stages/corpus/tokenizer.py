"""The tokenizer: loaded from a model directory, described for the plan, compared with another one.

A store's ids mean something only together with one token -> id map, so the plan holds a hash of that map. Roles of
special tokens and the chat template are recorded and may differ: a base student may learn from an instruct teacher.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import printable

from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from storage.errors import DistillError, UsageError
from storage.values import Json, canonical_json

_MOST_TOKENS = 256  # of a character: its bytes are four at most, a few special tokens come on top
_MEND = "repair tokenizer.json, or use the tokenizer that the model was published with"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a model directory. Remote code is never run.

    Raises:
        UsageError: there is none, or only a slow one, which cannot tell where in the text a token ends.
    """
    fix = "a model directory needs tokenizer.json beside its weights"
    with tokenizer_errors("cannot load a tokenizer", where=str(directory), fix=fix):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    if not tokenizer.is_fast:
        raise UsageError("only a slow tokenizer, without token offsets", where=str(directory), fix="add tokenizer.json")
    normalizer = tokenizer.backend_tokenizer.normalizer
    with tokenizer_errors("the tokenizer cannot normalise text", where=str(directory), fix=_MEND):
        grown = 0 if normalizer is None else max(len(normalizer.normalize_str(letter)) for letter in printable)
    if grown > _MOST_TOKENS:  # told before it is let loose on whole documents
        raise UsageError(f"the tokenizer makes {grown:,} characters of a single one", where=str(directory), fix=_MEND)
    return tokenizer


@contextmanager
def tokenizer_errors(what: str, *, where: str, fix: str) -> Iterator[None]:
    """Tell whatever a tokenizer or its chat template raises: files of the user are parsed and run there.

    The tokenizers library raises plain Exception, and where its Rust code panics a BaseException; a template can raise
    anything.

    Raises:
        UsageError: it failed.
    """
    try:
        yield
    except (DistillError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(f"{what}: {reason or type(error).__name__}", where=where, fix=fix) from error


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], **settings: bool) -> BatchEncoding:
    """Tokenise texts; the settings are those of the tokenizer's call.

    Raises:
        UsageError: it fails, or gives more tokens than text could have.
    """
    where = str(tokenizer.name_or_path)
    with tokenizer_errors("the tokenizer fails", where=where, fix=_MEND):
        encoded: BatchEncoding = tokenizer(texts, **settings)
    for text, ids in zip(texts, encoded["input_ids"], strict=True):
        if len(ids) > _MOST_TOKENS * (len(text) + 1):
            what = f"the tokenizer makes {len(ids):,} tokens of a text of {len(text):,} characters"
            raise UsageError(what, where=where, fix=_MEND)
    return encoded


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """Return the content of each tokenizer file and chat template of a model directory, by name."""
    return {name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}


def real_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of ids that the tokenizer can produce: its greatest id plus one."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    """Return sha256 (hex) of the canonical JSON of [[id, token], ...] in id order, ids below `vocab_size`."""
    pairs = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index < vocab_size)
    return hashlib.sha256(canonical_json(pairs)).hexdigest()


def tokenizer_identity(
    tokenizer: PreTrainedTokenizerBase, files: Mapping[str, bytes], vocab_size: int
) -> dict[str, Json]:
    """Return what the plan holds about a tokenizer: hash per file, hash of the token -> id map, special tokens."""
    return {
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
        "vocabulary_sha256": vocabulary_sha256(tokenizer, vocab_size),
        "special_tokens": {
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id,
        },
    }


def first_difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """Name the first id at which two token -> id maps differ, with both tokens; None if they are the same.

    An id that only one of them knows is a difference too.
    """
    ours_by_id = {index: token for token, index in ours.get_vocab().items()}
    theirs_by_id = {index: token for token, index in theirs.get_vocab().items()}
    for index in sorted(ours_by_id.keys() | theirs_by_id.keys()):
        if ours_by_id.get(index) != theirs_by_id.get(index):
            first, second = _named(ours_by_id.get(index)), _named(theirs_by_id.get(index))
            return f"id {index} is {first} in one and {second} in the other"
    return None


def _named(token: str | None) -> str:
    return "no token" if token is None else repr(token)
