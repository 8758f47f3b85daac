"""From a configuration to a plan, and to an estimate of what it will take, without loading a weight.

Data path: configuration -> corpus, tokenizer, sample of documents -> **plan** -> shards. A plan that is kept has the
hashes of the teacher's files; an estimate does without, and adds a rate.
"""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pipeline.config.extract import ExtractConfig
from pipeline.extraction.foresight import notes, stored_size
from pipeline.extraction.rates import RateKey, read_rate
from pipeline.extraction.survey import Sample, take_sample
from pipeline.reading import Reading, open_reading, require_hidden_states
from stages.corpus import Corpus
from stages.corpus.rendering import Rendering
from stages.corpus.scan import facts_for_plan
from stages.corpus.tokenized import special_names
from stages.corpus.tokenizer import tokenizer_files, tokenizer_identity
from stages.devices import dtype_name, resolve_device, resolve_dtype
from stages.input_files import FileState, file_sha256
from stages.models.files import ModelDirectory, file_states
from stages.models.probe import length_borders
from stages.targets import KINDS
from stages.targets.rows import require_k
from stages.teacher.backend import teacher_identity
from stages.teacher.batching import Batching, resolve_batching
from storage.codecs import CODECS, DEFAULT_CODEC
from storage.commit.bounds import require_fit
from storage.format.remap import build_remap, encode_remap, remap_sha256
from storage.plan import HeldoutRule, Plan, TargetSpec
from storage.values import Json

logger = logging.getLogger("topk_distill.plan")

ROWS_PER_SHARD = 32_000
LIBRARIES = ("topk-distill", "torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy", "zarr", "pcodec")

# Fitted to shards of real text, V = 49,152: hybrid 12+4 takes 34.0 bytes per row, hybrid 32+8 takes 72.4, topk 64 takes
# 112.5, sampled with 50 draws 29.3.
BYTES_PER_ROW = 5.9
BYTES_PER_HEAD = 1.3  # its tail mass
BYTES_PER_HEAD_ENTRY = 1.65
BYTES_PER_TAIL_DRAW = 1.5
BYTES_PER_DRAW = 0.47  # of the whole distribution: most repeat an id
BYTES_PER_TEMPERATURE = 2.2
NUMBERS_OF_ROW = 4  # tail_logit, logsumexp, entropy, next_logprob


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """A plan and all that carrying it out takes: made once, handed on as it is.

    Attributes:
        plan: what the store will hold.
        corpus, tokenizer, rendering: what is read, and how it becomes token windows.
        model: the teacher's directory.
        device, dtype: where and in what precision the teacher computes.
        batching: which sequences share a forward, and how many positions have logits at one time.
        sample: what a fixed sample of documents holds.
        remap: token id of each frequency rank [V].
        tokenizer_files: content by name.
        notes: what the corpus holds that a user should know of, in sentences.
        teacher_files: the teacher's files as they were before they were hashed; none where they were not.
    """

    plan: Plan
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    rendering: Rendering
    model: ModelDirectory
    device: torch.device
    dtype: torch.dtype
    batching: Batching
    sample: Sample
    remap: NDArray[np.uint32]
    tokenizer_files: dict[str, bytes]
    notes: tuple[str, ...]
    teacher_files: tuple[FileState, ...]

    def scaled(self, sampled: int) -> int:
        """Extrapolate a count over the sample to the whole corpus."""
        return round(sampled * len(self.corpus) / self.sample.documents)

    @property
    def rate_key(self) -> RateKey:
        """What a measured rate belongs to: architecture, dtype, device, threads, window."""
        return RateKey(
            model_config=file_sha256(self.model.directory / "config.json"),
            dtype=dtype_name(self.dtype),
            device=_device_name(self.device),
            threads=torch.get_num_threads(),
            window=self.rendering.window,
        )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an extraction will take.

    Attributes:
        documents: in the corpus.
        heldout_documents: of those, how many are held out.
        tokens, rows: teacher tokens and target rows, training and held-out; extrapolated unless `exact`.
        exact: whether every document was tokenised for this estimate.
        shards: units of work.
        contents: what a row holds, in words.
        bytes_per_row: of what grows with the rows, from measured sizes per entry.
        bytes: of the store, with its tokenizer's files and its remap.
        at_most: whether that is a bound, see `is_bound`.
        tokens_per_second: rate used, None if unknown.
        rate_source: `measured` by an earlier extraction with this teacher here, `given`, or None.
        seconds: None if the rate is unknown.
        teacher, device, dtype: what would run where.
        notes: what is better known before the teacher runs, in sentences; counts of the corpus are extrapolated.
    """

    documents: int
    heldout_documents: int
    tokens: int
    rows: int
    exact: bool
    shards: int
    contents: str
    bytes_per_row: float
    bytes: int
    at_most: bool
    tokens_per_second: float | None
    rate_source: str | None
    seconds: float | None
    teacher: str
    device: str
    dtype: str
    notes: tuple[str, ...]


def build_plan(config: ExtractConfig) -> Extraction:
    """Return the plan of an extraction, and what carries it out. Reads the weight files to hash them, loads none.

    Raises:
        UsageError: anything that the configuration names is missing or unfit, or no document gives a row.
    """
    planned = _planned(config, weights=True)
    for note in notes(planned.plan):
        logger.warning(note)
    return planned


def estimate(config: ExtractConfig, *, tokens_per_second: float | None = None) -> Estimate:
    """Tell what an extraction will take. Loads and hashes no weights.

    Args:
        tokens_per_second: rate to assume; default: the one measured by the last extraction with this teacher here.

    Raises:
        UsageError: as `build_plan`.
    """
    planned = _planned(config, weights=False)
    plan, sample = planned.plan, planned.sample
    rate = tokens_per_second if tokens_per_second is not None else read_rate(planned.rate_key)
    source = "given" if tokens_per_second is not None else "measured"
    tokens, rows = planned.scaled(sample.tokens), planned.scaled(sample.rows)
    per_row = bytes_per_row(plan.target, config.codec)
    fixed = len(encode_remap(planned.remap)) + sum(map(stored_size, planned.tokenizer_files.values()))
    return Estimate(
        documents=plan.documents,
        heldout_documents=sum(plan.heldout.holds_out(number) for number in range(plan.documents)),
        tokens=tokens,
        rows=rows,
        exact=sample.documents == plan.documents,
        shards=len(plan.shards()),
        contents=plan.target.describe(),
        bytes_per_row=per_row,
        bytes=round(rows * per_row) + fixed,
        at_most=is_bound(plan.target, config.codec),
        tokens_per_second=rate,
        rate_source=None if rate is None else source,
        seconds=None if rate is None else tokens / rate,
        teacher=planned.model.name,
        device=str(planned.device),
        dtype=dtype_name(planned.dtype),
        notes=(*notes(plan), *planned.notes),
    )


def bytes_per_row(target: TargetSpec, codec: str = DEFAULT_CODEC) -> float:
    """Estimate the bytes that a stored row takes, everything included; the most that it can take if `is_bound`."""
    plain = 0  # numbers of another codec than the measured one, as if they did not compress
    if codec != DEFAULT_CODEC:
        plain = NUMBERS_OF_ROW * CODECS[codec].row_dtype.itemsize + target.k * CODECS[codec].dtype.itemsize
    if target.k == 0:
        return BYTES_PER_ROW + BYTES_PER_DRAW * target.draws + plain
    head = BYTES_PER_HEAD + BYTES_PER_HEAD_ENTRY * target.k
    others = BYTES_PER_TAIL_DRAW * target.draws + BYTES_PER_TEMPERATURE * len(target.temperatures)
    return BYTES_PER_ROW + head + others + plain


def is_bound(target: TargetSpec, codec: str = DEFAULT_CODEC) -> bool:
    """Tell whether `bytes_per_row` is a bound.

    It is where heads end at a mass, for only the teacher tells after how many entries, and with another codec than the
    measured one, whose numbers are counted as if they did not compress.
    """
    return target.p is not None or codec != DEFAULT_CODEC


def _planned(config: ExtractConfig, *, weights: bool) -> Extraction:
    """Open, check and sample what the configuration names; `weights`: hash them too, for a plan that is kept."""
    if not KINDS[config.target.kind].from_candidates:
        otherwise = f", or target.kind: {' or '.join(name for name, kind in KINDS.items() if kind.from_candidates)}"
        task = f"target.kind: {config.target.kind}"
        require_hidden_states(config.teacher.backend, task, key="teacher.backend", otherwise=otherwise)
    reading = open_reading(config.corpus, config.rendering, config.teacher, weights=weights)
    model, vocab_size, target = reading.model, reading.vocab_size, config.target.spec()
    require_k(target.k, vocab_size, key="target.k")
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.teacher.dtype, device)
    sample = take_sample(reading.corpus, reading.tokenizer, reading.rendering)
    facts = facts_for_plan(reading.corpus, reading.tokenizer, reading.rendering) if weights else frozenset()
    states: tuple[FileState, ...] = ()
    teacher: dict[str, Json] = {}
    if weights:
        states = file_states(model)  # before they are hashed: what changes later is not what was hashed
        teacher = teacher_identity(
            model,
            reading.model_config,
            backend=config.teacher.backend,
            dtype=dtype,
            attention=reading.attention,
        )
    files = tokenizer_files(model.directory)
    remap = build_remap(sample.counts)
    batching = resolve_batching(
        _number(config.batch_size),
        _number(config.chunk_size),
        vocab_size=vocab_size,
        device=device,
        length_borders=tuple(at for at in length_borders(reading.model_config) if at < reading.rendering.window),
    )
    plan = Plan(
        teacher=teacher,
        tokenizer=tokenizer_identity(reading.tokenizer, files, vocab_size),
        vocab_size=vocab_size,
        corpus=tuple(source.identity for source in reading.corpus.sources),
        documents=len(reading.corpus),
        rendering=reading.rendering.to_plan(facts),
        target=target,
        heldout=HeldoutRule(fraction=config.heldout.fraction, seed=config.heldout.seed),
        documents_per_shard=_number(config.documents_per_shard)
        or _documents_per_shard(sample, config.heldout.fraction),
        batching=batching.to_plan(),
        codecs={"logprob": CODECS[config.codec]().parameters()},
        remap_sha256=remap_sha256(remap),
        recorded=_recorded(reading, device),
    )
    require_fit(plan, sample.sequences * plan.documents // sample.documents)
    return Extraction(
        plan=plan,
        corpus=reading.corpus,
        tokenizer=reading.tokenizer,
        rendering=reading.rendering,
        model=model,
        device=device,
        dtype=dtype,
        batching=batching,
        sample=sample,
        remap=remap,
        tokenizer_files=files,
        notes=sample.tally.sentences(
            special_names(reading.tokenizer), scale=len(reading.corpus) / sample.documents, met=facts
        ),
        teacher_files=states,
    )


def _documents_per_shard(sample: Sample, heldout_fraction: float) -> int:
    training_rows_per_document = sample.rows / sample.documents * (1.0 - heldout_fraction)
    return max(1, round(ROWS_PER_SHARD / training_rows_per_document))


def _number(value: int | str) -> int | None:
    """Turn the configuration's `auto` into None."""
    return value if isinstance(value, int) else None


def _recorded(reading: Reading, device: torch.device) -> dict[str, Json]:
    return {
        "teacher": reading.model.recorded(),
        "corpus": [dict(source.recorded) for source in reading.corpus.sources],
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"
