"""Phase 2: a student learns from a store of teacher distributions.

Reading order: `train` is the whole phase. What its steps are made of lies in stages/batches (which tokens), stages/
student (which model), stages/losses (what is minimised) and stages/training (how weights move and are saved).

The same configuration again resumes from the newest valid checkpoint; a finished run says so and does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice

import torch

from pipeline.config.train import TrainConfig
from pipeline.recipe import (
    build_learner,
    card_facts,
    check_learning_rates,
    chunk_rows,
    heldout_batches,
    order_of,
    schedule_of,
    step_shape,
    store_facts,
)
from stages.batches.microbatch import MicroBatch
from stages.batches.steps import prefetch, training_steps
from stages.devices import dtype_name
from stages.student.model import Student
from stages.student.save import save_student
from stages.training.checkpoint import Checkpoints, Progress
from stages.training.memory import memory_bytes
from stages.training.metrics import MetricsLog
from stages.training.optimizer import AdamWSettings, build_optimizer
from stages.training.run import Finish, RunDirectory
from stages.training.schedule import Schedule
from stages.training.step import Learner, optimizer_step, require_finite_weights, validate
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
        NumericsError: loss, gradient or weights are not finite; the newest checkpoint is untouched.
        OutOfSpaceError, StorageUnavailableError: a checkpoint, the curve or the model cannot be written.
    """
    reader = StoreReader(config.store, allow_partial=config.allow_partial)
    run = RunDirectory(path=config.run)
    with run.held():
        schedule = schedule_of(config, reader)
        run.begin(config.model_dump(mode="json"), store_facts(config, reader))
        done = run.finished()
        if done is not None and done.step == schedule.steps:
            yield Finished(**asdict(done), model=str(run.model), already=True)
            return
        checkpoints = Checkpoints(folder=run.checkpoints, store_digest=reader.digest, keep=config.checkpoint.keep)
        check_learning_rates(config, schedule, run, checkpoints.newest_step())
        yield from _train(config, reader, run, checkpoints, schedule)


def _train(
    config: TrainConfig, reader: StoreReader, run: RunDirectory, checkpoints: Checkpoints, schedule: Schedule
) -> Iterator[Event]:
    torch.manual_seed(config.seed)
    learner = build_learner(config, reader)
    student = learner.student
    optimizer = build_optimizer(student.model, AdamWSettings(**config.optimizer.model_dump()))
    progress = checkpoints.resume(student.model, optimizer)
    shape = step_shape(config, reader, student.device)
    heldout = heldout_batches(config, shape)
    order = order_of(config, reader)
    steps = islice(training_steps(reader, order, shape, cursor=progress.cursor), schedule.steps - progress.step)
    yield _started(config, reader, student, schedule, progress)

    with MetricsLog(run.metrics, last_step=progress.step) as metrics, closing(prefetch(steps)) as ready:
        began = time.perf_counter()
        for step in ready:
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
                require_finite_weights(student.model, number)
                metrics.sync()
                path = checkpoints.save(student.model, optimizer, progress)
                yield Saved(step=number, path=str(path))
            began = time.perf_counter()  # the next step's time includes waiting for its data

    require_finite_weights(student.model, progress.step)
    facts = card_facts(config, reader, student, progress)
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
    schedule = schedule_of(config, reader)
    learner = build_learner(config, reader)
    student = learner.student
    shape = step_shape(config, reader, student.device)
    order = order_of(config, reader)
    step = next(training_steps(reader, order, shape))
    seconds = min(_timed(learner, step.batches[0]) for _ in range(2)) / step.batches[0].tokens
    tokens = schedule.steps * step.tokens
    return Estimate(
        parameters=student.parameters,
        steps=schedule.steps,
        tokens=tokens,
        epochs=tokens / reader.tokens,
        sequences=len(reader),
        memory_bytes=memory_bytes(student, shape.tokens_per_batch, chunk_rows(config, student.device)),
        seconds=seconds * tokens,
        device=str(student.device),
        dtype=dtype_name(student.dtype),
    )


def _validate(learner: Learner, heldout: tuple[MicroBatch, ...], number: int) -> Validated:
    began = time.perf_counter()
    losses = validate(learner, heldout, number=number)
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


def _metrics_line(event: str, done: StepDone | Validated) -> dict[str, str | int | float | None]:
    """A line of metrics.jsonl: the event without what only progress needs."""
    values = {key: value for key, value in vars(done).items() if key not in ("steps", "seconds_left")}
    return {"event": event, **values}


def _timed(learner: Learner, batch: MicroBatch) -> float:
    """Seconds of one forward and backward pass."""
    began = time.perf_counter()
    learner.parts(batch, batch.rows).loss.backward()  # type: ignore[no-untyped-call]
    if learner.student.device.type == "cuda":
        torch.cuda.synchronize()
    learner.student.model.zero_grad(set_to_none=True)
    return time.perf_counter() - began
