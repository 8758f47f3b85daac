"""`pipeline train --dry-run`: what a run would take, from one micro-batch measured here and now."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pipeline.config.train import TrainConfig
from pipeline.training.data import TrainingData, open_training_data
from pipeline.training.processes import processes_of
from pipeline.training.recipe import Recipe, build_learner
from stages.batches.corpus import Tokenized
from stages.batches.microbatch import MicroBatch
from stages.batches.steps import training_steps
from stages.devices import dtype_name
from stages.parallel.processes import Processes
from stages.training.memory import memory_bytes
from stages.training.step import Learner


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """What a run would take. `memory_bytes` counts weights, gradients, moments, one micro-batch, one chunk of logits
    and a live teacher; `seconds` comes from one micro-batch measured here and now, without validation and checkpoints.
    `online`: sequences come from a corpus; `teacher_parameters` is None without a live teacher."""

    parameters: int
    steps: int
    tokens: int
    epochs: float
    sequences: int
    memory_bytes: int
    seconds: float
    device: str
    dtype: str
    online: bool
    teacher_parameters: int | None


def dry_run(config: TrainConfig, *, tell: Callable[[Tokenized], None] = lambda event: None) -> TrainingEstimate:
    """Build student and live teacher, measure one micro-batch, write nothing. Memory is that of this process.

    Args:
        tell: gets the events of a corpus that is tokenised.

    Raises:
        UsageError, IdentityError, CorruptionError, PeerLostError: as `train`.
    """
    with processes_of(config) as processes:
        return _estimate(config, open_training_data(config, tell), processes)


def _estimate(config: TrainConfig, data: TrainingData, processes: Processes) -> TrainingEstimate:
    processes.require_same(data.digest, "what they learn from")
    recipe = Recipe.of(config, data)
    learner = build_learner(config, data, recipe, processes)
    student = learner.student
    shape = replace(recipe.shape, length_borders=learner.length_borders)
    step = next(training_steps(data.train, recipe.order, shape, end=recipe.end))
    seconds = min(_timed(learner, step.batches[0]) for _ in range(2)) / step.batches[0].tokens
    tokens = recipe.schedule.steps * step.tokens if config.epochs is None else round(config.epochs * data.train.tokens)
    return TrainingEstimate(
        parameters=student.parameters,
        steps=recipe.schedule.steps,
        tokens=tokens,
        epochs=config.epochs or tokens / data.train.tokens,
        sequences=len(data.train),
        memory_bytes=memory_bytes(learner, recipe.shape.tokens_per_batch, recipe.chunk_size),
        seconds=seconds * tokens,
        device=str(student.device),
        dtype=dtype_name(student.dtype),
        online=data.online,
        teacher_parameters=None if learner.teacher is None else learner.teacher.parameters,
    )


def _timed(learner: Learner, batch: MicroBatch) -> float:
    """Return the seconds of one forward and backward pass."""
    began = time.perf_counter()
    learner.parts(batch, batch.rows).loss.backward()  # type: ignore[no-untyped-call]
    if learner.student.device.type == "cuda":
        torch.cuda.synchronize()
    learner.student.model.zero_grad(set_to_none=True)
    return time.perf_counter() - began
