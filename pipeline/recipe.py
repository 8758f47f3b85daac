"""What a training configuration means on a given store: the objects that the loop in pipeline/train.py works with.

Data path: TrainConfig and store -> **student, loss, order of tokens, schedule** -> training loop.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pipeline.config.train import TrainConfig
from stages.batches.microbatch import MicroBatch
from stages.batches.order import Order
from stages.batches.steps import StepShape, microbatches, steps_of_epochs
from stages.devices import resolve_device, resolve_dtype
from stages.losses import FusedLinearKDLoss, KDLossConfig, SparseTargets, build_loss_config
from stages.losses.tail import prepare_teacher, resolve_tail
from stages.student.attention import use_packed_attention
from stages.student.identity import check_tokenizer, check_vocabulary
from stages.student.model import Student
from stages.student.save import CardFacts
from stages.student.source import StudentSource, build_student
from stages.training.checkpoint import Progress
from stages.training.metrics import read_metrics
from stages.training.run import RunDirectory
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
    loss = _loss(config, student, reader.plan.vocab_size)
    if config.kd_ratio > 0.0:
        _check_loss_fits(loss, reader)
    return Learner(student=student, loss=loss, kd_ratio=config.kd_ratio)


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


def _check_loss_fits(loss: FusedLinearKDLoss, reader: StoreReader) -> None:
    """Try the loss on one row with what the store's rows hold: format 1 has values at T=1 only.

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
        tail_logit=np.zeros(1),
        draws=target.draws,
        entropy=np.ones(1),
        next_logprob=np.zeros(1),
    )
    temperature = objective.temperature / objective.target_logits_scale
    policy = resolve_tail(objective.tail, objective.divergence, row, temperature)
    try:
        prepare_teacher(row, policy, temperature, torch.zeros(1, dtype=torch.int64), torch.float32)
    except ValueError as error:
        if temperature == 1.0:
            where, fix = "loss.tail", "leave loss.tail out: the best policy that the store's rows allow is taken"
        else:
            scaled = objective.temperature == 1.0
            where = "loss.target_logits_scale" if scaled else "loss.temperature"
            right = 1.0 if scaled else objective.target_logits_scale
            bare = ("renormalize", "renormalize_both") if objective.divergence.linear else ("renormalize_both",)
            fix = f"set {where}: {right}, or loss.tail: {' or '.join(bare)}, which needs no stored tail"
        raise UsageError(f"the store's rows do not fit the loss: {error}", where=where, fix=fix) from error


def step_shape(config: TrainConfig, reader: StoreReader, device: torch.device) -> StepShape:
    """How much a step and a micro-batch hold; a micro-batch always holds the store's longest sequence.

    Raises:
        UsageError: the configured one does not.
    """
    window = int(reader.plan.rendering.get("window") or 0)
    if config.tokens_per_batch != "auto" and config.tokens_per_batch < window:
        longest = int(reader.lengths().max(initial=0))
        if longest > config.tokens_per_batch:
            raise UsageError(
                f"the store's longest sequence has {longest} tokens, "
                f"a micro-batch holds at most {config.tokens_per_batch}",
                where="tokens_per_batch",
                fix=f"set tokens_per_batch to at least {longest}",
            )
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


def order_of(config: TrainConfig, reader: StoreReader) -> Order:
    """The order in which training sees the store's sequences."""
    return Order(sequences=len(reader), seed=config.seed, digest=reader.digest)


def _steps(config: TrainConfig, reader: StoreReader) -> int:
    """Optimizer steps; of epochs, exactly as many as it takes to see every sequence that often."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None, "the configuration has one of steps and epochs"
    return steps_of_epochs(reader.lengths(), order_of(config, reader), config.tokens_per_step, config.epochs)


def check_learning_rates(config: TrainConfig, schedule: Schedule, run: RunDirectory, done: int) -> None:
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


def heldout_batches(config: TrainConfig, shape: StepShape) -> tuple[MicroBatch, ...]:
    """Evenly spaced held-out sequences, packed; none if the store holds none out."""
    heldout = StoreReader(config.store, split="heldout", allow_partial=config.allow_partial)
    count = min(config.validation.sequences, len(heldout))
    if count == 0:
        return ()
    read = heldout.read(np.arange(count) * len(heldout) // count, targets=shape.with_targets)
    batches = microbatches(read, shape)
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
