"""Phase 2: a student learns from a store of teacher distributions.

Reading order: `train` is the whole phase. What its steps are made of lies in stages/batches (which tokens), stages/
student (which model), stages/losses (what is minimised) and stages/training (how weights move and are saved).

The same configuration again resumes from the newest valid checkpoint; a finished run says so and does nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from pipeline.config.train import TrainConfig
from stages.batches.microbatch import MicroBatch
from stages.batches.order import Order
from stages.batches.steps import StepShape, microbatches, prefetch, training_steps
from stages.devices import dtype_name, resolve_device, resolve_dtype
from stages.losses import FusedLinearKDLoss, KDLossConfig, build_loss_config
from stages.student.attention import use_packed_attention
from stages.student.identity import check_tokenizer, check_vocabulary
from stages.student.model import Student
from stages.student.save import CardFacts, save_student
from stages.student.source import StudentSource, build_student
from stages.training.checkpoint import Checkpoints, Progress
from stages.training.memory import memory_bytes
from stages.training.metrics import MetricsLog
from stages.training.optimizer import AdamWSettings, build_optimizer
from stages.training.run import Finish, RunDirectory
from stages.training.schedule import Schedule
from stages.training.step import Learner, optimizer_step, validate
from storage.errors import IdentityError, UsageError
from storage.reader import StoreReader


@dataclass(frozen=True, kw_only=True)
class Started:
    """Training begins or resumes. `tokens` is about what all steps together see; `step` are done already."""

    run: str
    parameters: int
    steps: int
    step: int
    tokens: int
    sequences: int
    device: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimizer step. Losses are means per target row in nats; `seconds_left` is None until it can be told."""

    step: int
    steps: int
    loss: float
    kd: float | None
    ce: float | None
    lr: float
    grad_norm: float
    tokens: int
    rows: int
    seconds: float
    tokens_per_second: float
    seconds_left: float | None


@dataclass(frozen=True, kw_only=True)
class Validated:
    """The same losses on held-out rows."""

    step: int
    loss: float
    kd: float | None
    ce: float | None
    rows: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint is on the disk."""

    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Finished:
    """RUN/model is complete. `already`: an earlier command finished it, this one did nothing."""

    step: int
    tokens: int
    seconds: float
    model: str
    already: bool


Event = Started | StepDone | Validated | Saved | Finished


def train(config: TrainConfig) -> Iterator[Event]:
    """Train a student, yielding an event for all that happens.

    Raises:
        UsageError: no store, no such student, sequences longer than a micro-batch.
        IdentityError: the student's tokenizer is not the store's, or the run directory belongs to another run.
        CorruptionError: the store is damaged.
        NumericsError: loss or gradient is not finite; the newest checkpoint is untouched.
        OutOfSpaceError, StorageUnavailableError: a checkpoint, the curve or the model cannot be written.
    """
    reader = StoreReader(config.store, allow_partial=config.allow_partial)
    run = RunDirectory(path=config.run)
    with run.held():
        schedule = _schedule(config, reader)
        began = run.begin(config.model_dump(mode="json"), _store_facts(config, reader))
        done = run.finished()
        if done is not None and done.step == schedule.steps:
            yield Finished(**asdict(done), model=str(run.model), already=True)
            return
        checkpoints = Checkpoints(folder=run.checkpoints, store_digest=reader.digest, keep=config.checkpoint.keep)
        _check_learning_rates(TrainConfig.model_validate(began), config, reader, checkpoints.newest_step())
        yield from _train(config, reader, run, checkpoints, schedule)


def _train(
    config: TrainConfig, reader: StoreReader, run: RunDirectory, checkpoints: Checkpoints, schedule: Schedule
) -> Iterator[Event]:
    torch.manual_seed(config.seed)
    learner = _learner(config, reader)
    student = learner.student
    optimizer = build_optimizer(student.model, AdamWSettings(**config.optimizer.model_dump()))
    progress = checkpoints.resume(student.model, optimizer)
    shape = _shape(config, reader, student.device)
    heldout = _heldout_batches(config, shape)
    order = Order(sequences=len(reader), seed=config.seed, digest=reader.digest)
    steps = islice(training_steps(reader, order, shape, cursor=progress.cursor), schedule.steps - progress.step)
    yield _started(config, reader, student, schedule, progress)

    with MetricsLog(run.metrics, last_step=progress.step) as metrics, closing(prefetch(steps)) as ready:
        for step in ready:
            began = time.perf_counter()
            number = progress.step + 1
            lr = config.optimizer.lr * schedule.factor(progress.step)
            losses, grad_norm = optimizer_step(
                learner, optimizer, step, lr=lr, clip_norm=config.clip_norm, number=number
            )
            seconds = time.perf_counter() - began
            progress = Progress(
                step=number,
                cursor=step.cursor,
                tokens=progress.tokens + step.tokens,
                seconds=progress.seconds + seconds,
            )
            done = StepDone(
                **vars(losses),
                step=number,
                steps=schedule.steps,
                lr=lr,
                grad_norm=grad_norm,
                tokens=step.tokens,
                rows=step.rows,
                seconds=seconds,
                tokens_per_second=step.tokens / seconds,
                seconds_left=progress.seconds / number * (schedule.steps - number),
            )
            metrics.write(_metrics_line("step", done))
            yield done

            last = number == schedule.steps
            if heldout and (last or number % config.validation.every == 0):
                validated = _validate(learner, heldout, number)
                metrics.write(_metrics_line("validation", validated))
                yield validated
            if last or number % config.checkpoint.every == 0:
                metrics.sync()
                path = checkpoints.save(student.model, optimizer, progress)
                yield Saved(step=number, path=str(path))

    facts = _card(config, reader, student, progress)
    save_student(student.model, run.model, tokenizer_files=reader.tokenizer_files(), facts=facts)
    run.finish(Finish(step=progress.step, tokens=progress.tokens, seconds=progress.seconds))
    yield Finished(
        step=progress.step, tokens=progress.tokens, seconds=progress.seconds, model=str(run.model), already=False
    )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run would take. `memory_bytes` counts weights, gradients, moments, one micro-batch and one chunk of
    logits; `seconds` comes from one micro-batch measured here and now, without validation and checkpoints."""

    parameters: int
    steps: int
    tokens: int
    epochs: float
    sequences: int
    memory_bytes: int
    seconds: float
    device: str
    dtype: str


def dry_run(config: TrainConfig) -> Estimate:
    """Build the student, measure one micro-batch, write nothing.

    Raises:
        UsageError, IdentityError, CorruptionError: as `train`.
    """
    reader = StoreReader(config.store, allow_partial=config.allow_partial)
    schedule = _schedule(config, reader)
    learner = _learner(config, reader)
    student = learner.student
    shape = _shape(config, reader, student.device)
    order = Order(sequences=len(reader), seed=config.seed, digest=reader.digest)
    step = next(training_steps(reader, order, shape))
    seconds = min(_timed(learner, step.batches[0]) for _ in range(2)) / step.batches[0].tokens
    tokens = schedule.steps * step.tokens
    return Estimate(
        parameters=student.parameters,
        steps=schedule.steps,
        tokens=tokens,
        epochs=tokens / reader.tokens,
        sequences=len(reader),
        memory_bytes=memory_bytes(student, shape.tokens_per_batch, _chunk_size(config, student.device)),
        seconds=seconds * tokens,
        device=str(student.device),
        dtype=dtype_name(student.dtype),
    )


def _learner(config: TrainConfig, reader: StoreReader) -> Learner:
    """The student on its device, checked against the store, and the loss."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    if dtype == torch.float16:
        raise UsageError(
            "float16 has too little range for gradients", where="dtype", fix="set dtype: bfloat16, float32 or auto"
        )
    source = StudentSource(**config.student.model_dump())
    same = check_tokenizer(source, reader.tokenizer_files())
    model = build_student(source, seed=config.seed)
    check_vocabulary(model, reader.plan.vocab_size, same_tokenizer=same)
    model.to(device)  # type: ignore[arg-type]  # transformers types this method for its own decorator
    use_packed_attention(model, config.attention)
    student = Student.of(model, dtype)
    return Learner(student=student, loss=_loss(config, student, reader.plan.vocab_size), kd_ratio=config.kd_ratio)


def _shape(config: TrainConfig, reader: StoreReader, device: torch.device) -> StepShape:
    window = int(reader.plan.rendering.get("window") or 0)
    fitting = max(min(config.tokens_per_step, 2_048 if device.type == "cpu" else 16_384), window)
    return StepShape(
        tokens_per_step=config.tokens_per_step,
        tokens_per_batch=fitting if config.tokens_per_batch == "auto" else config.tokens_per_batch,
        with_targets=config.kd_ratio > 0.0,
    )


def _chunk_size(config: TrainConfig, device: torch.device) -> int:
    if config.chunk_size != "auto":
        return config.chunk_size
    return 256 if device.type == "cpu" else 2_048


def _schedule(config: TrainConfig, reader: StoreReader) -> Schedule:
    return Schedule(steps=_steps(config, reader), **config.schedule.model_dump())


def _steps(config: TrainConfig, reader: StoreReader) -> int:
    """Optimizer steps. Sequences are never cut, so a step falls short of its bound by half a sequence on average."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None, "the configuration has one of steps and epochs"
    shortfall = reader.tokens / max(len(reader), 1) / 2
    filled = max(config.tokens_per_step - shortfall, config.tokens_per_step / 2)
    return max(1, math.ceil(config.epochs * reader.tokens / filled))


def _heldout_batches(config: TrainConfig, shape: StepShape) -> tuple[MicroBatch, ...]:
    """Evenly spaced held-out sequences, packed; none if the store holds none out."""
    heldout = StoreReader(config.store, split="heldout", allow_partial=config.allow_partial)
    count = min(config.validation.sequences, len(heldout))
    if count == 0:
        return ()
    batches = microbatches(heldout.read(np.arange(count) * len(heldout) // count), shape)
    return tuple(batch for batch in batches if batch.rows)


def _check_learning_rates(began: TrainConfig, config: TrainConfig, reader: StoreReader, done: int) -> None:
    """A run may be prolonged, but not so that the steps already done would have had other learning rates."""
    before, now = _schedule(began, reader), _schedule(config, reader)
    if any(before.factor(step) != now.factor(step) for step in range(min(done, now.steps))) or done > now.steps:
        raise IdentityError(
            f"{now.steps} steps instead of {before.steps} would change the learning rates of the {done} steps done",
            where=f"{config.run}, schedule: {config.schedule.kind}",
            fix="choose another run directory; with schedule constant, or wsd before its decay, a run can be prolonged",
        )


def _store_facts(config: TrainConfig, reader: StoreReader) -> dict[str, object]:
    recorded = reader.plan.recorded.get("teacher", {})
    return {
        "digest": reader.digest,
        "id": reader.plan.store_id,
        "path": str(Path(config.store).absolute()),
        "teacher": recorded,
    }


def _validate(learner: Learner, heldout: tuple[MicroBatch, ...], number: int) -> Validated:
    began = time.perf_counter()
    losses = validate(learner, heldout)
    rows = sum(batch.rows for batch in heldout)
    return Validated(**vars(losses), step=number, rows=rows, seconds=time.perf_counter() - began)


def _started(
    config: TrainConfig, reader: StoreReader, student: Student, schedule: Schedule, progress: Progress
) -> Started:
    return Started(
        run=str(config.run),
        parameters=student.parameters,
        steps=schedule.steps,
        step=progress.step,
        tokens=schedule.steps * config.tokens_per_step,
        sequences=len(reader),
        device=str(student.device),
        dtype=dtype_name(student.dtype),
    )


def _card(config: TrainConfig, reader: StoreReader, student: Student, progress: Progress) -> CardFacts:
    fields = ", ".join(f"{key}={value}" for key, value in config.loss.items() if key != "name")
    divergence = f"{config.kd_ratio:g} * {config.loss.get('name', 'KDLoss')}({fields})"
    cross_entropy = f"{1.0 - config.kd_ratio:g} * cross-entropy"
    shares = [divergence] * (config.kd_ratio > 0.0) + [cross_entropy] * (config.kd_ratio < 1.0)
    layers = "" if config.student.layers is None else f", layers {config.student.layers}"
    return CardFacts(
        teacher=_teacher_name(reader),
        store_digest=reader.digest,
        store_id=reader.plan.store_id,
        initialisation=f"{config.student.init} of `{Path(config.student.path).name}`{layers}",
        loss=" + ".join(shares),
        parameters=student.parameters,
        steps=progress.step,
        tokens=progress.tokens,
    )


def _loss(config: TrainConfig, student: Student, vocab_size: int) -> FusedLinearKDLoss:
    """The configured divergence in its fused form, mixed with cross-entropy, on this student's logits."""
    fields = dict(config.loss)
    chosen = build_loss_config(fields.pop("name", "KDLoss"), **fields)
    if not isinstance(chosen, KDLossConfig):
        raise UsageError(
            f"a store trains with KDLoss, not with {type(chosen).__name__}",
            where="loss.name",
            fix="set loss.name: KDLoss; kd_ratio: 0 is cross-entropy alone",
        )
    fused = chosen.fused(
        chunk_size=_chunk_size(config, student.device),
        kd_ratio=config.kd_ratio,
        softcap=student.rule.softcap,
        logit_multiplier=student.rule.scale,
        vocab_size=vocab_size,
    )
    return FusedLinearKDLoss(**vars(fused))


def _metrics_line(event: str, done: StepDone | Validated) -> dict[str, str | int | float | None]:
    """A line of metrics.jsonl: the event without what only progress needs."""
    values = {key: value for key, value in vars(done).items() if key not in ("steps", "seconds_left")}
    return {"event": event, **values}


def _teacher_name(reader: StoreReader) -> str:
    """As the user knows it; of a local directory only its own name, which says nothing about this machine."""
    name = str(reader.plan.recorded.get("teacher", {}).get("name", "an unnamed teacher"))
    return Path(name).name if Path(name).is_absolute() else name


def _timed(learner: Learner, batch: MicroBatch) -> float:
    """Seconds of one forward and backward pass."""
    began = time.perf_counter()
    learner.parts(batch, batch.rows).loss.backward()  # type: ignore[no-untyped-call]
    if learner.student.device.type == "cuda":
        torch.cuda.synchronize()
    learner.student.model.zero_grad(set_to_none=True)
    return time.perf_counter() - began
