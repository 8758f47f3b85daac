"""Shared fixtures: a tiny tokenizer, teacher, corpus and store made from nothing, and the real teacher converted once.

Everything here is seeded, offline and read-only by convention: a test that alters a file copies the directory first.
The environment below must stand before any library is imported.
"""

# ruff: noqa: E402
from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

_SCRATCH = Path(tempfile.mkdtemp(prefix="topk-distill-tests-"))
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(_SCRATCH / "huggingface"),
    "HF_DATASETS_CACHE": str(_SCRATCH / "datasets"),
    "XDG_CACHE_HOME": str(_SCRATCH / "cache"),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import json
import shutil
import signal
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))  # for torture_results

settings.register_profile("seeded", deadline=None, derandomize=True)
settings.load_profile("seeded")

# A shell without job control starts what it puts into the background with Ctrl-C ignored, which processes pass on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REAL_TOKENS = 512
TEACHER_STEPS = 100
HEAD_ROWS = 520  # the teacher's vocabulary is padded: its last 8 rows stand for no token


@pytest.fixture(scope="session", autouse=True)
def _scratch() -> Iterator[None]:
    """One thread, and no scratch files left behind."""
    torch.set_num_threads(1)
    yield
    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def topic_texts() -> list[str]:
    """The Python documentation topics in sorted key order: real English that every installation carries."""
    from pydoc_data.topics import topics

    return [topics[key] for key in sorted(topics)]


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, topic_texts: list[str]) -> Path:
    """A byte-level BPE tokenizer of 512 tokens with <s>, </s> and <pad>, saved as a fast tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=REAL_TOKENS,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(topic_texts[:12], trainer)
    directory = tmp_path_factory.mktemp("tokenizer")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_teacher_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path, topic_texts: list[str]
) -> Path:
    """A seeded Llama (4 layers, width 64, 520 head rows for 512 tokens), trained for two seconds on the topics.

    So its distributions are those of a language model, if a poor one, and its weights are a pure function of the code.
    """
    directory = tmp_path_factory.mktemp("teacher")
    shutil.copytree(tiny_tokenizer_dir, directory, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=HEAD_ROWS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir)
    ids = torch.tensor(tokenizer("".join(topic_texts[:12]), verbose=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(TEACHER_STEPS):
        starts = torch.randint(len(ids) - 64, (8,))
        batch = torch.stack([ids[start : start + 64] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory, topic_texts: list[str]) -> Path:
    """A jsonl file of 40 documents of 80 to 470 characters, field `text`, some with characters beyond ASCII."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = [text[: 80 + 10 * number] for number, text in enumerate(topic_texts[:40])]
    texts[3] += " – naïve café, 語, 🙂."
    path.write_text("".join(json.dumps({"text": text, "number": n}) + "\n" for n, text in enumerate(texts)))
    return path


@pytest.fixture(scope="session")
def tiny_extraction(tiny_teacher_dir: Path, tiny_corpus: Path) -> dict[str, Any]:
    """An extract configuration without its store: hybrid rows (k=8, draws=4), 3 training shards and a held-out one."""
    return {
        "teacher": {"path": str(tiny_teacher_dir), "dtype": "float32"},
        "corpus": [{"source": "jsonl", "path": str(tiny_corpus)}],
        "rendering": {"window": 64, "overlap": 8},
        "target": {"kind": "hybrid", "k": 8, "draws": 4},
        "heldout": {"fraction": 0.15},
        "documents_per_shard": 16,
        "device": "cpu",
    }


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory, tiny_extraction: dict[str, Any]) -> Path:
    """The sealed store of that extraction."""
    from pipeline.config.extract import ExtractConfig
    from pipeline.extract import extract

    path = tmp_path_factory.mktemp("store") / "store"
    for _ in extract(ExtractConfig.model_validate({**tiny_extraction, "store": path})):
        pass
    return path


@pytest.fixture(scope="session")
def real_teacher_dir() -> Path:
    """SmolLM2-135M-Instruct from the PyPI package, converted once per session (about 20 s)."""
    from pipeline.demo.teacher import convert

    return convert()
