"""From a configuration to a plan, and to an estimate of what it will take, without loading a weight.

Data path: configuration -> **survey -> plan** -> shards. The survey opens the corpus and the tokenizer and tokenises a
fixed sample of documents; the plan adds the teacher's file hashes, the estimate a rate.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config.extract import ExtractConfig
from pipeline.extraction.rates import RateKey, read_rate
from pipeline.extraction.survey import Survey, survey
from stages.corpus.tokenizer import tokenizer_files, tokenizer_identity
from stages.devices import dtype_name
from stages.input_files import FileState, file_sha256
from stages.models.files import file_states
from stages.teacher.backend import teacher_identity
from stages.teacher.batching import Batching, resolve_batching
from storage.codecs import CODECS, DEFAULT_CODEC
from storage.format.remap import build_remap, remap_sha256
from storage.plan import HeldoutRule, Plan, TargetSpec
from storage.values import Json

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
class PlannedExtraction:
    """A plan, and what is needed to carry it out.

    `teacher_files` are the teacher's files as they were before they were hashed.
    """

    plan: Plan
    survey: Survey
    batching: Batching
    remap: NDArray[np.uint32]
    tokenizer_files: dict[str, bytes]
    teacher_files: tuple[FileState, ...] = ()


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
        bytes_per_row, bytes: of the store, from measured sizes per entry.
        at_most: whether that is a bound, see `is_bound`.
        tokens_per_second: rate used, None if unknown.
        rate_source: `measured` by an earlier extraction with this teacher here, `given`, or None.
        seconds: None if the rate is unknown.
        teacher, device, dtype: what would run where.
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


def build_plan(config: ExtractConfig) -> PlannedExtraction:
    """Return the plan of an extraction, and what carries it out. Reads the weight files to hash them, loads none.

    Raises:
        UsageError: as `survey`.
    """
    found = survey(config, weights=True)
    states = file_states(found.reading.model)
    teacher = teacher_identity(
        found.reading.model,
        found.reading.model_config,
        backend=config.teacher.backend,
        dtype=found.dtype,
        attention=config.teacher.attention,
    )
    return replace(_planned(config, found, teacher), teacher_files=states)


def estimate(config: ExtractConfig, *, tokens_per_second: float | None = None) -> Estimate:
    """Tell what an extraction will take. Loads and hashes no weights.

    Args:
        tokens_per_second: rate to assume; default: the one measured by the last extraction with this teacher here.

    Raises:
        UsageError: as `survey`.
    """
    found = survey(config)
    plan = _planned(config, found, teacher={}).plan
    rate = tokens_per_second if tokens_per_second is not None else read_rate(rate_key(found))
    source = "given" if tokens_per_second is not None else "measured"
    tokens, rows = found.scaled(found.sample.tokens), found.scaled(found.sample.rows)
    per_row = bytes_per_row(plan.target, config.codec)
    return Estimate(
        documents=plan.documents,
        heldout_documents=sum(plan.heldout.holds_out(number) for number in range(plan.documents)),
        tokens=tokens,
        rows=rows,
        exact=found.is_exact,
        shards=len(plan.shards()),
        contents=plan.target.describe(),
        bytes_per_row=per_row,
        bytes=round(rows * per_row),
        at_most=is_bound(plan.target, config.codec),
        tokens_per_second=rate,
        rate_source=None if rate is None else source,
        seconds=None if rate is None else tokens / rate,
        teacher=found.reading.model.name,
        device=str(found.device),
        dtype=dtype_name(found.dtype),
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
    """Tell whether `bytes_per_row` is a bound: only the teacher tells where heads end that end at a mass, and only the
    numbers how well another codec's compress."""
    return target.p is not None or codec != DEFAULT_CODEC


def rate_key(found: Survey) -> RateKey:
    """Name what a measured rate belongs to: architecture, dtype, device, threads, window."""
    return RateKey(
        model_config=file_sha256(found.reading.model.directory / "config.json"),
        dtype=dtype_name(found.dtype),
        device=_device_name(found.device),
        threads=torch.get_num_threads(),
        window=found.reading.rendering.window,
    )


def _planned(config: ExtractConfig, found: Survey, teacher: dict[str, Json]) -> PlannedExtraction:
    files = tokenizer_files(found.reading.model.directory)
    batching = resolve_batching(
        _number(config.batch_size), _number(config.chunk_size), vocab_size=found.reading.vocab_size, device=found.device
    )
    target = config.target.spec()
    remap = build_remap(found.sample.counts)
    plan = Plan(
        teacher=teacher,
        tokenizer=tokenizer_identity(found.reading.tokenizer, files, found.reading.vocab_size),
        vocab_size=found.reading.vocab_size,
        corpus=tuple(source.identity for source in found.reading.corpus.sources),
        documents=len(found.reading.corpus),
        rendering=found.reading.rendering.to_plan(),
        target=target,
        heldout=HeldoutRule(fraction=config.heldout.fraction, seed=config.heldout.seed),
        documents_per_shard=_documents_per_shard(config, found),
        batching=batching.to_plan(),
        codecs={"logprob": CODECS[config.codec]().parameters()},
        remap_sha256=remap_sha256(remap),
        recorded=_recorded(found),
    )
    return PlannedExtraction(plan=plan, survey=found, batching=batching, remap=remap, tokenizer_files=files)


def _documents_per_shard(config: ExtractConfig, found: Survey) -> int:
    chosen = _number(config.documents_per_shard)
    if chosen is not None:
        return chosen
    training_rows_per_document = found.sample.rows / found.sample.documents * (1.0 - config.heldout.fraction)
    return max(1, round(ROWS_PER_SHARD / training_rows_per_document))


def _number(value: int | str) -> int | None:
    """Turn the configuration's `auto` into None."""
    return value if isinstance(value, int) else None


def _recorded(found: Survey) -> dict[str, Json]:
    return {
        "teacher": found.reading.model.recorded(),
        "corpus": [dict(source.recorded) for source in found.reading.corpus.sources],
        "device": _device_name(found.device),
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
