"""Validation during pipeline.train: without dropout, with the configured kd_ratio, and leaving training as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.train import TrainConfig
from pipeline.train import train
from stages.training.metrics import read_metrics
from storage.reader import StoreReader

KD_RATIO = 0.6


def lines(run: Path, event: str, *names: str) -> list[list[Any]]:
    return [
        [line.get(name) for name in names] for line in read_metrics(run / "metrics.jsonl") if line["event"] == event
    ]


def trained(store: Path, teacher: Path, run: Path, *, dropout: float, every: int) -> Path:
    """Six steps, in which the share of the divergence rises and falls."""
    shape = {"num_hidden_layers": 2, "initializer_range": 0.1, "attention_dropout": dropout}
    values = {
        "store": store,
        "run": run,
        "student": {"init": "from_config", "path": str(teacher), "overrides": shape},
        "kd_ratio": KD_RATIO,
        "kd_ratio_schedule": {"warmup_steps": 2, "fall_with_lr": True},
        "steps": 6,
        "tokens_per_step": 256,
        "dtype": "float32",
        "device": "cpu",
        "validation": {"every": every},
    }
    list(train(TrainConfig.model_validate(values)))
    return run


@pytest.fixture(scope="module")
def run(tiny_store: Path, tiny_teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Validated after every step."""
    return trained(tiny_store, tiny_teacher_dir, tmp_path_factory.mktemp("runs") / "often", dropout=0.5, every=1)


def test_the_configured_ratio_weighs_every_validation(run: Path) -> None:
    ratios = {ratio for (ratio,) in lines(run, "step", "kd_ratio")}
    assert len(ratios) > 3
    validations = lines(run, "validation", "loss", "kd", "ce")
    assert len(validations) == 6
    for loss, kd, ce in validations:
        assert abs(kd - ce) > 0.1
        assert loss == pytest.approx(KD_RATIO * kd + (1.0 - KD_RATIO) * ce, rel=1e-5)


def test_validation_is_without_dropout(run: Path, tiny_store: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    assert model.config.attention_dropout == 0.5
    heldout, losses = StoreReader(tiny_store, split="heldout"), []
    for index in range(len(heldout)):
        sequence = heldout.read([index], targets=False)
        ids_T = torch.from_numpy(sequence.tokens.astype(np.int64))
        at = torch.from_numpy(np.flatnonzero(sequence.has_row))
        with torch.no_grad():
            logits_NV = model(input_ids=ids_T[None]).logits[0, at, : heldout.plan.vocab_size]
        losses.append(torch.nn.functional.cross_entropy(logits_NV, ids_T[at + 1], reduction="none"))
    *_, (ce,) = lines(run, "validation", "ce")
    assert ce == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_validation_changes_nothing_in_training(
    run: Path, tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    """Neither the weights, nor the random numbers, nor that training drops out."""
    once = trained(tiny_store, tiny_teacher_dir, tmp_path / "once", dropout=0.5, every=100)
    assert len(lines(once, "validation", "step")) == 1
    names = ("step", "loss", "kd", "ce", "grad_norm")
    assert lines(run, "step", *names) == lines(once, "step", *names)
    assert (run / "model" / "model.safetensors").read_bytes() == (once / "model" / "model.safetensors").read_bytes()
    without = trained(tiny_store, tiny_teacher_dir, tmp_path / "without", dropout=0.0, every=100)
    for dropped, plain in zip(lines(once, "step", "loss"), lines(without, "step", "loss"), strict=True):
        assert abs(dropped[0] - plain[0]) > 1e-3
