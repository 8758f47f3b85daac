"""Whether the rows of a store can feed a loss: told from what its plan says of them, before any row is read."""

from __future__ import annotations

from dataclasses import dataclass

from stages.losses.engine.objective import Objective
from stages.losses.tail import check_rows, resolve_tail
from storage.target import TargetSpec


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """What rows lack for a loss.

    Attributes:
        lacks: in one line.
        fields: fields of the loss that ask for it, the most likely mistake first.
        values: those that the first of them may have instead; empty: only its default.
        tails: tail policies that go with `values`: they take the first field as it is.
    """

    lacks: str
    fields: tuple[str, ...]
    values: tuple[float, ...] = ()
    tails: tuple[str, ...] = ()


def misfit(objective: Objective, target: TargetSpec) -> Misfit | None:
    """Return what rows with these contents lack for an objective; None: they can feed it."""
    temperature = objective.temperature / objective.target_logits_scale
    policy = resolve_tail(objective.tail, objective.divergence, draws=target.draws, temperature=temperature)
    headless = 0 if target.k == 0 else None
    try:
        check_rows(policy, temperature, headless=headless, draws=target.draws, temperatures=target.temperatures)
    except ValueError as error:
        if headless is not None:
            return Misfit(lacks=str(error), fields=_not_for_samples(objective))
        if temperature in (1.0, *target.temperatures):
            return Misfit(lacks=str(error), fields=("tail",))
        return _other_temperature(objective, target, lacks=str(error))
    return None


def _not_for_samples(objective: Objective) -> tuple[str, ...]:
    """Return the fields that rows of samples alone do not serve."""
    off = {
        "divergence": not objective.divergence.linear,
        "temperature": objective.temperature != 1.0,
        "target_logits_scale": objective.target_logits_scale != 1.0,
        "tail": objective.tail is not None,
    }
    return tuple(field for field, differs in off.items() if differs)


def _other_temperature(objective: Objective, target: TargetSpec, *, lacks: str) -> Misfit:
    stored = (1.0, *target.temperatures)
    tails = ("renormalize", "renormalize_both") if objective.divergence.linear else ("renormalize_both",)
    if objective.temperature == 1.0:
        values = tuple(1.0 / at for at in stored)
        return Misfit(lacks=lacks, fields=("target_logits_scale",), values=values, tails=tails)
    values = tuple(objective.target_logits_scale * at for at in stored)
    return Misfit(lacks=lacks, fields=("temperature",), values=values, tails=tails)
