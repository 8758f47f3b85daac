"""Configuration of phase 2: which student learns from which store or live teacher, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.config.base import DIGEST, DURATION, SECONDS, FieldError, Model, StoreDirectory
from pipeline.config.extract import (
    Auto,
    Dtype,
    HeldoutConfig,
    NotNegative,
    Positive,
    RenderingConfig,
    SourceConfig,
    TeacherConfig,
)
from pipeline.config.loss import check_loss, loss_schema, loss_spelled_out

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]  # torch takes it as one int64


class StudentConfig(Model):
    """Where the student's architecture and first weights come from."""

    init: Literal["pretrained", "layers_of_teacher", "from_config"]
    """pretrained: weights of `path`. layers_of_teacher: `path` with only some of its layers. from_config: the
    architecture of `path` (a model directory or a config.json) with `overrides`, random weights."""
    path: str
    """Directory or hub name of the model (layers_of_teacher: usually the teacher; any causal model serves)."""
    revision: str | None = None
    """Hub revision."""
    layers: Positive | tuple[int, ...] | None = None
    """layers_of_teacher: how many layers to keep, evenly spaced from first to last, or which ones."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """from_config: fields of the model's configuration to change, such as hidden_size."""

    @model_validator(mode="after")
    def _fields_fit_init(self) -> StudentConfig:
        if (self.layers is None) == (self.init == "layers_of_teacher"):
            raise ValueError("layers belongs to init: layers_of_teacher, and is required there")
        if self.overrides and self.init != "from_config":
            raise ValueError("overrides belong to init: from_config")
        return self


class OptimizerConfig(Model):
    """AdamW. Weight decay applies to matrices only, not to norms and biases."""

    lr: Annotated[float, Field(gt=0.0)] = 3e-4
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay."""


class ScheduleConfig(Model):
    """Learning rate over the steps, as a factor of the peak."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine: warm up, then half a cosine. wsd: warm up, stay, decay linearly at the end. constant: warm up, stay."""
    warmup_steps: NotNegative = 0
    """Steps of linear warm-up."""
    decay_steps: Positive | None = None
    """wsd: steps of the final decay. Default: a fifth of all steps."""
    min_factor: Unit = 0.0
    """What the factor comes down to at the end of the run (cosine, wsd)."""


class KDRatioScheduleConfig(Model):
    """How kd_ratio moves over the steps. Validation always uses kd_ratio itself."""

    warmup_steps: NotNegative = 0
    """Steps in which the share of KD rises linearly from near 0 to kd_ratio; cross-entropy has the rest."""
    fall_with_lr: bool = False
    """Whether it falls as the learning rate does, by the same factor, once that falls."""

    @property
    def moves(self) -> bool:
        """Whether it moves at all."""
        return self.fall_with_lr or self.warmup_steps > 0

    @property
    def words(self) -> str:
        """The same in words."""
        rise = f"rises over {self.warmup_steps} steps" if self.warmup_steps else ""
        fall = "falls with the learning rate" if self.fall_with_lr else ""
        return ", ".join(part for part in (rise, fall) if part)


class CheckpointConfig(Model):
    """Checkpoints, from which the same command resumes exactly."""

    every: Positive | Annotated[str, Field(pattern=DURATION)] = "10 min"
    """A time between checkpoints, such as 90 s, 10 min or 2 h, or a number of steps."""
    keep: Positive = 2
    """Newest checkpoints kept."""

    @property
    def steps(self) -> int | None:
        """Steps between checkpoints; None: the time counts."""
        return self.every if isinstance(self.every, int) else None

    @property
    def seconds(self) -> float:
        """Seconds between checkpoints; infinite: the steps count."""
        if isinstance(self.every, int):
            return math.inf
        number, unit = re.fullmatch(r"(\d+) ?(\w+)", self.every).groups()  # type: ignore[union-attr]  # it is of its form
        return int(number) * SECONDS[unit]


class ValidationConfig(Model):
    """Loss on held-out rows during training. With a store no teacher is needed for it."""

    every: Positive = 200
    """Steps between validations (one more runs at the end)."""
    sequences: Positive = 64
    """Held-out sequences used; fewer if there are fewer. Where nothing is held out, nothing is validated."""


class DistributedConfig(Model):
    """How many processes share the work: the product of these sizes. torchrun starts them."""

    dp_replicate: Positive = 1
    """Copies of the model. Only 1 is supported."""
    dp_shard: Positive | Literal["auto", "none"] = "auto"
    """Processes among which the weights of a copy are sharded. auto or none: 1, the only size that is supported."""
    tp: Positive = 1
    """Tensor parallelism: processes among which student and live teacher are cut."""

    @model_validator(mode="after")
    def _no_data_parallelism(self) -> DistributedConfig:
        for key, size in (("dp_replicate", self.dp_replicate), ("dp_shard", self.dp_shard)):
            if isinstance(size, int) and size > 1:
                raise FieldError(
                    f"distributed.{key} is {size}, but data parallelism is not supported: all processes see the same "
                    "tokens",
                    path=(key,),
                    fix=f"leave distributed.{key} out; distributed.tp is the number of processes that share a model",
                )
        return self


def spelled_out(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration as a run keeps it, with all defaults, also of fields that are newer than the run.

    A configuration that this version cannot read is returned as it is.
    """
    try:
        known = TrainConfig.model_validate(config)
    except ValidationError:
        return config
    return known.model_dump(mode="json") | {"loss": loss_spelled_out(known.loss)}


class TrainConfig(Model):
    """`pipeline train`: a student learns from a store of teacher distributions, or from a live teacher."""

    store: StoreDirectory | None = None
    """Directory of the store. Exactly one of store and teacher_model."""
    expected_digest: Annotated[str, Field(pattern=DIGEST)] | None = None
    """Digest that the store must have, as pipeline status prints it: any other content is refused. Default: any."""
    teacher_model: TeacherConfig | None = None
    """Online run: a live teacher that reads every batch with the student, over the full vocabulary."""
    corpus: Annotated[tuple[SourceConfig, ...], Field(min_length=1)] | None = None
    """Online run: what both read. Its token ids are kept in memory."""
    rendering: RenderingConfig | None = None
    """Online run: how documents become token windows. Default: as in an extraction."""
    heldout: HeldoutConfig | None = None
    """Online run: documents set aside for validation. Default: none."""
    run: Path
    """Run directory: config.yaml, metrics.jsonl, checkpoints/, model/."""
    student: StudentConfig
    """The model that learns."""
    loss: dict[str, Any] = Field(default_factory=lambda: {"name": "KDLoss"}, json_schema_extra=loss_schema)
    """How teacher and student are compared: KDLoss and its fields, for example {name: KDLoss, divergence: jsd}."""
    kd_ratio: Unit = 0.7
    """loss = (1 - kd_ratio) * cross-entropy + kd_ratio * KD. 0 reads no targets, 1 computes no cross-entropy."""
    kd_ratio_schedule: KDRatioScheduleConfig = KDRatioScheduleConfig()
    """How kd_ratio moves over the steps. Default: not at all."""
    steps: Positive | None = None
    """Optimizer steps. Exactly one of steps and epochs."""
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Passes over the training sequences."""
    tokens_per_step: Positive = 16384
    """Tokens per optimizer step, over all micro-batches."""
    tokens_per_batch: Positive | Auto = "auto"
    """Tokens of one packed micro-batch, one forward and backward. auto: up to 2,048 on CPU, 16,384 elsewhere."""
    chunk_size: Positive | Auto = "auto"
    """Positions whose student logits exist at one time. auto: 256 on CPU, 2,048 on an accelerator."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How weights move."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate moves."""
    clip_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Largest norm of the gradient of a step; null: no clipping."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save."""
    validation: ValidationConfig = ValidationConfig()
    """When to measure."""
    seed: Seed = 0
    """Seed of initialisation, order and dropout: 0 to 2**63 - 1."""
    dtype: Dtype = "auto"
    """Dtype of the student's forward (autocast); weights and optimizer stay in float32. auto: bfloat16 where fast."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation. sdpa becomes eager, and says so, where an architecture cannot do it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    distributed: DistributedConfig = DistributedConfig()
    """Several processes: torchrun --nproc-per-node N -m pipeline train CONFIG."""
    allow_partial: bool = False
    """Train on the committed shards of an unfinished store. The set is recorded in the run: once the store has grown,
    the run cannot be resumed, and a new run directory is needed."""

    @model_validator(mode="after")
    def _something_to_schedule(self) -> TrainConfig:
        if self.kd_ratio == 0.0 and self.kd_ratio_schedule.moves:
            raise ValueError("kd_ratio_schedule moves a kd_ratio of 0: set kd_ratio to its peak")
        return self

    @model_validator(mode="after")
    def _one_teacher(self) -> TrainConfig:
        if (self.store is None) == (self.teacher_model is None):
            raise ValueError("give exactly one of store (a teacher's stored rows) and teacher_model (a live teacher)")
        own = {"corpus": self.corpus, "rendering": self.rendering, "heldout": self.heldout}
        foreign = [key for key, value in own.items() if value is not None]
        if self.store is not None and foreign:
            raise ValueError(f"{' and '.join(foreign)} belong to teacher_model; a store brings its own")
        if self.teacher_model is not None and self.corpus is None:
            raise ValueError("teacher_model needs a corpus to read")
        if self.teacher_model is not None and self.allow_partial:
            raise ValueError("allow_partial belongs to store")
        if self.teacher_model is not None and self.expected_digest is not None:
            raise ValueError("expected_digest belongs to store")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.steps is not None and self.schedule.warmup_steps > self.steps:
            raise ValueError(f"schedule.warmup_steps {self.schedule.warmup_steps} must not exceed steps {self.steps}")
        return self

    @model_validator(mode="after")
    def _loss_is_known(self) -> TrainConfig:  # the last: it loads torch
        check_loss(self.loss)
        return self
