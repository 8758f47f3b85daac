"""What a run learns from: a store's rows, or a corpus with a live teacher. The rest of phase 2 sees no difference.

Data path: TrainConfig -> **sequences of both splits, tokenizer, identity** -> order -> batches -> training loop.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.extract import HeldoutConfig, RenderingConfig
from pipeline.config.train import TrainConfig
from pipeline.reading import Reading, open_reading, require_hidden_states
from stages.batches.corpus import Tokenized, split_corpus
from stages.batches.steps import SequenceSource
from stages.corpus.facts import Tally
from stages.corpus.tokenize import render
from stages.corpus.tokenized import special_names
from stages.corpus.tokenizer import tokenizer_files, tokenizer_identity
from stages.devices import resolve_device, resolve_dtype
from stages.input_files import FileState
from stages.models.files import ModelDirectory, file_states
from stages.teacher.backend import teacher_identity
from storage.errors import UnfinishedError, UsageError
from storage.plan import HeldoutRule
from storage.reader import StoreReader
from storage.values import Json, canonical_json

TEACHER_KEY = "teacher_model"


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Sequences with their teacher.

    Attributes:
        train, heldout: sequences of both splits.
        digest: of everything that makes them and their targets: a run never resumes on another one.
        order_digest: of the sequences alone: with the teacher or without it, a run sees them in the same order.
        vocab_size: real tokens of the teacher.
        window: tokens of the longest sequence that can occur, 0 if unknown.
        tokenizer_files: the teacher's, by name.
        record: what run.json says: the digest, and where things were.
        store: the store, if the rows come from one.
        teacher: the live teacher's directory, in an online run that needs its weights.
        attention: how it attends.
        teacher_files: its files as they were before they were hashed.
    """

    train: SequenceSource
    heldout: SequenceSource
    digest: str
    order_digest: str
    vocab_size: int
    window: int
    tokenizer_files: Mapping[str, bytes]
    record: Mapping[str, Json]
    store: StoreReader | None = None
    teacher: ModelDirectory | None = None
    attention: str = "sdpa"
    teacher_files: tuple[FileState, ...] = ()

    @property
    def online(self) -> bool:
        """Whether the sequences come from a corpus and not from a store."""
        return self.store is None

    @property
    def longest(self) -> int:
        """Tokens of the longest training sequence. Looks at all of them."""
        return int(self.train.lengths().max(initial=0))

    @property
    def longest_read(self) -> int:
        """Tokens of the longest sequence that the student reads, in training or in validation."""
        return max(self.longest, int(self.heldout.lengths().max(initial=0)))

    @property
    def teacher_name(self) -> str:
        """As the user knows it; of a local directory only its own name, which says nothing about this machine."""
        name = str(self.record.get("teacher", {}).get("name", "an unnamed teacher"))
        return Path(name).name if Path(name).is_absolute() else name


def read_training_data(config: TrainConfig) -> Generator[Tokenized, None, TrainingData]:
    """Open the store, or read and tokenise the corpus, which may take long: the events tell how far it is.

    Raises:
        UsageError: store, corpus or teacher are missing or unfit.
        IdentityError: the store has another digest than the configuration expects.
        CorruptionError: the store is damaged.
    """
    if config.store is not None:
        return _stored(config, config.store)
    return (yield from _online(config))


def open_training_data(config: TrainConfig, tell: Callable[[Tokenized], None] = lambda event: None) -> TrainingData:
    """Do as `read_training_data` outside of a generator; `tell` gets its events."""
    reading = read_training_data(config)
    while True:
        try:
            tell(next(reading))
        except StopIteration as end:
            data: TrainingData = end.value
            return data


def _stored(config: TrainConfig, path: Path) -> TrainingData:
    demands: dict[str, Any] = {"allow_partial": config.allow_partial, "expected_digest": config.expected_digest}
    try:
        reader = StoreReader(path, **demands)
    except UnfinishedError as error:
        error.fix = f"{error.fix}, or set allow_partial: true to train on what is committed"
        raise
    plan = reader.plan
    teacher = plan.recorded.get("teacher")
    return TrainingData(
        train=reader,
        heldout=StoreReader(path, split="heldout", **demands),
        digest=reader.digest,
        order_digest=reader.digest,
        vocab_size=plan.vocab_size,
        window=int(plan.rendering.get("window") or 0),
        tokenizer_files=reader.tokenizer_files(),
        record={
            "digest": reader.digest,
            "id": plan.store_id,
            "path": str(path.absolute()),
            "teacher": teacher if isinstance(teacher, dict) else {},  # nothing vouches for what is recorded
            "rendering": dict(plan.rendering),
        },
        store=reader,
    )


def _online(config: TrainConfig) -> Generator[Tokenized, None, TrainingData]:
    """Tokenise the corpus. Without a share of the divergence the teacher is its tokenizer: no weight is looked at."""
    assert config.teacher_model is not None, "the configuration has one of store and teacher_model"
    assert config.corpus is not None, "the configuration has a corpus beside teacher_model"
    with_teacher = config.kd_ratio > 0.0
    if with_teacher:
        require_hidden_states(config.teacher_model.backend, "a live teacher", key=f"{TEACHER_KEY}.backend")
    rendering = config.rendering or RenderingConfig()
    reading = open_reading(config.corpus, rendering, config.teacher_model, weights=with_teacher, key=TEACHER_KEY)
    rule = HeldoutRule(**(config.heldout or HeldoutConfig()).model_dump())
    files = tokenizer_files(reading.model.directory)
    states = file_states(reading.model) if with_teacher else ()
    tally = Tally()
    documents = reading.corpus.documents(range(len(reading.corpus)))
    sequences = render(documents, reading.tokenizer, reading.rendering, tally)
    began = time.perf_counter()
    train, heldout = yield from split_corpus(sequences, rule, documents=len(reading.corpus))
    if notes := tally.sentences(special_names(reading.tokenizer)):
        yield Tokenized(
            documents=len(reading.corpus),
            total=len(reading.corpus),
            tokens=train.tokens + heldout.tokens,
            seconds=time.perf_counter() - began,
            seconds_left=0.0,
            notes=notes,
        )
    identity = {
        "corpus": [dict(source.identity) for source in reading.corpus.sources],
        "tokenizer": tokenizer_identity(reading.tokenizer, files, reading.vocab_size),
        "vocab_size": reading.vocab_size,
        "rendering": reading.rendering.to_plan(tally.documents),
        "heldout": vars(rule),
    }
    order_digest = _digest(identity)
    if with_teacher:
        identity["teacher"] = _teacher_identity(config, reading)
    digest = _digest(identity)
    if len(train) == 0:
        raise UsageError(
            f"no training sequence in {len(reading.corpus)} documents: they are held out, shorter than "
            "rendering.min_tokens, or have a prompt that fills rendering.window",
            where="corpus",
            fix="check the field that holds the text, rendering.min_tokens, rendering.window and heldout.fraction",
        )
    return TrainingData(
        train=train,
        heldout=heldout,
        digest=digest,
        order_digest=order_digest,
        vocab_size=reading.vocab_size,
        window=reading.rendering.window,
        tokenizer_files=files,
        record={
            "digest": digest,
            "teacher": reading.model.recorded(),
            "corpus": [dict(source.recorded) for source in reading.corpus.sources],
            "identity": identity,
        },
        teacher=reading.model if with_teacher else None,
        attention=reading.attention,
        teacher_files=states,
    )


def _teacher_identity(config: TrainConfig, reading: Reading) -> dict[str, Json]:
    assert config.teacher_model is not None
    device = resolve_device(config.device)
    return teacher_identity(
        reading.model,
        reading.model_config,
        backend=config.teacher_model.backend,
        dtype=resolve_dtype(config.teacher_model.dtype, device),
        attention=reading.attention,
    )


def _digest(identity: Mapping[str, Json]) -> str:
    return hashlib.sha256(canonical_json(dict(identity))).hexdigest()
