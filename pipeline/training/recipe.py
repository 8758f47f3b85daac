"""What a training configuration means on given data, and the student that learns by it.

Data path: TrainConfig and TrainingData -> **recipe -> student, loss, live teacher** -> the loop in pipeline/train.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.config.base import section
from pipeline.config.loss import loss_fields
from pipeline.config.train import DistributedConfig, StudentConfig, TrainConfig
from pipeline.training.data import TrainingData
from stages.batches.order import Order
from stages.batches.steps import StepShape, end_of_epochs, steps_of_epochs
from stages.devices import resolve_device, resolve_dtype
from stages.input_files import unchanged
from stages.losses import FusedLinearKDLoss, KDLossConfig
from stages.losses.fit import misfit
from stages.models.head import Head, HeadRule
from stages.models.load import attention_for
from stages.models.packed import PackLengths, use_packed_attention
from stages.models.probe import require_own_logits
from stages.models.special_tokens import adopt_special_tokens
from stages.parallel.processes import ALONE, Processes
from stages.parallel.tensor_parallel import cut_model
from stages.student.identity import check_positions, check_tokenizer, check_vocabulary, read_tokenizer
from stages.student.model import Student, head_layer, warn_of_experts
from stages.student.save import CardFacts
from stages.student.source import StudentSource, build_student
from stages.teacher import BACKENDS
from stages.teacher.live import LiveTeacher
from stages.training.checkpoint import FRESH, TrainingProgress
from stages.training.schedule import RatioSchedule, Schedule
from stages.training.step import Learner
from storage.errors import UsageError
from storage.target import TargetSpec


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a configuration means on given data, before any weight is loaded: made once, handed on as it is.

    Attributes:
        device, dtype: of the student's forward.
        order: in which training sees the sequences.
        shape: how much a step and a micro-batch hold.
        schedule: learning rate over all steps.
        end: position of the order at which the last pass ends, and with it the last step; None: steps alone count.
        kd_ratio: share of the divergence over all steps.
        chunk_size: positions whose logits exist at one time.
    """

    device: torch.device
    dtype: torch.dtype
    order: Order
    shape: StepShape
    schedule: Schedule
    end: int | None
    kd_ratio: RatioSchedule
    chunk_size: int

    @classmethod
    def of(cls, config: TrainConfig, data: TrainingData, begun: TrainingProgress = FRESH) -> Recipe:
        """Work out the recipe.

        Args:
            config: of the command.
            data: what is learned from.
            begun: where the run stands from which it goes on.

        Raises:
            UsageError: no such device or dtype, or a micro-batch too small for the longest sequence.
        """
        device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, device)
        if dtype == torch.float16:
            raise UsageError(
                "float16 has too little range for gradients", where="dtype", fix="set dtype: bfloat16, float32 or auto"
            )
        order = Order(sequences=len(data.train), seed=config.seed, digest=data.order_digest)
        schedule = Schedule(steps=_steps(config, data, order, begun), **config.schedule.model_dump())
        falls_with = schedule if config.kd_ratio_schedule.fall_with_lr else None
        chunk_size = 256 if device.type == "cpu" else 2_048
        return cls(
            device=device,
            dtype=dtype,
            order=order,
            shape=_step_shape(config, data, device),
            schedule=schedule,
            end=None if config.epochs is None else end_of_epochs(len(data.train), config.epochs),
            kd_ratio=RatioSchedule(
                peak=config.kd_ratio, warmup_steps=config.kd_ratio_schedule.warmup_steps, falls_with=falls_with
            ),
            chunk_size=chunk_size if config.chunk_size == "auto" else config.chunk_size,
        )


def _steps(config: TrainConfig, data: TrainingData, order: Order, begun: TrainingProgress) -> int:
    """Return the optimizer steps; of epochs, exactly as many as it takes to see every sequence that often.

    They are counted from where the run stands: if it had ended before and is prolonged now, its last step was what was
    left of a pass, and those that follow begin there.
    """
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None, "the configuration has one of steps and epochs"
    if begun.cursor > end_of_epochs(len(data.train), config.epochs):
        begun = FRESH  # of version 0.1, whose last step ran into the next pass; or of more epochs, which will be told
    length_S = data.train.lengths()
    return begun.step + steps_of_epochs(length_S, order, config.tokens_per_step, config.epochs, cursor=begun.cursor)


def _step_shape(config: TrainConfig, data: TrainingData, device: torch.device) -> StepShape:
    """Choose the size of a micro-batch, which always holds the longest training sequence."""
    if config.tokens_per_batch != "auto" and config.tokens_per_batch < data.window:
        longest = data.longest
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


def build_learner(config: TrainConfig, data: TrainingData, recipe: Recipe, processes: Processes = ALONE) -> Learner:
    """Build the student on its device, checked against the data, the loss, and the live teacher of an online run.

    Several processes get a part of each model.

    Raises:
        UsageError: no such student or loss, or one that does not fit the data.
        IdentityError: the student's tokenizer is not the teacher's.
        NumericsError, OutOfSpaceError: the live teacher's logits are not finite, or it does not fit into memory.
    """
    source = StudentSource(**config.student.model_dump())
    tokenizer = read_tokenizer(data.tokenizer_files)
    with section("student", StudentConfig):
        same = check_tokenizer(source, tokenizer)
        model = build_student(source, seed=config.seed)
        check_vocabulary(model, data.vocab_size, same_tokenizer=same)
        longest = check_positions(model.config, data.window, lambda: data.longest_read)
    adopt_special_tokens(model, tokenizer)
    warn_of_experts(model)
    model.to(recipe.device)  # type: ignore[arg-type]  # transformers types this method for its own decorator
    head = Head(head_layer(model), HeadRule.of(model.config), data.vocab_size, where="student")
    require_own_logits(model, head, where="student", key=None)
    attention = attention_for(model.config, config.attention, key="attention")
    lengths = PackLengths(longest=longest, tokens_per_batch=recipe.shape.tokens_per_batch)
    use_packed_attention(model, attention, lengths=lengths)
    if processes.tp is not None:
        with section("distributed", DistributedConfig):
            cut_model(model, processes.tp)
    student = Student.of(model, recipe.dtype)
    loss = _loss(config, student, data.vocab_size, recipe.chunk_size)
    if config.kd_ratio > 0.0 and data.store is not None:
        _check_loss_fits(loss, data.store.plan.target)
    teacher = _live_teacher(config, data, loss, recipe.device, lengths)
    if processes.tp is not None and teacher is not None:
        with section("distributed", DistributedConfig):
            teacher = teacher.cut(processes.tp, len(student.weight_VD))
    return Learner(student=student, loss=loss, kd_ratio=config.kd_ratio, teacher=teacher)


def _live_teacher(
    config: TrainConfig, data: TrainingData, loss: FusedLinearKDLoss, device: torch.device, lengths: PackLengths
) -> LiveTeacher | None:
    """Load the teacher of an online run onto its device; None: stored rows, or nothing, stand in for it."""
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
            attention=data.attention,
            load=BACKENDS[config.teacher_model.backend].load(),
            lengths=lengths,
        )
    return replace(teacher, files=data.teacher_files)


def _loss(config: TrainConfig, student: Student, vocab_size: int, chunk_size: int) -> FusedLinearKDLoss:
    """Build the configured divergence in its fused form, mixed with cross-entropy, on this student's logits."""
    chosen = KDLossConfig(**loss_fields(config.loss))
    fused = chosen.fused(
        chunk_size=chunk_size,
        kd_ratio=config.kd_ratio,
        softcap=student.rule.softcap,
        logit_multiplier=student.rule.logit_multiplier,
        vocab_size=vocab_size,
    )
    return FusedLinearKDLoss(**vars(fused))


def _check_loss_fits(loss: FusedLinearKDLoss, target: TargetSpec) -> None:
    """Raise UsageError if the store's rows lack what temperature and tail policy need."""
    found = misfit(loss.objective, target)
    if found is None:
        return
    keys = [f"loss.{field}" for field in found.fields]
    if found.values:
        values = " or ".join(str(value) for value in found.values)
        tails = " or ".join(found.tails)
        fix = f"set {keys[0]}: {values}, or loss.tail: {tails}, which needs no stored tail"
    elif target.k == 0:
        fix = f"leave out {', '.join(keys)}, or train on a store with an exact head, such as target.kind: hybrid"
    else:
        fix = f"leave {keys[0]} out: the best policy that the store's rows allow is taken"
    raise UsageError(f"the store's rows do not fit the loss: {found.lacks}", where=keys[0], fix=fix)


def card_facts(config: TrainConfig, data: TrainingData, student: Student, progress: TrainingProgress) -> CardFacts:
    """Say what the model card tells about the finished student."""
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
