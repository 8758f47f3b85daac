"""Phase 2: a student learns from a store of teacher distributions, or from a live teacher on the same batches.

Reading order: `train` is the whole phase. The parts of a step lie in stages/batches (which tokens), stages/student
(which model), stages/losses (what is minimised) and stages/training (how weights move and are saved). Only
pipeline/training/data.py decides whether rows come from a store or from a live teacher.

The same configuration again resumes from the newest valid checkpoint; a finished run says so and does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pipeline.config.train import TrainConfig, spelled_out
from pipeline.runtime import stop_signals_noted
from pipeline.training.data import TrainingData, read_training_data
from pipeline.training.events import Event, Finished, Saved, Started, StepDone, Validated
from pipeline.training.processes import processes_of
from pipeline.training.recipe import Recipe, build_learner, card_facts
from pipeline.training.saving import Saving
from stages.batches.microbatch import MicroBatch
from stages.batches.steps import StepShape, evenly_spaced, prefetch, training_steps
from stages.devices import dtype_name
from stages.parallel.processes import Processes
from stages.student.model import Student
from stages.student.padding import weights_to_save
from stages.student.save import save_student
from stages.training.checkpoint import FRESH, Checkpoints, TrainingProgress
from stages.training.metrics import Metrics, MetricsLog, NoMetricsLog
from stages.training.optimizer import AdamWSettings, build_optimizer
from stages.training.run import Finish, RunDirectory
from stages.training.schedule import Schedule
from stages.training.step import Learner, optimizer_step, require_finite_weights, validate
from storage.errors import IdentityError

_SAMPLED = 16  # sequences at which a finished student is looked at


def train(config: TrainConfig) -> Iterator[Event]:
    """Train a student, yielding an event for each thing that happens.

    Raises:
        UsageError: a store, corpus, teacher or student does not exist, a sequence is longer than a micro-batch, the
            number of processes is not what `distributed` says, or their configurations differ.
        IdentityError: the student's tokenizer is not the teacher's, the run directory belongs to another run or to one
            that finished and lost its checkpoints, or the processes do not learn from the same data.
        CorruptionError: the store is damaged.
        NumericsError: loss, gradient or weights are not finite; the newest checkpoint is untouched.
        OutOfSpaceError, StorageUnavailableError: a checkpoint, the curve or the model cannot be written.
        PeerLostError: another process of the run has ended.
        StoppedError: a process of the run was asked to stop by a signal; a checkpoint of the step is saved.
    """
    run = RunDirectory(path=config.run)
    with processes_of(config) as processes:
        processes.on_main(run.require_own)  # before a corpus is read for long
        data = yield from read_training_data(config)
        processes.require_same(data.digest, "what they learn from")
        recipe = Recipe.of(config, data)
        checkpoints = Checkpoints(
            folder=run.checkpoints, store_digest=data.digest, keep=config.checkpoint.keep, processes=processes
        )
        with processes.main_holds(run.held()):
            begun = processes.on_main(lambda: _claim(config, data, recipe, run=run, checkpoints=checkpoints))
            if begun.step:
                recipe = Recipe.of(config, data, begun)
            finished = processes.on_main(lambda: _finished(config, recipe, begun, run=run))
            if finished is not None:
                yield _told(finished, run, already=True)
                return
            yield from _train(config, data, recipe, run=run, checkpoints=checkpoints)


def _claim(
    config: TrainConfig, data: TrainingData, recipe: Recipe, *, run: RunDirectory, checkpoints: Checkpoints
) -> TrainingProgress:
    """Claim the run directory for this run, or check that it is this run's; return where it stands."""
    # What dtype auto means here is part of the run: on another machine it may mean another one.
    dtype = dtype_name(recipe.dtype)
    run.begin(
        config.model_dump(mode="json") | {"dtype": dtype},
        data.record,
        spelled_out=lambda stored: _with_dtype(spelled_out(stored), dtype),
    )
    return FRESH if _ended(run, recipe) else checkpoints.newest()


def _ended(run: RunDirectory, recipe: Recipe) -> bool:
    """Tell whether the run has its model and stands where this recipe ends.

    With `epochs` that is a position: a run that was prolonged has more steps than one of that length from the start.
    """
    finished = run.finished()
    if finished is None or not run.has_model():
        return False
    if recipe.end is not None and finished.cursor is not None:
        return finished.cursor == recipe.end
    return finished.step == recipe.schedule.steps


def _finished(config: TrainConfig, recipe: Recipe, begun: TrainingProgress, *, run: RunDirectory) -> Finish | None:
    """Return the totals of the run if it is finished; else check that it can go on from where it stands."""
    finished = run.finished()
    if _ended(run, recipe):
        return finished
    if finished is not None and begun.step == 0:
        raise IdentityError(
            f"the run finished at step {finished.step}, but no whole checkpoint is left to go on from",
            where=str(run.checkpoints),
            fix="restore its checkpoints, or choose another run directory",
        )
    # After a checkpoint was lost, a finished run goes on from an older one: its model has seen more steps than that.
    steps_done = begun.step if finished is None else max(begun.step, finished.step)
    run.check_learning_rates(recipe.schedule, peak=config.optimizer.lr, done=steps_done)
    return None


def _with_dtype(stored: Mapping[str, Any], dtype: str) -> Mapping[str, Any]:
    """Replace `auto`, which the first runs kept instead of what it meant, by what it means here."""
    return {**stored, "dtype": dtype} if stored.get("dtype") == "auto" else stored


def _train(
    config: TrainConfig, data: TrainingData, recipe: Recipe, *, run: RunDirectory, checkpoints: Checkpoints
) -> Iterator[Event]:
    torch.manual_seed(config.seed)
    processes, schedule = checkpoints.processes, recipe.schedule
    learner = build_learner(config, data, recipe, processes)
    shape = replace(recipe.shape, length_borders=learner.length_borders)
    model = learner.student.model
    optimizer = build_optimizer(model, AdamWSettings(**config.optimizer.model_dump()))
    progress = checkpoints.resume(model, optimizer)
    heldout = evenly_spaced(data.heldout, config.validation.sequences, shape)
    ahead = training_steps(data.train, recipe.order, shape, cursor=progress.cursor, end=recipe.end)
    steps = islice(ahead, schedule.steps - progress.step)
    yield _started(config, data, student=learner.student, schedule=schedule, progress=progress)

    def validates(number: int) -> bool:
        return bool(heldout) and (number == schedule.steps or number % config.validation.every == 0)

    log = MetricsLog(run.metrics, last_step=progress.step) if processes.main else NoMetricsLog()
    with stop_signals_noted() as asked, log as metrics, closing(prefetch(steps)) as ready:
        saving = Saving(config.checkpoint, asked, processes)
        if validates(progress.step) and processes.on_main(lambda: metrics.validated) != progress.step > 0:
            yield _validate(config, learner, heldout, progress.step, metrics)  # it stopped there before it could
        began = time.perf_counter()
        for step in ready:
            number = progress.step + 1
            lr = config.optimizer.lr * schedule.factor(progress.step)
            learner = replace(learner, kd_ratio=recipe.kd_ratio.ratio(progress.step))
            wishes = saving.wishes(learner.student.device)
            losses, grad_norm = optimizer_step(
                learner, optimizer, step, lr=lr, clip_norm=config.clip_norm, number=number, riders=wishes
            )
            seconds = time.perf_counter() - began
            progress = TrainingProgress(
                step=number,
                cursor=step.cursor,
                tokens=progress.tokens + step.tokens,
                seconds=progress.seconds + seconds,
            )
            done = StepDone(
                **vars(losses),
                step=number,
                steps=schedule.steps,
                kd_ratio=learner.kd_ratio,
                lr=lr,
                grad_norm=grad_norm,
                tokens=step.tokens,
                rows=step.rows,
                seconds=seconds,
                tokens_per_second=step.tokens / seconds,
                seconds_left=progress.seconds / number * (schedule.steps - number),
            )
            metrics.write(_metrics_line("step", done))
            if saving.stops(wishes):
                saved = _save(checkpoints, model, optimizer, progress, metrics)  # first: who is told may be gone
                yield from (done, saved)
                raise saving.stopped(run.path, number)
            yield done

            if validates(number):
                yield _validate(config, learner, heldout, number, metrics)
            if number == schedule.steps or saving.saves(wishes, number) or saving.stops(wishes):
                yield _save(checkpoints, model, optimizer, progress, metrics)
                saving.saved()
                if number != schedule.steps and saving.stops(wishes):  # asked while it validated, or saved
                    raise saving.stopped(run.path, number)
            began = time.perf_counter()  # the next step's time includes waiting for its data
        # A signal from here on, or after the last step, finds the run saved: the model is finished first.
        yield _finish(config, data, learner.student, progress, shape=shape, run=run, processes=processes)


def _finish(
    config: TrainConfig,
    data: TrainingData,
    student: Student,
    progress: TrainingProgress,
    *,
    shape: StepShape,
    run: RunDirectory,
    processes: Processes,
) -> Finished:
    """Write RUN/model, and record that the run is finished."""
    require_finite_weights(student.model, progress.step)
    facts = card_facts(config, data, student, progress)
    sample = evenly_spaced(data.train, _SAMPLED, replace(shape, with_targets=False))
    weights = weights_to_save(student, sample, vocab_size=data.vocab_size, processes=processes)
    save_student(
        student.model,
        run.model,
        weights=weights,
        tokenizer_files=data.tokenizer_files,
        facts=facts,
        processes=processes,
    )
    totals = Finish(**asdict(progress))
    processes.on_main(lambda: run.finish(totals))
    return _told(totals, run, already=False)


def _told(totals: Finish, run: RunDirectory, *, already: bool) -> Finished:
    return Finished(
        step=totals.step, tokens=totals.tokens, seconds=totals.seconds, model=str(run.model), already=already
    )


def _save(
    checkpoints: Checkpoints, model: nn.Module, optimizer: Optimizer, progress: TrainingProgress, metrics: Metrics
) -> Saved:
    require_finite_weights(model, progress.step)
    metrics.sync()
    path = checkpoints.save(model, optimizer, progress)
    return Saved(step=progress.step, path=str(path))


def _validate(
    config: TrainConfig, learner: Learner, heldout: tuple[MicroBatch, ...], number: int, metrics: Metrics
) -> Validated:
    """Measure the held-out loss, at the configured kd_ratio, and write it down."""
    began = time.perf_counter()
    losses = validate(replace(learner, kd_ratio=config.kd_ratio), heldout, number=number)
    rows = sum(batch.rows for batch in heldout)
    validated = Validated(**vars(losses), step=number, rows=rows, seconds=time.perf_counter() - began)
    metrics.write(_metrics_line("validation", validated))
    return validated


def _started(
    config: TrainConfig, data: TrainingData, *, student: Student, schedule: Schedule, progress: TrainingProgress
) -> Started:
    return Started(
        run=str(config.run),
        parameters=student.parameters,
        steps=schedule.steps,
        step=progress.step,
        tokens=round(config.epochs * data.train.tokens) if config.epochs else schedule.steps * config.tokens_per_step,
        sequences=len(data.train),
        device=str(student.device),
        dtype=dtype_name(student.dtype),
    )


def _metrics_line(event: str, done: StepDone | Validated) -> dict[str, str | int | float | None]:
    """Return a line of metrics.jsonl: the event without what only progress needs."""
    values = {key: value for key, value in vars(done).items() if key not in ("steps", "seconds_left")}
    return {"event": event, **values}
