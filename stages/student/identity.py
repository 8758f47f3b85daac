"""Does this student speak the teacher's language? The same token -> id map, and a head that is as wide or padded.

Data path: tokenizer of store or live teacher, and student -> **check** -> training. Roles of special tokens and chat
templates are not compared: a base student may learn from an instruct teacher.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from stages.corpus.tokenizer import FILES, first_difference, load_tokenizer
from stages.models.files import position_limit, require_positions
from stages.student.model import head_layer
from stages.student.source import StudentSource, model_directory
from storage.errors import IdentityError, UsageError

logger = logging.getLogger("topk_distill.student")

# Without a tokenizer to look at, a head may exceed the vocabulary by this share and still pass for padded.
_PADDING_SHARE = 0.05


def check_tokenizer(source: StudentSource, teachers: PreTrainedTokenizerBase) -> bool:
    """Compare the student's own tokenizer with the teacher's. Return False if it has none, which only a student that is
    made from a configuration may.

    Args:
        source: where the student comes from.
        teachers: the teacher's tokenizer.

    Raises:
        IdentityError: the first id at which they differ, with both tokens.
        UsageError: the student comes with weights but without a tokenizer.
    """
    directory = _tokenizer_directory(source)
    if directory is None:
        return False
    compare_tokenizers(directory, teachers, where=f"path: {source.path}")
    return True


def compare_tokenizers(directory: Path, teachers: PreTrainedTokenizerBase, *, where: str) -> None:
    """Compare the tokenizer of a student's directory with the teacher's.

    Args:
        teachers: as `check_tokenizer`.
        where: what names the student, for messages.

    Raises:
        IdentityError: as `check_tokenizer`.
        UsageError: there is no tokenizer.
    """
    difference = first_difference(teachers, load_tokenizer(directory))
    if difference is not None:
        raise IdentityError(
            f"the student's tokenizer is not the teacher's: {difference}",
            where=f"{where} (the first is the teacher's)",
            fix="use a student with the teacher's tokenizer, or a teacher (and a store of it) with the student's",
        )


def read_tokenizer(files: Mapping[str, bytes]) -> PreTrainedTokenizerBase:
    """Return the tokenizer whose files these are, by name. Raises UsageError as `load_tokenizer`."""
    with tempfile.TemporaryDirectory(prefix="topk-distill-tokenizer-") as directory:
        write_tokenizer(files, Path(directory))
        return load_tokenizer(Path(directory))


def check_vocabulary(model: PreTrainedModel, vocab_size: int, *, same_tokenizer: bool) -> None:
    """Check that the student's embeddings and head have a row for each of `vocab_size` real tokens.

    Rows beyond are padding: masked in the loss, never trained as tokens.

    Args:
        vocab_size: real tokens of the teacher.
        same_tokenizer: the student's own tokenizer was compared, so that further rows are known to be padding.

    Raises:
        UsageError: the vocabularies really differ in size; both sizes are named.
    """
    rows = min(model.config.get_text_config().vocab_size, head_layer(model).weight.shape[0])
    if rows < vocab_size or (not same_tokenizer and rows > vocab_size * (1.0 + _PADDING_SHARE)):
        raise UsageError(
            f"the student's vocabulary has {rows} rows, the teacher's {vocab_size} tokens",
            fix=f"choose a student of this vocabulary, or set overrides.vocab_size={vocab_size} (from_config)",
        )
    if rows > vocab_size:
        logger.info("rows %d to %d of the student's head stand for no token and are masked", vocab_size, rows - 1)


def write_tokenizer(files: Mapping[str, bytes], directory: Path) -> None:
    """Write tokenizer files by name into a directory."""
    for name, content in files.items():
        if name not in FILES:
            raise UsageError(f"{name!r} is not the name of a tokenizer file", where="store")
        (directory / name).write_bytes(content)


def _tokenizer_directory(source: StudentSource) -> Path | None:
    if source.init != "from_config":
        return model_directory(source, weights=True)
    path = Path(source.path).expanduser()
    directory = path.parent if path.is_file() else model_directory(source, weights=False)
    has_one = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return directory if has_one else None


def check_positions(student: PretrainedConfig, window: int, longest: Callable[[], int]) -> int:
    """Check that the student knows as many positions as the longest sequence has, and return a bound of its tokens.

    Args:
        student: its configuration.
        window: tokens that no sequence exceeds; 0 if unknown.
        longest: tells the tokens of the longest sequence; asked only where `window` leaves it open.

    Raises:
        UsageError: it knows fewer.
    """
    limit = position_limit(student)
    if window > 0 and (limit is None or window <= limit):
        return window
    tokens = longest()
    require_positions(student, tokens, role="student", where="path")
    return tokens
