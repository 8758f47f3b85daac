"""A live teacher and a store that keeps everything are the same teacher: same losses, same gradients.

The store is a real one, with the `exact` codec and k = V. Its entropy, which is float16, takes no part in bucket forms.
Both routes are held against plain models too: one sequence at a time, whole logits, float64, the formulas below.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.extract import ExtractConfig
from pipeline.config.train import TrainConfig
from pipeline.extract import extract
from pipeline.training.data import TrainingData, open_training_data
from pipeline.training.recipe import Recipe, build_learner
from stages.batches.steps import evenly_spaced, microbatches
from stages.training.step import Learner, Losses, validate
from storage.reader import StoreReader

REAL_TOKENS = 512
TEMPERATURES = [1.25, 2.0]  # of the teacher, stored besides 1
SHAPE = {"num_hidden_layers": 2, "initializer_range": 0.1}  # random weights wide enough to disagree with the teacher


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory, topic_texts: list[str]) -> dict[str, Any]:
    """Corpus, rendering and held-out rule of both: prompts of all lengths, windows that overlap."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    pairs = [
        (text[: 11 * number], text[11 * number : 200 + 12 * number]) for number, text in enumerate(topic_texts[:24])
    ]
    path.write_text("".join(json.dumps({"prompt": prompt, "text": text}) + "\n" for prompt, text in pairs))
    return {
        "corpus": [{"source": "jsonl", "path": str(path), "prompt_field": "prompt"}],
        "rendering": {"window": 64, "overlap": 8},
        "heldout": {"fraction": 0.2},
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, reading: dict[str, Any]) -> Path:
    """The teacher's whole distribution at every position, to the last bit."""
    path = tmp_path_factory.mktemp("whole") / "store"
    content = {
        **reading,
        "store": path,
        "teacher": {"path": str(tiny_teacher_dir), "dtype": "float32"},
        "target": {"kind": "topk", "k": REAL_TOKENS, "temperatures": TEMPERATURES},
        "codec": "exact",
        "documents_per_shard": 8,
        "device": "cpu",
    }
    list(extract(ExtractConfig.model_validate(content)))
    plan = StoreReader(path).plan
    assert (plan.target.k, plan.codecs["logprob"]["id"]) == (plan.vocab_size, "exact")
    return path


def opened(
    source: dict[str, Any], teacher: Path, run: Path, **changes: Any
) -> tuple[TrainConfig, TrainingData, Learner]:
    values = {
        **source,
        "run": run,
        "student": {"init": "from_config", "path": str(teacher), "overrides": SHAPE},
        "steps": 1,
        "tokens_per_step": 512,
        "tokens_per_batch": 160,
        "chunk_size": 40,
        "dtype": "float32",
        "device": "cpu",
        **changes,
    }
    config = TrainConfig.model_validate(values)
    data = open_training_data(config)
    return config, data, build_learner(config, data, Recipe.of(config, data))


def losses_and_gradients(config: TrainConfig, data: TrainingData, learner: Learner) -> tuple[Tensor, list[Tensor]]:
    """Sums over all training sequences, packed in the order of the corpus."""
    shape = Recipe.of(config, data).shape
    batches = microbatches(data.train.read(np.arange(len(data.train)), targets=shape.with_targets), shape)
    rows = sum(batch.rows for batch in batches)
    assert len(batches) > 5
    assert any(int((batch.positions_1T == 0).sum()) > 1 for batch in batches)
    sums = torch.zeros(3)
    for batch in batches:
        parts = learner.parts(batch, rows)
        parts.loss.backward()  # type: ignore[no-untyped-call]
        sums += torch.stack(parts).detach()
    gradients = [parameter.grad for parameter in learner.student.model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return sums, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd(0.5)", "jsd(0.1)"])
def test_online_equals_offline(
    divergence: str, store: Path, reading: dict[str, Any], tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    live = {**reading, "teacher_model": {"path": str(tiny_teacher_dir), "dtype": "float32"}}
    loss = {"divergence": divergence}
    offline = opened({"store": store}, tiny_teacher_dir, tmp_path / "offline", loss=loss)
    online = opened(live, tiny_teacher_dir, tmp_path / "online", loss=loss)
    everything = np.arange(len(offline[1].train))
    ours, theirs = (each[1].train.read(everything, targets=False) for each in (online, offline))
    for name in ("tokens", "has_row", "token_offset", "row_offset", "document", "window_start"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    # Rows are missing beyond the last token of a sequence and the overlap: these are the prompts.
    assert int((~ours.has_row).sum()) > len(ours) * (1 + 8)

    found, found_gradients = losses_and_gradients(*online)
    expected, expected_gradients = losses_and_gradients(*offline)
    assert float(expected[1]) > 0.1
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)
    for ours_, theirs_ in zip(found_gradients, expected_gradients, strict=True):
        assert float((ours_ - theirs_).norm()) <= 1e-5 * (1.0 + float(theirs_.norm()))

    held = [held_out_losses(*each) for each in (online, offline)]
    assert held[0].kd == pytest.approx(held[1].kd, abs=1e-5)
    assert held[0].ce == pytest.approx(held[1].ce, abs=1e-5)


def held_out_losses(config: TrainConfig, data: TrainingData, learner: Learner) -> Losses:
    shape = Recipe.of(config, data).shape
    return validate(learner, evenly_spaced(data.heldout, config.validation.sequences, shape), number=0)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd_of_three_tenths(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = (0.3 * log_p.exp() + 0.7 * log_q.exp()).log()
    return 0.3 * (log_p.exp() * (log_p - log_m)).sum(-1) + 0.7 * (log_q.exp() * (log_q - log_m)).sum(-1)


def plain_losses_and_gradients(
    data: TrainingData, weights: dict[str, Tensor], teacher_dir: Path, divergence: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """What `losses_and_gradients` gives, for a kd_ratio of 0.7 and the student of these weights."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float64).eval()
    config = AutoConfig.from_pretrained(teacher_dir, **SHAPE)
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    student.load_state_dict(weights)
    kd, ce, rows = [], [], 0
    for index in range(len(data.train)):
        sequence = data.train.read(np.array([index]), targets=False)
        ids_T = torch.from_numpy(sequence.tokens.astype(np.int64))
        at = torch.from_numpy(np.flatnonzero(sequence.has_row))
        with torch.no_grad():
            teacher_NV = teacher(input_ids=ids_T[None]).logits[0, at, :REAL_TOKENS]
        student_NV = student(input_ids=ids_T[None]).logits[0, at, :REAL_TOKENS]
        kd.append(divergence(teacher_NV, student_NV).sum())
        ce.append(torch.nn.functional.cross_entropy(student_NV, ids_T[at + 1], reduction="sum"))
        rows += len(at)
    parts = torch.stack([torch.stack(kd).sum(), torch.stack(ce).sum()]) / rows
    loss = 0.7 * parts[0] + 0.3 * parts[1]
    loss.backward()
    return torch.stack([loss, *parts]).detach(), [parameter.grad for parameter in student.parameters()]


@pytest.mark.parametrize(
    ("name", "divergence", "temperature", "student_scale", "teacher_scale"),
    [
        ("forward_kl", forward_kl, 1.5, 1.25, 0.75),
        ("reverse_kl", reverse_kl, 2.0, 0.8, 1.6),
        ("jsd(0.3)", jsd_of_three_tenths, 1.5, 1.25, 0.75),
    ],
)
def test_both_routes_equal_plain_models_at_another_temperature(
    name: str,
    divergence: Callable[[Tensor, Tensor], Tensor],
    temperature: float,
    student_scale: float,
    teacher_scale: float,
    store: Path,
    reading: dict[str, Any],
    tiny_teacher_dir: Path,
    tmp_path: Path,
) -> None:
    def tempered(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
        log_p = (teacher_NV * teacher_scale / temperature).log_softmax(-1)
        log_q = (student_NV * student_scale / temperature).log_softmax(-1)
        return temperature**2 * divergence(log_p, log_q)

    assert temperature / teacher_scale in TEMPERATURES
    loss = {"divergence": name, "temperature": temperature}
    loss |= {"logits_scale": student_scale, "target_logits_scale": teacher_scale}
    live = {**reading, "teacher_model": {"path": str(tiny_teacher_dir), "dtype": "float32"}}
    routes = {
        route: opened(source, tiny_teacher_dir, tmp_path / route, loss=loss, kd_ratio=0.7)
        for route, source in (("online", live), ("offline", {"store": store}))
    }
    _, data, learner = routes["online"]
    weights = learner.student.model.state_dict()
    expected, expected_gradients = plain_losses_and_gradients(data, weights, tiny_teacher_dir, tempered)
    assert float(expected[1]) > 0.1
    for route, parts in routes.items():
        found, gradients = losses_and_gradients(*parts)
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5), route
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            assert float((ours - theirs).norm()) <= 1e-4 * float(theirs.norm()), route
