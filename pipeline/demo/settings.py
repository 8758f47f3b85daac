"""The sizes of the demo, and the configurations that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.demo.comparison import CE, KD
from pipeline.report.page import Wording

UNTRAINED, SMALL = "untrained", "small"
WORDING = Wording(
    labels={
        KD: "Student, KD + cross-entropy",
        CE: "Student, cross-entropy only",
        SMALL: "Smaller student, KD + cross-entropy",
        UNTRAINED: "Untrained student",
    },
    references=frozenset({UNTRAINED}),
    headline={KD: "KD student", CE: "its CE twin"},
)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo. The defaults fit ten minutes on two cores.

    Attributes:
        corpus: one corpus source, as in an extract configuration.
        window, k, draws: tokens per teacher forward, exact head entries and tail samples per row.
        heldout_fraction, heldout_seed: what is set aside for evaluation. Of the seeds this one sets aside many short
            topics instead of a few long ones: a quarter of the documents with 9% of the text; the intervals need many.
        layers, small_layers: layers of the two twins (taken from the teacher) and of the third student (taken from
            the first, since the teacher is out of reach by then).
        steps, tokens_per_step, lr: training of each student.
        prompt, new_tokens: what teacher and students are asked to continue, and how far.
    """

    corpus: Mapping[str, Any] = field(default_factory=lambda: {"source": "topics"})
    window: int = 512
    k: int = 32
    draws: int = 8
    heldout_fraction: float = 0.2
    heldout_seed: int = 16
    layers: int = 6
    small_layers: int = 3
    steps: int = 72
    tokens_per_step: int = 1024
    lr: float = 1e-3
    prompt: str = "The with statement is used to"
    new_tokens: int = 24

    def extract_config(self, directory: Path) -> dict[str, Any]:
        """Return the extract configuration."""
        return {
            "store": str(directory / "store"),
            "teacher": {"path": str(directory / "teacher")},
            "corpus": [dict(self.corpus)],
            "rendering": {"window": self.window},
            "target": {"kind": "hybrid", "k": self.k, "draws": self.draws},
            "heldout": {"fraction": self.heldout_fraction, "seed": self.heldout_seed},
        }

    def train_config(self, directory: Path, name: str) -> dict[str, Any]:
        """Return the configuration of the student called `name`; the twins differ in `kd_ratio` and nothing else."""
        if name == SMALL:
            origin = {"path": str(directory / "runs" / KD / "model"), "layers": self.small_layers}
        else:
            origin = {"path": str(directory / "teacher"), "layers": self.layers}
        return {
            "store": str(directory / "store"),
            "run": str(directory / "runs" / name),
            "student": {"init": "layers_of_teacher", **origin},
            "loss": {"name": "KDLoss", "divergence": "forward_kl"},
            "kd_ratio": 0.0 if name == CE else 0.7,
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "optimizer": {"lr": self.lr},
            "schedule": {"kind": "cosine", "warmup_steps": max(1, self.steps // 10)},
            "checkpoint": {"every": max(1, self.steps // 3), "keep": 1},
            "validation": {"every": max(1, self.steps // 3), "sequences": 8},
        }
