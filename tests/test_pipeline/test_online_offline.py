"""A live teacher and a store that keeps everything are the same teacher: same losses, same gradients.

The store is a real one, with the `exact` codec and k = V. Its entropy, which is float16, takes no part in bucket forms.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.extract import ExtractConfig
from pipeline.config.train import TrainConfig
from pipeline.extract import extract
from pipeline.recipe import build_learner, heldout_batches, step_shape
from pipeline.training_data import TrainingData, open_training_data
from stages.batches.steps import microbatches
from stages.training.step import Learner, Losses, validate
from storage.codecs.exact import Exact
from storage.reader import StoreReader

REAL_TOKENS = 512
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
        "target": {"kind": "topk", "k": REAL_TOKENS},
        "documents_per_shard": 8,
        "device": "cpu",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.planning.default_codecs", lambda target: {"logprob": Exact().parameters()})
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
    return config, data, build_learner(config, data)


def losses_and_gradients(config: TrainConfig, data: TrainingData, learner: Learner) -> tuple[Tensor, list[Tensor]]:
    """Sums over all training sequences, packed in the order of the corpus."""
    shape = step_shape(config, data, learner.student.device)
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
    shape = step_shape(config, data, learner.student.device)
    return validate(learner, heldout_batches(config, data, shape), number=0)
