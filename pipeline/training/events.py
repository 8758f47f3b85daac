"""What happens in phase 2, as events: whoever runs the phase decides what to show."""

from __future__ import annotations

from dataclasses import dataclass

from stages.batches.corpus import Tokenized


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
    kd_ratio: float
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


Event = Tokenized | Started | StepDone | Validated | Saved | Finished
