"""What a training configuration means on a given store: the objects that the loop in pipeline/train.py works with.

Data path: TrainConfig and store -> **student, loss, order of tokens, schedule** -> training loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from pipeline.config.train import TrainConfig
from stages.batches.microbatch import MicroBatch
from stages.batches.steps import StepShape, microbatches
from stages.devices import resolve_device, resolve_dtype
from stages.losses import FusedLinearKDLoss, KDLossConfig, build_loss_config
from stages.student.attention import use_packed_attention
from stages.student.identity import check_tokenizer, check_vocabulary
from stages.student.model import Student
from stages.student.save import CardFacts
from stages.student.source import StudentSource, build_student
from stages.training.checkpoint import Checkpoints, Progress
from stages.training.schedule import Schedule
from stages.training.step import Learner
from storage.errors import IdentityError, UsageError
from storage.reader import StoreReader


def build_learner(config: TrainConfig, reader: StoreReader) -> Learner:
    """The student on its device, checked against the store, and the loss.

    Raises:
        UsageError: no such student, device, dtype or loss, or one that does not fit the store.
        IdentityError: the student's tokenizer is not the store's.
    """
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
        chunk_size=chunk_rows(config, student.device),
        kd_ratio=config.kd_ratio,
        softcap=student.rule.softcap,
        logit_multiplier=student.rule.scale,
        vocab_size=vocab_size,
    )
    return FusedLinearKDLoss(**vars(fused))


def step_shape(config: TrainConfig, reader: StoreReader, device: torch.device) -> StepShape:
    """How much a step and a micro-batch hold; a micro-batch always holds the store's longest sequence."""
    window = int(reader.plan.rendering.get("window") or 0)
    fitting = max(min(config.tokens_per_step, 2_048 if device.type == "cpu" else 16_384), window)
    return StepShape(
        tokens_per_step=config.tokens_per_step,
        tokens_per_batch=fitting if config.tokens_per_batch == "auto" else config.tokens_per_batch,
        with_targets=config.kd_ratio > 0.0,
    )


def chunk_rows(config: TrainConfig, device: torch.device) -> int:
    """Positions whose logits exist at one time."""
    if config.chunk_size != "auto":
        return config.chunk_size
    return 256 if device.type == "cpu" else 2_048


def schedule_of(config: TrainConfig, reader: StoreReader) -> Schedule:
    """The learning rate over all steps; epochs are turned into steps."""
    return Schedule(steps=_steps(config, reader), **config.schedule.model_dump())


def _steps(config: TrainConfig, reader: StoreReader) -> int:
    """Optimizer steps. Sequences are never cut, so a step falls short of its bound by half a sequence on average."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None, "the configuration has one of steps and epochs"
    shortfall = reader.tokens / max(len(reader), 1) / 2
    filled = max(config.tokens_per_step - shortfall, config.tokens_per_step / 2)
    return max(1, math.ceil(config.epochs * reader.tokens / filled))


def check_learning_rates(
    began: Mapping[str, Any], config: TrainConfig, reader: StoreReader, checkpoints: Checkpoints
) -> None:
    """A run may be prolonged, but not so that the steps already done would have had other learning rates.

    Args:
        began: the configuration that the run began with, as plain values.
        config: of the command.
        reader: the store, which turns epochs into steps.
        checkpoints: of the run; the newest valid one says how many steps are done.

    Raises:
        IdentityError: they would.
        UsageError: the configuration kept in the run directory is not one any more.
    """
    try:
        before = schedule_of(TrainConfig.model_validate(began), reader)
    except ValidationError as error:
        raise UsageError(
            f"not a training configuration: {error.errors()[0]['msg']}",
            where=f"{config.run}/config.yaml",
            fix="restore it, or choose another run directory",
        ) from error
    now = schedule_of(config, reader)
    if before == now:
        return
    done = checkpoints.newest_step()
    if done > now.steps or any(before.factor(step) != now.factor(step) for step in range(done)):
        raise IdentityError(
            f"{now.steps} steps instead of {before.steps} would change the learning rates of the {done} steps done",
            where=f"{config.run}, schedule: {config.schedule.kind}",
            fix="choose another run directory; with schedule constant, or wsd before its decay, a run can be prolonged",
        )


def heldout_batches(config: TrainConfig, shape: StepShape) -> tuple[MicroBatch, ...]:
    """Evenly spaced held-out sequences, packed; none if the store holds none out."""
    heldout = StoreReader(config.store, split="heldout", allow_partial=config.allow_partial)
    count = min(config.validation.sequences, len(heldout))
    if count == 0:
        return ()
    batches = microbatches(heldout.read(np.arange(count) * len(heldout) // count), shape)
    return tuple(batch for batch in batches if batch.rows)


def store_facts(config: TrainConfig, reader: StoreReader) -> dict[str, object]:
    """What the run records about its store: digest and id, where it was, and the teacher."""
    recorded = reader.plan.recorded.get("teacher", {})
    return {
        "digest": reader.digest,
        "id": reader.plan.store_id,
        "path": str(Path(config.store).absolute()),
        "teacher": recorded,
    }


def card_facts(config: TrainConfig, reader: StoreReader, student: Student, progress: Progress) -> CardFacts:
    """What the model card says about the finished student."""
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


def _teacher_name(reader: StoreReader) -> str:
    """As the user knows it; of a local directory only its own name, which says nothing about this machine."""
    name = str(reader.plan.recorded.get("teacher", {}).get("name", "an unnamed teacher"))
    return Path(name).name if Path(name).is_absolute() else name
