"""Every kind of target from the configuration to a trained student, on the tiny teacher: one battery for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from pipeline.cli import main
from pipeline.config.extract import ExtractConfig
from pipeline.config.train import TrainConfig
from pipeline.extract import extract
from pipeline.extraction.events import FirstRow, ShardDone
from pipeline.train import train
from pipeline.training.events import Finished, StepDone
from stages.targets import KINDS
from storage.errors import UsageError
from storage.reader import StoreReader
from storage.rows import SequenceBatch
from storage.tools.status import status
from storage.tools.verify import verify

TARGETS: dict[str, dict[str, Any]] = {
    "hybrid": {"kind": "hybrid", "k": 8, "draws": 4},
    "sampled": {"kind": "sampled", "draws": 20},
    "topk": {"kind": "topk", "k": 128, "temperatures": [0.5, 1.5]},
    "topp": {"kind": "topp", "k": 160, "p": 0.85, "temperatures": [1.5]},
}
REAL_TOKENS = 512

Stores = Callable[[str], Path]


@pytest.fixture(scope="module")
def store_of(tiny_extraction: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """The sealed store of a kind, extracted when it is first asked for."""
    directory = tmp_path_factory.mktemp("kinds")

    def get(kind: str) -> Path:
        path = directory / kind
        if not path.exists():
            config = {**tiny_extraction, "target": TARGETS[kind], "store": path}
            for event in extract(ExtractConfig.model_validate(config)):
                if isinstance(event, FirstRow | ShardDone):
                    assert (event.head_mass is None) == (kind == "sampled")
        return path

    return get


@pytest.fixture
def configure(tiny_teacher_dir: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A run of a few small steps on a student of two layers."""
    student = {"init": "layers_of_teacher", "path": str(tiny_teacher_dir), "layers": 2}
    fixed = {"dtype": "float32", "device": "cpu", "optimizer": {"lr": 2e-3}, "validation": {"every": 100}}
    sizes = {"steps": 12, "tokens_per_step": 512, "kd_ratio": 1.0}

    def make(store: Path, **changes: Any) -> TrainConfig:
        run = {"store": store, "run": tmp_path / "run", "student": student}
        return TrainConfig.model_validate({**run, **fixed, **sizes, **changes})

    return make


def losses(config: TrainConfig) -> list[float]:
    events = list(train(config))
    assert isinstance(events[-1], Finished)
    return [event.loss for event in events if isinstance(event, StepDone)]


def whole(store: Path) -> SequenceBatch:
    reader = StoreReader(store)
    return reader.read(range(len(reader)))


@torch.inference_mode()
def dense(batch: SequenceBatch, teacher: Path) -> NDArray[np.float64]:
    """The teacher's log-probabilities of every row over its real tokens, float64 [R, V]."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    found = []
    for index in range(len(batch)):
        tokens = slice(*batch.token_offset[index : index + 2])
        ids = torch.from_numpy(batch.tokens[tokens].astype(np.int64))
        logits_TV = model(input_ids=ids[None]).logits[0, :, :REAL_TOKENS].double()
        found.append(logits_TV[torch.from_numpy(batch.has_row[tokens])].log_softmax(-1).numpy())
    return np.concatenate(found)


def test_the_battery_covers_every_kind() -> None:
    assert TARGETS.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", TARGETS)
def test_rows_are_the_teachers(kind: str, store_of: Stores, tiny_teacher_dir: Path) -> None:
    """Head sizes and ids, the mass outside of the head, entropies and samples against the full vocabulary."""
    batch, plan = whole(store_of(kind)), StoreReader(store_of(kind)).plan
    logprob_RV = dense(batch, tiny_teacher_dir)
    order_RV = np.argsort(-logprob_RV, axis=1)
    ranked_RV = np.take_along_axis(np.exp(logprob_RV), order_RV, 1)
    size_R = np.full(batch.rows, plan.target.k)
    if plan.target.p is not None:
        size_R = np.minimum(1 + (np.cumsum(ranked_RV, axis=1) < plan.target.p).sum(1), plan.target.k)
    same_R = batch.head_size == size_R
    assert same_R.mean() > 0.999  # p may be met within the rounding of a forward
    in_head_RV = np.arange(REAL_TOKENS) < batch.head_size[:, None]
    # near ties may be ordered otherwise
    assert np.sum(batch.head_ids != order_RV[in_head_RV]) <= 0.01 * len(batch.head_ids)
    tail_R = np.where(in_head_RV, 0.0, ranked_RV).sum(1)
    np.testing.assert_allclose(np.exp(-np.logaddexp(0.0, -batch.tail_logit.astype(float))), tail_R, atol=3e-3)
    np.testing.assert_allclose(batch.entropy, -(np.exp(logprob_RV) * logprob_RV).sum(1), atol=1e-2)
    drawn_R = np.bincount(np.repeat(np.arange(batch.rows), batch.tail_size), batch.count, minlength=batch.rows)
    assert np.all(drawn_R == plan.target.draws)
    for column, temperature in enumerate(plan.target.temperatures):
        scaled_RV = logprob_RV / temperature
        at_RV = scaled_RV - np.log(np.exp(scaled_RV).sum(1, keepdims=True))
        entropy_R = -(np.exp(at_RV) * at_RV).sum(1)
        tail_R = np.where(in_head_RV, 0.0, np.exp(np.take_along_axis(at_RV, order_RV, 1))).sum(1)
        assert batch.tail_logit_T is not None
        assert batch.entropy_T is not None
        found_R = np.exp(-np.logaddexp(0.0, -batch.tail_logit_T[:, column].astype(float)))
        np.testing.assert_allclose(found_R, tail_R, atol=3e-3)
        np.testing.assert_allclose(batch.entropy_T[:, column], entropy_R, atol=1e-2)


@pytest.mark.parametrize("kind", TARGETS)
def test_the_commands_know_every_kind(kind: str, store_of: Stores) -> None:
    store, target = store_of(kind), StoreReader(store_of(kind)).plan.target
    assert verify(store).problems == []
    facts = status(store)
    assert (facts.kind, facts.k, facts.p, facts.draws) == (kind, target.k, target.p, target.draws)
    assert (facts.head_mass is None) == (kind == "sampled")
    for command in ("status", "inspect"):
        result = CliRunner().invoke(main, [command, str(store)])
        assert result.exit_code == 0, result.output
        assert ("kept" in result.output) == (kind != "sampled")
        assert (target.describe() if command == "status" else "entropy") in result.output


@pytest.mark.parametrize("kind", TARGETS)
def test_a_student_learns(kind: str, store_of: Stores, configure: Callable[..., TrainConfig]) -> None:
    """Forward KL; `sampled` and `hybrid` estimate it, the others bound it from below."""
    found = losses(configure(store_of(kind)))
    assert np.mean(found[-3:]) < 0.7 * np.mean(found[:2])


@pytest.mark.parametrize("kind", [kind for kind in TARGETS if kind != "sampled"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_other_divergences_take_the_exact_head(
    kind: str, divergence: str, store_of: Stores, configure: Callable[..., TrainConfig]
) -> None:
    found = losses(configure(store_of(kind), loss={"divergence": divergence}))
    assert found[-1] < found[0]


@pytest.mark.parametrize(
    ("loss", "where"),
    [
        ({"divergence": "jsd"}, "loss.divergence"),
        ({"divergence": "reverse_kl", "temperature": 2.0}, "loss.divergence"),
        ({"tail": "bucket"}, "loss.tail"),
        ({"temperature": 2.0}, "loss.temperature"),
        ({"target_logits_scale": 0.5}, "loss.target_logits_scale"),
    ],
)
def test_samples_alone_serve_forward_kl_at_temperature_1(
    loss: dict[str, Any], where: str, store_of: Stores, configure: Callable[..., TrainConfig]
) -> None:
    with pytest.raises(UsageError, match="do not fit the loss") as caught:
        losses(configure(store_of("sampled"), loss=loss))
    assert caught.value.where == where
    assert "target.kind: hybrid" in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("topk", {"divergence": "jsd", "temperature": 1.5}),
        ("topk", {"temperature": 0.5}),
        ("topp", {"divergence": "reverse_kl", "temperature": 1.5}),
        ("topk", {"divergence": "jsd", "temperature": 3.0, "target_logits_scale": 2.0}),  # the teacher's own is 1.5
        ("topk", {"target_logits_scale": 2.0}),  # 0.5
    ],
)
def test_stored_temperatures_train(
    kind: str, loss: dict[str, Any], store_of: Stores, configure: Callable[..., TrainConfig]
) -> None:
    found = losses(configure(store_of(kind), loss={"name": "KDLoss", **loss}))
    assert found[-1] < found[0]


@pytest.mark.parametrize(
    ("kind", "loss", "stored", "fix"),
    [
        ("topk", {"temperature": 2.0}, "0.5, 1.5", "set loss.temperature: 1.0 or 0.5 or 1.5"),
        ("topp", {"temperature": 2.0, "divergence": "jsd"}, "1.5", "set loss.temperature: 1.0 or 1.5"),
        ("hybrid", {"temperature": 1.5}, "none", "set loss.temperature: 1.0"),
        ("topp", {"temperature": 1.5, "target_logits_scale": 2.0}, "1.5", "set loss.temperature: 2.0 or 3.0"),
        ("topk", {"target_logits_scale": 4.0}, "0.5, 1.5", "set loss.target_logits_scale: 1.0 or 2.0 or 0.6666"),
    ],
)
def test_other_temperatures_are_refused(
    kind: str, loss: dict[str, Any], stored: str, fix: str, store_of: Stores, configure: Callable[..., TrainConfig]
) -> None:
    with pytest.raises(UsageError, match=r"at extraction, by target\.temperatures") as caught:
        losses(configure(store_of(kind), loss=loss))
    assert f"(stored besides 1: {stored})" in caught.value.what
    assert fix in (caught.value.fix or "")
