"""What every loss is built with, and the base of the public losses: their settings by name, read-only."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

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
    """A loss. Its settings have the names of its constructor's arguments and are read-only; `repr` shows them.

    Attributes:
        objective: what is measured.
        settings: over which rows, columns and processes, and how.
    """

    def __init__(self, objective: Objective, settings: Settings) -> None:
        super().__init__()
        self.objective, self.settings = objective, settings

    def __repr__(self) -> str:
        """Show the arguments of the constructor but for those that are None."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        values = {name: getattr(self, name, None) for name in names}
        shown = {name: spelled_out(value) if isinstance(value, Divergence) else value for name, value in values.items()}
        listed = ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)
        return f"{type(self).__name__}({listed})"

    @property
    def ignore_index(self) -> int:
        """Rows with this label take no part. Recipes of NeMo AutoModel read it."""
        return self.settings.ignore_index

    @property
    def reduction(self) -> str:
        """What becomes of the rows' losses where the call gives no total: "mean", "sum" or "none"."""
        return self.settings.reduction

    @property
    def temperature(self) -> float:
        """T of both distributions."""
        return self.objective.temperature

    @property
    def divergence(self) -> Divergence:
        """What is measured between them."""
        return self.objective.divergence

    @property
    def tail(self) -> str | None:
        """The key of TAIL_POLICIES that was asked for."""
        return self.objective.tail

    @property
    def logits_scale(self) -> float:
        """Factor on the student's logits."""
        return self.objective.logits_scale

    @property
    def target_logits_scale(self) -> float:
        """Factor on the teacher's logits."""
        return self.objective.target_logits_scale

    @property
    def fp32_upcast(self) -> bool:
        """Whether half-precision logits are computed with in float32."""
        return self.settings.fp32_upcast

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """Processes that hold the parts of plain logits, or of a plain head."""
        return self.settings.tp_group

    @property
    def chunk_size(self) -> int:
        """Rows computed at once; 0 chooses."""
        return self.settings.chunk_size

    @property
    def vocab_size(self) -> int | None:
        """Real tokens; None: every column is one."""
        return self.settings.vocab_size

    @property
    def check(self) -> bool:
        """Whether a row whose loss is not finite is refused."""
        return self.settings.check

    @property
    def softcap(self) -> float | None:
        """The model's own cap on logits."""
        return self.settings.softcap

    @property
    def logit_multiplier(self) -> float:
        """The model's own factor on logits."""
        return self.settings.logit_multiplier
