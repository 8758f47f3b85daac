"""LongRoPE: the longest sequence of a forward decides how all of them are rotated, so what is long never sits beside
what is short: in extraction, in training and in evaluation alike every sequence is computed as if it were alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MadeOnce
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config

from pipeline.config.extract import ExtractConfig
from pipeline.config.train import TrainConfig
from pipeline.evaluate import evaluate
from pipeline.extract import extract
from pipeline.train import train
from pipeline.training.events import StepDone
from stages.batches.sequences import lengths, part
from storage.errors import UsageError
from storage.reader import StoreReader
from storage.rows import SequenceBatch

ORIGINAL, WINDOW = 16, 60


@pytest.fixture(scope="module")
def teacher_dir(made_once: MadeOnce, tiny_tokenizer_dir: Path) -> Path:
    def make(directory: Path) -> None:
        shutil.copytree(tiny_tokenizer_dir, directory, dirs_exist_ok=True)
        torch.manual_seed(0)
        factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
        config = Phi3Config(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            original_max_position_embeddings=ORIGINAL,
            rope_parameters={"rope_type": "longrope", "rope_theta": 100.0, **factors},
            initializer_range=0.3,
            pad_token_id=2,
            bos_token_id=0,
            eos_token_id=1,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)

    return made_once("longrope-teacher", make)


@pytest.fixture(scope="module")
def extraction(teacher_dir: Path, topic_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Short and long documents in turn, all in one batch of the teacher and in one micro-batch of a student."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = [text[: 20 if number % 2 else 90] for number, text in enumerate(topic_texts[20:36])]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "teacher": {"path": str(teacher_dir), "dtype": "float32"},
        "corpus": [{"source": "jsonl", "path": str(corpus)}],
        "rendering": {"window": WINDOW},
        "target": {"kind": "topk", "k": 4},
        "heldout": {"fraction": 0.4},
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def store(extraction: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lengths") / "store"
    list(extract(ExtractConfig.model_validate({**extraction, "store": path})))
    return path


def sequences(store: Path, split: str) -> SequenceBatch:
    reader = StoreReader(store, split=split)
    batch = reader.read(np.arange(len(reader)))
    assert lengths(batch).min() <= ORIGINAL < lengths(batch).max()
    return batch


def nll_alone(model_dir: Path, batch: SequenceBatch) -> list[np.ndarray]:
    """Return nats of the token that follows each row, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    found = []
    for index in range(len(batch)):
        one = part(batch, index, index + 1)
        ids_T = torch.from_numpy(one.tokens.astype(np.int64))
        with torch.no_grad():
            logprob_TV = torch.log_softmax(model(input_ids=ids_T[None]).logits[0, :-1], dim=-1)
        found.append(-logprob_TV.gather(1, ids_T[1:, None])[:, 0].numpy()[one.has_row[:-1]])
    return found


def test_rows_are_those_of_a_sequence_alone(store: Path, teacher_dir: Path) -> None:
    for split in ("train", "heldout"):
        batch = sequences(store, split)
        expected = np.concatenate(nll_alone(teacher_dir, batch))
        np.testing.assert_allclose(-batch.next_logprob, expected, atol=0.02)  # the codec's steps; beside others: nats


def test_a_student_learns_from_sequences_as_if_alone(store: Path, teacher_dir: Path, tmp_path: Path) -> None:
    batch = sequences(store, "train")
    config = TrainConfig.model_validate(
        {
            "store": store,
            "run": tmp_path / "run",
            "student": {"init": "pretrained", "path": str(teacher_dir)},
            "loss": {"name": "KDLoss"},
            "kd_ratio": 0.0,
            "steps": 1,
            "tokens_per_step": len(batch.tokens),  # one pass
            "dtype": "float32",
            "device": "cpu",
        }
    )
    [done] = [event for event in train(config) if isinstance(event, StepDone)]
    assert done.tokens == len(batch.tokens)
    assert done.loss == pytest.approx(np.concatenate(nll_alone(teacher_dir, batch)).mean(), rel=1e-5)


def test_evaluation_reads_sequences_as_if_alone(store: Path, teacher_dir: Path) -> None:
    found = evaluate(store, {"itself": teacher_dir}, device="cpu", dtype="float32")
    expected = np.concatenate(nll_alone(teacher_dir, sequences(store, "heldout"))).mean()
    assert found.teacher.nll == pytest.approx(expected, rel=1e-5)
    assert found.students["itself"].nll == pytest.approx(expected, rel=1e-5)


def test_the_plan_says_so_where_it_matters(extraction: dict[str, Any], store: Path, tmp_path: Path) -> None:
    assert StoreReader(store).plan.batching["length_borders"] == [ORIGINAL]
    short = {**extraction, "rendering": {"window": ORIGINAL}, "store": tmp_path / "short"}
    list(extract(ExtractConfig.model_validate(short)))
    assert "length_borders" not in StoreReader(tmp_path / "short").plan.batching


def with_positions(directory: Path, positions: int, tokenizer: Path) -> Path:
    """Save a model that looks its positions up in a table of so many."""
    shutil.copytree(tokenizer, directory)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": positions, "bos_token_id": 0, "eos_token_id": 1}
    AutoModelForCausalLM.from_config(GPT2Config(vocab_size=512, **sizes)).save_pretrained(directory)
    return directory


def test_a_student_needs_the_positions_of_the_longest_sequence_alone(
    store: Path, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    longest = int(max(lengths(sequences(store, split)).max() for split in ("train", "heldout")))
    assert longest < WINDOW
    student = with_positions(tmp_path / "student", longest, tiny_tokenizer_dir)
    shape = {"steps": 1, "tokens_per_step": 64, "dtype": "float32", "device": "cpu"}
    values = {"store": store, "run": tmp_path / "run", "student": {"init": "pretrained", "path": str(student)}}
    events = list(train(TrainConfig.model_validate({**values, **shape})))
    assert any(isinstance(event, StepDone) for event in events)
    assert evaluate(store, {"student": tmp_path / "run"}, device="cpu", dtype="float32").students["student"].tokens > 0


def test_held_out_sequences_need_positions_too(store: Path, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    """Whichever split has the longest: one position fewer is refused before the first step, not in a validation."""
    longest = int(max(lengths(sequences(store, split)).max() for split in ("train", "heldout")))
    student = with_positions(tmp_path / "student", longest - 1, tiny_tokenizer_dir)
    shape = {"steps": 1, "tokens_per_step": 64, "dtype": "float32", "device": "cpu"}
    values = {"store": store, "run": tmp_path / "run", "student": {"init": "pretrained", "path": str(student)}}
    with pytest.raises(UsageError, match=f"the longest sequence has {longest} tokens"):
        list(train(TrainConfig.model_validate({**values, **shape})))


def test_a_model_that_knows_too_few_positions_is_not_evaluated(
    store: Path, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    student = with_positions(tmp_path / "student", ORIGINAL, tiny_tokenizer_dir)
    with pytest.raises(UsageError, match=f"the model knows {ORIGINAL} positions") as caught:
        evaluate(store, {"student": student}, device="cpu", dtype="float32")
    assert caught.value.where == str(student)
