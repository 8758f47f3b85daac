"""Students against the live teacher, over the full vocabulary, on documents that a store holds out.

Data path: held-out documents of a store -> teacher and students, one after another -> **scores**. One model body is in
memory at a time; hidden states and heads of all stay, so that each chunk of positions is scored for all models at once
and the teacher's distribution is formed once. `max_tokens` bounds the hidden states (tokens x width x 4 bytes a model).

Shape suffixes: B sequences, T tokens, N positions, C positions of a chunk, D hidden width, V real tokens.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.reading import require_hidden_states
from pipeline.runs import warn_if_trained_on
from stages.batches.sequences import lengths, part
from stages.devices import resolve_device, resolve_dtype
from stages.models.files import ModelDirectory, file_hashes, find_model, load_config, recorded_model, require_positions
from stages.models.head import Head
from stages.models.load import attention_for
from stages.models.probe import length_borders, require_lengths_apart
from stages.student.identity import compare_tokenizers, read_tokenizer
from stages.teacher import BACKENDS, REFERENCE
from stages.teacher.backend import CandidateTeacher
from stages.training.run import RunDirectory
from storage.errors import IdentityError, UsageError
from storage.plan import Plan
from storage.reader import StoreReader
from storage.rows import SequenceBatch

logger = logging.getLogger("topk_distill.evaluate")

BINS = 15
RESAMPLES = 2_000
_TOKENS_PER_FORWARD = 4_096
_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Bin:
    """One bin of a reliability diagram: mean confidence, share of right answers, number of positions."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How a model does on held-out text. Means per position.

    Attributes:
        nll: negative log-likelihood of the token that follows, nats.
        ece: expected calibration error of the likeliest token against the one that follows, 15 equal bins (Guo et al.
            2017).
        calibration: those bins, empty ones left out.
        kl: KL(teacher || model) over the full vocabulary, nats; None for the teacher.
        top1_agreement: share of positions where model and teacher find the same token likeliest; None for the teacher.
        top1_agreement_interval: 95% bootstrap interval over documents.
        tokens: positions scored.
        seconds: loading and forward of this model; scoring is done for all at once and not counted.
    """

    nll: float
    ece: float
    calibration: tuple[Bin, ...]
    kl: float | None = None
    top1_agreement: float | None = None
    top1_agreement_interval: tuple[float, float] | None = None
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of the teacher and of each student by name, over the same positions of `documents` held-out documents.

    `warnings` names students that may have learned from some of those documents.
    """

    teacher: Scores
    students: Mapping[str, Scores]
    documents: int
    tokens: int
    store_digest: str
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for summary.json and --json."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Read:
    """What is left of a model after its body is gone: hidden states at the scored positions, and its head."""

    hidden_ND: Tensor
    head: Head
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Marks:
    """Numbers of one model at every position. `kl_N` and `agrees_N` are against the teacher."""

    nll_N: NDArray[np.float64]
    confidence_N: NDArray[np.float64]
    right_N: NDArray[np.bool_]
    kl_N: NDArray[np.float64]
    agrees_N: NDArray[np.bool_]


@torch.inference_mode()
def evaluate(
    store: Path,
    models: Mapping[str, Path],
    teacher: Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_tokens: int | None = 100_000,
) -> Evaluation:
    """Score students beside the teacher on the store's held-out documents.

    A warning names each run whose own rule did not hold all of them out.

    Args:
        store: its directory; sealed, with documents held out.
        models: run or model directory of each student by name.
        teacher: directory of the teacher; None: where the store says that it was.
        device: auto, cpu, cuda, cuda:1, mps.
        dtype: of the bodies' forward; auto: what the store was made with for the teacher, float32 for students on a
            CPU and the teacher's dtype elsewhere. Heads are always float32.
        max_tokens: tokens read at most; whole documents are kept, from the first on. None: all.

    Raises:
        UsageError: nothing is held out, there is no such model or its files are broken, or the store does not describe
            its teacher.
        IdentityError: not the store's teacher, or a student with another tokenizer.
        NumericsError, OutOfSpaceError: a model's logits are not finite, or it does not fit into memory.
    """
    reader = StoreReader(store, split="heldout")
    plan = reader.plan
    heldout = _heldout(reader, max_tokens)
    torch_device = resolve_device(device)
    teacher_dtype = resolve_dtype(str(_of_teacher(plan, "dtype")) if dtype == "auto" else dtype, torch_device)
    slim = dtype == "auto" and torch_device.type == "cpu"
    student_dtype = torch.float32 if slim else teacher_dtype

    backend = str(plan.teacher.get("backend", REFERENCE))
    require_hidden_states(backend, "evaluation", key="plan.json: teacher.backend")
    teacher_files = _check_teacher(plan, teacher)
    student_files = {name: find_model(str(model_directory(Path(path)))) for name, path in models.items()}
    tokenizer = read_tokenizer(reader.tokenizer_files())
    for files in student_files.values():
        compare_tokenizers(files.directory, tokenizer, where=str(files.directory))
    documents = np.unique(heldout.document).tolist()
    told = [warn_if_trained_on(Path(path), plan, documents) for path in models.values()]
    warnings = tuple(line for line in told if line is not None)
    for line in warnings:
        logger.warning("%s", line)
    of_teacher = _read(teacher_files, heldout, plan, torch_device, teacher_dtype, backend=backend)
    of_students = {
        name: _read(files, heldout, plan, torch_device, student_dtype, backend=REFERENCE)
        for name, files in student_files.items()
    }
    document_N = np.repeat(heldout.document, lengths(heldout))[heldout.has_row]
    teacher_marks, *student_marks = _score([of_teacher, *of_students.values()], _following(heldout, torch_device))
    return Evaluation(
        teacher=_summary(teacher_marks, document_N, of_teacher.seconds, against_teacher=False),
        students={
            name: _summary(marks, document_N, read.seconds, against_teacher=True)
            for (name, read), marks in zip(of_students.items(), student_marks, strict=True)
        },
        documents=len(documents),
        tokens=len(document_N),
        store_digest=reader.digest,
        warnings=warnings,
    )


def model_directory(path: Path) -> Path:
    """Return RUN/model if `path` is a run directory, else `path` itself.

    Raises:
        UsageError: the run is not finished, or there is no such directory.
        CorruptionError: something in the run is a link or a special file.
    """
    if os.path.lexists(path / "config.yaml") and not (path / "config.json").is_file():
        RunDirectory(path=path).require_plain()
        path = path / "model"
    if not (path / "config.json").is_file():
        raise UsageError(
            "there is no model here", where=str(path), fix="name a finished run or a Hugging Face model directory"
        )
    return path


def _heldout(reader: StoreReader, max_tokens: int | None) -> SequenceBatch:
    """Read whole held-out documents from the first on: at most `max_tokens` tokens, but at least one document."""
    if len(reader) == 0:
        raise UsageError(
            "the store holds no documents out",
            where="heldout.fraction",
            fix="extract a store with heldout.fraction > 0",
        )
    batch = reader.read(np.arange(len(reader)))
    if max_tokens is None or len(batch.tokens) <= max_tokens:
        return batch
    fits = int(np.searchsorted(batch.token_offset, max_tokens, side="right")) - 1
    # Back to the end of a document, or on to the end of the first.
    starts = np.flatnonzero(np.diff(batch.document)) + 1
    earlier = starts[starts <= fits]
    end = int(earlier[-1]) if len(earlier) else int(starts[0]) if len(starts) else len(batch)
    return part(batch, 0, end)


def _check_teacher(plan: Plan, given: Path | None) -> ModelDirectory:
    """Return the teacher's directory, proven by the hashes in the plan to be the store's teacher."""
    found = _recorded_teacher(plan) if given is None else find_model(str(given), key="--teacher")
    hashes = file_hashes(found)
    stored: Mapping[str, str] = _of_teacher(plan, "files")
    for name in sorted(stored.keys() | hashes.keys()):
        if stored.get(name) != hashes.get(name):
            raise IdentityError(
                f"not the store's teacher: {name} has sha256 {hashes.get(name)}, the store says {stored.get(name)}",
                where=str(found.directory),
                fix="name the directory of the teacher that the store was made with",
            )
    return found


def _recorded_teacher(plan: Plan) -> ModelDirectory:
    """Return the teacher's directory as the store has it: of this machine, never a name to ask the hub for."""
    try:
        return recorded_model(plan.recorded.get("teacher"))
    except UsageError as error:
        raise UsageError(
            f"the teacher is not where the store says that it was: {error.what}",
            where="plan.json: recorded.teacher.directory",
            fix="name its directory, or its name on the hub, with --teacher",
        ) from error


def _of_teacher(plan: Plan, key: str) -> Any:
    """Return what the plan says of the teacher. A plan that others wrote may say nothing."""
    if key not in plan.teacher:
        raise UsageError(
            f"the store does not say the {key} of its teacher, so no teacher can be proven to be the one",
            where=f"plan.json: teacher.{key}",
            fix="evaluate with a store that pipeline extract wrote from this teacher",
        )
    return plan.teacher[key]


def _read(
    files: ModelDirectory, heldout: SequenceBatch, plan: Plan, device: torch.device, dtype: torch.dtype, *, backend: str
) -> _Read:
    """Run a model over all sequences and keep the hidden states at positions with a row, in order."""
    began = time.perf_counter()
    # A store of eager attention may be of an architecture that knows no other.
    asked = "eager" if plan.teacher.get("attention") == "eager" else "sdpa"
    config, length_S = load_config(files), lengths(heldout)
    longest = int(length_S.max())
    if not getattr(config.get_text_config(), "rope_parameters", None):  # rotated positions have no end, tables have
        require_positions(config, longest, role="model", where=str(files.directory))
    attention = attention_for(config, asked, key="attention")
    load = BACKENDS[backend].load()
    model = load(files, vocab_size=plan.vocab_size, device=device, dtype=dtype, attention=attention, key=None)
    assert not isinstance(model, CandidateTeacher), "evaluate asks for a backend that gives hidden states"
    require_lengths_apart(model.model, longest, role="model", where=str(files.directory))
    kept: list[Tensor] = []
    for first, end in _forwards(length_S, length_borders(model.model.config)):
        batch = part(heldout, first, end)
        hidden_BTD = model.hidden(_padded(batch).to(device))
        rows = [hidden_BTD[index, :length] for index, length in enumerate(lengths(batch).tolist())]
        has_row = torch.from_numpy(np.ascontiguousarray(batch.has_row)).to(device)
        kept.append(torch.cat(rows)[has_row])
    return _Read(hidden_ND=torch.cat(kept), head=model.head, seconds=time.perf_counter() - began)


def _forwards(length_S: NDArray[np.int64], borders: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of neighbouring sequences on one side of each border whose padded size stays below a bound."""
    first, longest = 0, 0
    side_S = np.searchsorted(borders, length_S)
    for index, length in enumerate(length_S.tolist()):
        full = max(longest, length) * (index + 1 - first) > _TOKENS_PER_FORWARD
        if index > first and (full or side_S[index] != side_S[first]):
            yield first, index
            first, longest = index, 0
        longest = max(longest, length)
    yield first, len(length_S)


def _padded(batch: SequenceBatch) -> Tensor:
    """Return ids_BT, padded on the right: no position of a causal model sees what comes after it."""
    ids_BT = np.zeros((len(batch), int(lengths(batch).max())), dtype=np.int64)
    for index, (first, end) in enumerate(zip(batch.token_offset, batch.token_offset[1:], strict=False)):
        ids_BT[index, : end - first] = batch.tokens[first:end]
    return torch.from_numpy(ids_BT)


def _following(heldout: SequenceBatch, device: torch.device) -> Tensor:
    """Return the token that follows each scored position, int64 [N]."""
    following = np.flatnonzero(heldout.has_row) + 1
    return torch.from_numpy(heldout.tokens[following].astype(np.int64)).to(device)


def _score(reads: list[_Read], label_N: Tensor) -> list[_Marks]:
    """Mark every model; the first is the teacher."""
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in reads]
    for first in range(0, len(label_N), _CHUNK):
        span = slice(first, first + _CHUNK)
        teacher_CV = torch.log_softmax(reads[0].head(reads[0].hidden_ND[span]), dim=-1)
        teacher_p_CV = teacher_CV.exp()
        teacher_top_C = teacher_CV.argmax(-1)
        for index, read in enumerate(reads):
            logprob_CV = teacher_CV if index == 0 else torch.log_softmax(read.head(read.hidden_ND[span]), dim=-1)
            top_logprob_C, top_C = logprob_CV.max(-1)
            # Where the teacher has no mass the product is left out: 0 * -inf.
            kl_CV = torch.where(teacher_p_CV > 0, teacher_p_CV * (teacher_CV - logprob_CV), 0.0)
            nll_C = -logprob_CV.gather(-1, label_N[span, None])[:, 0]
            right_C, agrees_C = top_C == label_N[span], top_C == teacher_top_C
            parts[index].append((nll_C, top_logprob_C.exp(), right_C, kl_CV.sum(-1), agrees_C))
    return [_marks([torch.cat(column).cpu().numpy() for column in zip(*marks, strict=True)]) for marks in parts]


def _marks(columns: list[NDArray[Any]]) -> _Marks:
    nll_N, confidence_N, right_N, kl_N, agrees_N = columns
    return _Marks(
        nll_N=nll_N.astype(np.float64),
        confidence_N=confidence_N.astype(np.float64),
        right_N=right_N,
        kl_N=kl_N.astype(np.float64),
        agrees_N=agrees_N,
    )


def _summary(marks: _Marks, document_N: NDArray[np.int64], seconds: float, *, against_teacher: bool) -> Scores:
    bins = reliability(marks.confidence_N, marks.right_N)
    scores = Scores(
        nll=float(marks.nll_N.mean()),
        ece=sum(item.count * abs(item.confidence - item.accuracy) for item in bins) / len(document_N),
        calibration=bins,
        tokens=len(document_N),
        seconds=seconds,
    )
    if not against_teacher:
        return scores
    return Scores(
        **{
            **vars(scores),
            "kl": float(marks.kl_N.mean()),
            "top1_agreement": float(marks.agrees_N.mean()),
            "top1_agreement_interval": bootstrap_interval(marks.agrees_N, document_N),
        }
    )


def reliability(confidence_N: NDArray[np.float64], right_N: NDArray[np.bool_]) -> tuple[Bin, ...]:
    """Count positions by confidence in `BINS` equal bins of (0, 1], empty ones left out."""
    index_N = np.clip(np.ceil(confidence_N * BINS).astype(np.int64) - 1, 0, BINS - 1)
    bins = []
    for index in np.unique(index_N):
        inside = index_N == index
        confidence, accuracy = float(confidence_N[inside].mean()), float(right_N[inside].mean())
        bins.append(Bin(confidence=confidence, accuracy=accuracy, count=int(inside.sum())))
    return tuple(bins)


def bootstrap_interval(value_N: NDArray[Any], document_N: NDArray[np.int64], *, seed: int = 0) -> tuple[float, float]:
    """Return the 95% percentile interval of the mean of value_N, resampling whole documents (Davison and Hinkley 1997).

    Positions of one document are not independent; documents are.
    """
    _, index_N = np.unique(document_N, return_inverse=True)
    sum_M = np.bincount(index_N, weights=value_N.astype(np.float64))
    count_M = np.bincount(index_N)
    drawn = np.random.default_rng(seed).integers(0, len(sum_M), size=(RESAMPLES, len(sum_M)))
    means = sum_M[drawn].sum(1) / count_M[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
