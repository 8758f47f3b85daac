"""What a training configuration means on given data: the objects that the loop in pipeline/train.py works with.

Data path: TrainConfig and TrainingData -> **student, loss, order of tokens, schedule** -> training loop.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig

from pipeline.config.base import section
from pipeline.config.loss import loss_fields
from pipeline.config.train import StudentConfig, TrainConfig
from pipeline.reading import position_limit
from pipeline.training.data import TrainingData
from stages.batches.microbatch import MicroBatch
from stages.batches.order import Order
from stages.batches.steps import StepShape, microbatches, steps_of_epochs
from stages.devices import resolve_device, resolve_dtype
from stages.input_files import unchanged
from stages.losses import FusedLinearKDLoss, KDLossConfig, SparseTargets
from stages.losses.engine.objective import Objective
from stages.losses.tail import prepare_teacher, resolve_tail
from stages.models.packed import use_packed_attention
from stages.parallel.processes import ALONE, Processes
from stages.parallel.tensor_parallel import cut_model
from stages.student.identity import check_tokenizer, check_vocabulary
from stages.student.model import Student
from stages.student.save import CardFacts
from stages.student.source import StudentSource, build_student
from stages.teacher.live import LiveTeacher
from stages.training.checkpoint import Progress
from stages.training.metrics import read_metrics
from stages.training.run import RunDirectory
from stages.training.schedule import RatioSchedule, Schedule
from stages.training.step import Learner
from storage.errors import IdentityError, UsageError
from storage.plan import TargetSpec
from storage.reader import StoreReader


def build_learner(config: TrainConfig, data: TrainingData, processes: Processes = ALONE) -> Learner:
    """The student on its device, checked against the data, the loss, and the live teacher of an online run.

    Several processes get a part of each model.

    Raises:
        UsageError: no such student, device, dtype or loss, or one that does not fit the data.
        IdentityError: the student's tokenizer is not the teacher's.
        NumericsError, OutOfSpaceError: the live teacher's logits are not finite, or it does not fit into memory.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    if dtype == torch.float16:
        raise UsageError(
            "float16 has too little range for gradients", where="dtype", fix="set dtype: bfloat16, float32 or auto"
        )
    source = StudentSource(**config.student.model_dump())
    with section("student", StudentConfig):
        same = check_tokenizer(source, data.tokenizer_files)
        model = build_student(source, seed=config.seed)
        check_vocabulary(model, data.vocab_size, same_tokenizer=same)
    _check_positions(data, model.config)
    model.to(device)  # type: ignore[arg-type]  # transformers types this method for its own decorator
    use_packed_attention(model, config.attention)
    if processes.mesh is not None:
        cut_model(model, processes.mesh)
    student = Student.of(model, dtype)
    loss = _loss(config, student, data.vocab_size)
    if config.kd_ratio > 0.0 and data.store is not None:
        _check_loss_fits(loss, data.store)
    teacher = _live_teacher(config, data, loss, device)
    if processes.mesh is not None and teacher is not None:
        teacher = teacher.cut(processes.mesh, len(student.weight_VD))
    return Learner(student=student, loss=loss, kd_ratio=config.kd_ratio, teacher=teacher)


def _check_positions(data: TrainingData, student: PretrainedConfig) -> None:
    limit = position_limit(student)
    if limit is None or data.window <= limit:
        return
    longest = int(data.train.lengths().max(initial=0))
    if longest > limit:
        raise UsageError(
            f"the longest sequence has {longest} tokens, the student knows {limit} positions",
            where="student.path",
            fix=f"choose a student with at least {longest} positions, or learn from windows of at most {limit} tokens",
        )


def _live_teacher(
    config: TrainConfig, data: TrainingData, loss: FusedLinearKDLoss, device: torch.device
) -> LiveTeacher | None:
    """The teacher of an online run on its device; None where stored rows, or nothing, stand in for it."""
    if data.teacher is None or config.teacher_model is None:
        return None
    if loss.objective.tail is not None:
        raise UsageError(
            f"tail {loss.objective.tail!r} is for stored rows: a live teacher has its whole vocabulary",
            where="loss.tail",
            fix="leave loss.tail out",
        )
    with unchanged(*data.teacher_files):  # what is loaded is what was hashed
        teacher = LiveTeacher.load(
            data.teacher,
            vocab_size=data.vocab_size,
            device=device,
            dtype=resolve_dtype(config.teacher_model.dtype, device),
            attention=config.teacher_model.attention,
            backend=config.teacher_model.backend,
        )
    return replace(teacher, files=data.teacher_files)


def _loss(config: TrainConfig, student: Student, vocab_size: int) -> FusedLinearKDLoss:
    """The configured divergence in its fused form, mixed with cross-entropy, on this student's logits."""
    chosen = KDLossConfig(**loss_fields(config.loss))
    fused = chosen.fused(
        chunk_size=chunk_rows(config, student.device),
        kd_ratio=config.kd_ratio,
        softcap=student.rule.softcap,
        logit_multiplier=student.rule.scale,
        vocab_size=vocab_size,
    )
    return FusedLinearKDLoss(**vars(fused))


def _check_loss_fits(loss: FusedLinearKDLoss, reader: StoreReader) -> None:
    """Try the loss on one row with what the store's rows hold.

    Raises:
        UsageError: the rows lack what temperature and tail policy need.
    """
    target, objective = reader.plan.target, loss.objective
    head, tail = min(target.k, 1), min(target.draws, 1)
    row = SparseTargets.from_ragged(
        ids=np.arange(head + tail),
        row_entries=np.array([head + tail]),
        head_size=np.array([head]),
        logprob=np.full(head, -1.0),
        count=np.full(tail, target.draws),
        tail_logit=np.full(1, 0.0 if head else np.inf),
        draws=target.draws,
        entropy=np.ones(1),
        next_logprob=np.zeros(1),
        tail_logit_by_temperature={at: np.full(1, -1.0) for at in target.temperatures},
        entropy_by_temperature={at: np.ones(1) for at in target.temperatures},
    )
    temperature = objective.temperature / objective.target_logits_scale
    policy = resolve_tail(objective.tail, objective.divergence, targets=row, temperature=temperature)
    try:
        label = torch.zeros(1, dtype=torch.int64)
        prepare_teacher(row, policy, temperature=temperature, labels_N=label, dtype=torch.float32)
    except ValueError as error:
        where, fix = _loss_advice(target, objective)
        raise UsageError(f"the store's rows do not fit the loss: {error}", where=where, fix=fix) from error


def _loss_advice(target: TargetSpec, objective: Objective) -> tuple[str, str]:
    """Say which key of the configuration asks for what the rows lack, and what to do."""
    scale, temperature = objective.target_logits_scale, objective.temperature
    stored = [1.0, *target.temperatures]
    if target.k == 0:
        off = {
            "loss.divergence": not objective.divergence.linear,
            "loss.temperature": temperature != 1.0,
            "loss.target_logits_scale": scale != 1.0,
            "loss.tail": objective.tail is not None,
        }
        keys = [key for key, differs in off.items() if differs]
        fix = f"leave out {', '.join(keys)}, or train on a store with an exact head, such as target.kind: hybrid"
        return keys[0], fix
    if temperature / scale in stored:
        return "loss.tail", "leave loss.tail out: the best policy that the store's rows allow is taken"
    where = "loss.target_logits_scale" if temperature == 1.0 else "loss.temperature"
    right = [1.0 / at if temperature == 1.0 else scale * at for at in stored]
    bare = ("renormalize", "renormalize_both") if objective.divergence.linear else ("renormalize_both",)
    values = " or ".join(str(value) for value in right)
    return where, f"set {where}: {values}, or loss.tail: {' or '.join(bare)}, which needs no stored tail"


def step_shape(config: TrainConfig, data: TrainingData, device: torch.device) -> StepShape:
    """How much a step and a micro-batch hold; a micro-batch always holds the longest training sequence.

    Raises:
        UsageError: the configured one does not.
    """
    if config.tokens_per_batch != "auto" and config.tokens_per_batch < data.window:
        longest = int(data.train.lengths().max(initial=0))
        if longest > config.tokens_per_batch:
            raise UsageError(
                f"the longest sequence has {longest} tokens, a micro-batch holds at most {config.tokens_per_batch}",
                where="tokens_per_batch",
                fix=f"set tokens_per_batch to at least {longest}",
            )
    fitting = max(min(config.tokens_per_step, 2_048 if device.type == "cpu" else 16_384), data.window)
    return StepShape(
        tokens_per_step=config.tokens_per_step,
        tokens_per_batch=fitting if config.tokens_per_batch == "auto" else config.tokens_per_batch,
        with_targets=config.kd_ratio > 0.0 and not data.online,
    )


def chunk_rows(config: TrainConfig, device: torch.device) -> int:
    """Positions whose logits exist at one time."""
    if config.chunk_size != "auto":
        return config.chunk_size
    return 256 if device.type == "cpu" else 2_048


def schedule_of(config: TrainConfig, data: TrainingData) -> Schedule:
    """The learning rate over all steps; epochs are turned into steps."""
    return Schedule(steps=_steps(config, data), **config.schedule.model_dump())


def kd_ratio_of(config: TrainConfig, schedule: Schedule) -> RatioSchedule:
    """The share of the divergence over all steps."""
    wanted = config.kd_ratio_schedule
    falls_with = schedule if wanted.fall_with_lr else None
    return RatioSchedule(peak=config.kd_ratio, warmup_steps=wanted.warmup_steps, falls_with=falls_with)


def order_of(config: TrainConfig, data: TrainingData) -> Order:
    """The order in which training sees the sequences."""
    return Order(sequences=len(data.train), seed=config.seed, digest=data.order_digest)


def _steps(config: TrainConfig, data: TrainingData) -> int:
    """Optimizer steps; of epochs, exactly as many as it takes to see every sequence that often."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None, "the configuration has one of steps and epochs"
    return steps_of_epochs(data.train.lengths(), order_of(config, data), config.tokens_per_step, config.epochs)


def check_learning_rates(config: TrainConfig, schedule: Schedule, *, run: RunDirectory, done: int) -> None:
    """A run may be prolonged, but not so that the steps already done would have had other learning rates.

    Args:
        config: of the command.
        schedule: of the command.
        run: its curve tells the learning rate of each step done, whatever the configurations were until now.
        done: steps done.

    Raises:
        IdentityError: they would.
        UsageError: the curve is damaged.
    """
    fix = "choose another run directory; with schedule constant, or wsd before its decay, a run can be prolonged"
    where = f"{config.run}, schedule: {config.schedule.kind}"
    if done > schedule.steps:
        raise IdentityError(f"{schedule.steps} steps are fewer than the {done} steps done", where=where, fix=fix)
    for line in read_metrics(run.metrics):
        step, had = line["step"], line.get("lr")
        if line.get("event") != "step" or not isinstance(step, int) or not 0 < step <= done:
            continue
        wanted = config.optimizer.lr * schedule.factor(step - 1)
        if had != wanted:
            raise IdentityError(
                f"{schedule.steps} steps would change the learning rates of the {done} steps done: "
                f"step {step} had {had}, would have {wanted}",
                where=where,
                fix=fix,
            )


def heldout_batches(config: TrainConfig, data: TrainingData, shape: StepShape) -> tuple[MicroBatch, ...]:
    """Evenly spaced held-out sequences, packed; none if nothing is held out."""
    count = min(config.validation.sequences, len(data.heldout))
    if count == 0:
        return ()
    read = data.heldout.read(np.arange(count) * len(data.heldout) // count, targets=shape.with_targets)
    batches = microbatches(read, shape)
    return tuple(batch for batch in batches if batch.rows)


def card_facts(config: TrainConfig, data: TrainingData, student: Student, progress: Progress) -> CardFacts:
    """What the model card says about the finished student."""
    fields = ", ".join(f"{key}={value}" for key, value in config.loss.items() if key != "name")
    divergence = f"{config.kd_ratio:g} * {config.loss.get('name', 'KDLoss')}({fields})"
    cross_entropy = f"{1.0 - config.kd_ratio:g} * cross-entropy"
    schedule = config.kd_ratio_schedule
    shares = [divergence] * (config.kd_ratio > 0.0) + [cross_entropy] * (config.kd_ratio < 1.0 or schedule.moves)
    scheduled = f" (kd_ratio {schedule.words})" if schedule.moves else ""
    layers = "" if config.student.layers is None else f", layers {config.student.layers}"
    return CardFacts(
        teacher=data.teacher_name,
        store_digest=data.digest,
        store_id=None if data.store is None else data.store.plan.store_id,
        initialisation=f"{config.student.init} of `{Path(config.student.path).name}`{layers}",
        loss=" + ".join(shares) + scheduled,
        parameters=student.parameters,
        steps=progress.step,
        tokens=progress.tokens,
    )
