"""What `misfit` says of a target spec is what `prepare_teacher` does with rows that hold what the spec says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.losses import SparseTargets
from stages.losses.divergences import make_divergence
from stages.losses.engine.objective import Objective
from stages.losses.fit import misfit
from stages.losses.tail import TAIL_POLICIES, prepare_teacher, resolve_tail
from storage.target import TargetSpec

SPECS = {
    "hybrid": TargetSpec(kind="hybrid", k=3, draws=2),
    "hybrid, 2": TargetSpec(kind="hybrid", k=3, draws=2, temperatures=(2.0,)),
    "topk, 0.5, 2": TargetSpec(kind="topk", k=3, temperatures=(0.5, 2.0)),
    "sampled": TargetSpec(kind="sampled", k=0, draws=2),
}


def row_of(target: TargetSpec) -> SparseTargets:
    head, tail = min(target.k, 1), min(target.draws, 1)
    return SparseTargets.from_ragged(
        ids=np.arange(head + tail),
        row_entries=np.array([head + tail]),
        head_size=np.array([head]),
        logprob=np.full(head, -1.0),
        count=np.full(tail, target.draws),
        tail_logit=np.full(1, 0.0 if head else np.inf),
        draws=target.draws,
        entropy=np.ones(1),
        tail_logit_by_temperature={at: np.full(1, -1.0) for at in target.temperatures},
        entropy_by_temperature={at: np.ones(1) for at in target.temperatures},
    )


LINEAR_ONLY = ("sampled", "renormalize", "residual_to_label")  # what a divergence that is not linear refuses
CHOICES = [("forward_kl", tail) for tail in (None, *TAIL_POLICIES)]
CHOICES += [("jsd", tail) for tail in (None, *TAIL_POLICIES) if tail not in LINEAR_ONLY]


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize(("divergence", "tail"), CHOICES)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (4.0, 2.0), (3.0, 1.0)])
@pytest.mark.filterwarnings("ignore:tail=.*biased gradient")
def test_a_spec_fits_exactly_where_its_rows_do(
    kind: str, tail: str | None, scales: tuple[float, float], divergence: str
) -> None:
    target, chosen = SPECS[kind], make_divergence(divergence)
    objective = Objective(divergence=chosen, tail=tail, temperature=scales[0], target_logits_scale=scales[1])
    temperature, label_N = scales[0] / scales[1], torch.zeros(1, dtype=torch.int64)
    policy = resolve_tail(tail, chosen, draws=target.draws, temperature=temperature)
    found, told = misfit(objective, target), None
    try:
        prepare_teacher(row_of(target), policy, temperature=temperature, labels_N=label_N, dtype=torch.float32)
    except ValueError as error:
        told = str(error)
    assert (None if found is None else found.lacks) == told
    for value in () if found is None else found.values:
        field = {found.fields[0]: value}  # type: ignore[union-attr]
        again = {"temperature": scales[0], "target_logits_scale": scales[1]} | field
        assert misfit(Objective(divergence=chosen, **again), target) is None
