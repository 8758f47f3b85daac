"""What every loss is built with, and the base of the public losses: their settings by name, read-only."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from operator import attrgetter

import torch.distributed as dist
from torch import Tensor, nn

from stages.losses.divergences import Divergence, spelled_out
from stages.losses.engine.head import check_rule
from stages.losses.engine.objective import Objective
from stages.losses.engine.vocab import check_vocab_size

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a loss is built with beside its objective; the losses' docstrings say what each field does.

    Raises:
        ValueError: a value that no loss can have.
    """

    ignore_index: int = -100
    reduction: str = "mean"
    fp32_upcast: bool = True
    tp_group: dist.ProcessGroup | None = None
    chunk_size: int = 0
    vocab_size: int | None = None
    check: bool = False
    softcap: float | None = None
    logit_multiplier: float = 1.0

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {self.reduction!r}, allowed are {', '.join(map(repr, REDUCTIONS))}")
        if self.chunk_size < 0:
            raise ValueError(f"chunk_size is {self.chunk_size}, expected a number of rows, or 0 to choose one")
        check_vocab_size(self.vocab_size)
        check_rule(softcap=self.softcap, logit_multiplier=self.logit_multiplier)

    @property
    def per_row(self) -> bool:
        """Whether every row keeps its own loss."""
        return self.reduction == "none"

    def total(self, given: float | Tensor | None) -> float | Tensor | None:
        """Return what losses are divided by where a call gives `given`; None for the number of valid rows."""
        return 1.0 if given is None and self.reduction != "mean" else given


class Loss(nn.Module):
    """A loss. Its settings have the names and meanings of its constructor's arguments, and are read-only.

    Attributes:
        objective: what is measured.
        settings: over which rows, columns and processes, and how.
    """

    divergence = property(attrgetter("objective.divergence"))
    tail = property(attrgetter("objective.tail"))
    temperature = property(attrgetter("objective.temperature"))
    logits_scale = property(attrgetter("objective.logits_scale"))
    target_logits_scale = property(attrgetter("objective.target_logits_scale"))
    ignore_index = property(attrgetter("settings.ignore_index"))  # recipes of NeMo AutoModel read it
    reduction = property(attrgetter("settings.reduction"))
    fp32_upcast = property(attrgetter("settings.fp32_upcast"))
    tp_group = property(attrgetter("settings.tp_group"))
    chunk_size = property(attrgetter("settings.chunk_size"))
    vocab_size = property(attrgetter("settings.vocab_size"))
    check = property(attrgetter("settings.check"))
    softcap = property(attrgetter("settings.softcap"))
    logit_multiplier = property(attrgetter("settings.logit_multiplier"))

    def __init__(self, objective: Objective, settings: Settings) -> None:
        super().__init__()
        self.objective, self.settings = objective, settings

    def __repr__(self) -> str:
        """Show the arguments of the constructor but for those that are None."""
        values = {name: getattr(self, name, None) for name in inspect.signature(type(self)).parameters}
        shown = {name: spelled_out(value) if isinstance(value, Divergence) else value for name, value in values.items()}
        listed = ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)
        return f"{type(self).__name__}({listed})"
