"""A corpus and the model that reads it, opened and checked without its weights. Both phases begin here.

Data path: configuration -> **corpus, tokenizer, rendering** -> sequences -> teacher.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.config.base import section
from pipeline.config.extract import RenderingConfig, SourceConfig, TeacherConfig
from stages.corpus import Corpus, SourceSpec, open_corpus
from stages.corpus.rendering import Rendering
from stages.corpus.tokenize import resolve_special
from stages.corpus.tokenizer import load_tokenizer, real_tokens
from stages.models.files import ModelDirectory, find_model, load_config, position_limit
from stages.models.load import attention_for
from stages.teacher import BACKENDS
from storage.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read, and by whom.

    Attributes:
        corpus: checked as a whole.
        model, model_config, tokenizer: the teacher's.
        vocab_size: real tokens.
        attention: how the teacher attends, which may be another way than the configuration asks for.
        rendering: how documents become token windows.
    """

    corpus: Corpus
    model: ModelDirectory
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    attention: str
    rendering: Rendering


def open_reading(
    sources: Iterable[SourceConfig],
    rendering: RenderingConfig,
    teacher: TeacherConfig,
    *,
    weights: bool,
    key: str = "teacher",
) -> Reading:
    """Open and check corpus, model directory and tokenizer.

    Args:
        weights: require (and fetch) the teacher's weights too.
        key: the section of the configuration that names the teacher, for messages.

    Raises:
        UsageError: anything that the configuration names is missing or unfit.
    """
    with section("corpus", SourceConfig):
        corpus = open_corpus(SourceSpec(**source.model_dump()) for source in sources)
    model = find_model(teacher.path, teacher.revision, weights=weights, key=f"{key}.path")
    model_config = load_config(model)
    tokenizer = load_tokenizer(model.directory)
    vocab_size = min(real_tokens(tokenizer), model_config.get_text_config().vocab_size)
    check_window(rendering.window, model_config)
    with section("rendering", RenderingConfig):
        bos, eos = resolve_special(tokenizer, rendering.bos, eos=rendering.eos)
    return Reading(
        corpus=corpus,
        model=model,
        model_config=model_config,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        attention=attention_for(model_config, teacher.attention, key=f"{key}.attention"),
        rendering=Rendering(
            window=rendering.window,
            overlap=rendering.overlap,
            min_tokens=rendering.min_tokens,
            bos=bos,
            eos=eos,
            vocab_size=vocab_size,
            too_long=rendering.too_long,
            special_tokens=rendering.special_tokens,
        ),
    )


def require_hidden_states(backend: str, task: str, *, key: str, otherwise: str = "") -> None:
    """Refuse a backend that gives less than a task asks for.

    Args:
        backend: its name in the table.
        task: for messages: what asks for hidden states and a head.
        key: the configuration's, that names the backend.
        otherwise: what else would help.

    Raises:
        UsageError: it gives finished candidates alone, or is not in the table, as in the plan of a newer version.
    """
    if backend not in BACKENDS:
        raise UsageError(
            f"unknown teacher backend {backend!r}", where=key, fix=f"this version has {', '.join(BACKENDS)}"
        )
    if not BACKENDS[backend].hidden_states:
        able = ", ".join(name for name, known in BACKENDS.items() if known.hidden_states)
        raise UsageError(
            f"teacher backend {backend!r} gives finished candidates alone; {task} needs hidden states and a head",
            where=key,
            fix=f"use a backend that gives them: {able}{otherwise}",
        )


def check_window(window: int, model_config: PretrainedConfig) -> None:
    """Refuse windows longer than the teacher's positions: beyond them it fails, or its distributions are worthless.

    Raises:
        UsageError: names window, limit and the fix.
    """
    limit = position_limit(model_config)
    if limit is not None and limit < window:
        raise UsageError(
            f"window = {window} is more than the {limit} positions that the teacher knows",
            where="rendering.window",
            fix=f"set rendering.window to at most {limit}",
        )
