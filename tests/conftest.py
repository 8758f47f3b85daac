"""Shared fixtures: a tiny tokenizer, teacher, corpus and store made from nothing, and the real teacher converted once.

Everything here is seeded, offline and read-only by convention: a test that alters a file copies the directory first.
The environment below must stand before any library is imported. Under pytest-xdist, workers inherit it, and share what
is made here. Model libraries are imported where they are used: neither the process that only hands tests to workers nor
the tests of storage pay for them.
"""

# ruff: noqa: E402
from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

WORKER = "PYTEST_XDIST_WORKER" in os.environ

if not WORKER:
    _SCRATCH = tempfile.mkdtemp(prefix="topk-distill-tests-")
    atexit.register(shutil.rmtree, _SCRATCH, ignore_errors=True)
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": f"{_SCRATCH}/huggingface",
        "HF_DATASETS_CACHE": f"{_SCRATCH}/datasets",
        "XDG_CACHE_HOME": f"{_SCRATCH}/cache",
        "OMP_NUM_THREADS": os.environ.get("TOPK_DISTILL_TEST_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }

import json
import signal
from collections.abc import Callable

import pytest
from filelock import FileLock
from hypothesis import settings

settings.register_profile("seeded", deadline=None, derandomize=True)
settings.load_profile("seeded")

# A shell without job control starts what it puts into the background with Ctrl-C ignored, nohup with SIGHUP; processes
# pass both on.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)

Make = Callable[[Path], object]
MadeOnce = Callable[[str, Make], Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--refresh-goldens", action="store_true", help="rewrite golden bytes instead of comparing them")
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run files, and the tests of each, in a random order")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("shuffle")) is not None:
        draw = random.Random(seed)
        files = {item.path: draw.random() for item in items}
        items.sort(key=lambda item: (files[item.path], draw.random()))


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Callable[[Path, str, object], None]:
    """Compares one entry of a golden file; only with --refresh-goldens, writes it."""

    def check(path: Path, name: str, found: object) -> None:
        goldens = json.loads(path.read_text()) if path.exists() else {}
        if request.config.getoption("refresh_goldens"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({**goldens, name: found}, indent=1, sort_keys=True) + "\n")
        else:
            assert found == goldens.get(name), "bytes have changed: what is stored would be read wrongly"

    return check


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Makes a directory that all workers share: the first that asks for a name fills it, and the others wait."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if WORKER else base

    def make_once(name: str, make: Make) -> Path:
        path, unfinished = shared / name, shared / f"{name}.unfinished"
        with FileLock(shared / f"{name}.lock"):
            if not path.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(path)
        return path

    return make_once


@pytest.fixture(scope="session")
def topic_texts() -> list[str]:
    """The Python documentation topics in sorted key order: real English that every installation carries."""
    from pydoc_data.topics import topics

    return [topics[key] for key in sorted(topics)]


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(made_once: MadeOnce, topic_texts: list[str]) -> Path:
    """A byte-level BPE tokenizer of 512 tokens with <s>, </s> and <pad>, saved as a fast tokenizer."""
    from tiny_models import save_tokenizer

    return made_once("tokenizer", lambda directory: save_tokenizer(directory, topic_texts[:12]))


@pytest.fixture(scope="session")
def tiny_teacher_dir(made_once: MadeOnce, tiny_tokenizer_dir: Path, topic_texts: list[str]) -> Path:
    """A seeded Llama (4 layers, width 64, 520 head rows for 512 tokens), trained for two seconds on the topics."""
    from tiny_models import save_teacher

    return made_once("teacher", lambda directory: save_teacher(directory, tiny_tokenizer_dir, topic_texts[:12]))


@pytest.fixture(scope="session")
def tiny_corpus(made_once: MadeOnce, topic_texts: list[str]) -> Path:
    """A jsonl file of 40 documents of 80 to 470 characters, field `text`, some with characters beyond ASCII."""
    texts = [text[: 80 + 10 * number] for number, text in enumerate(topic_texts[:40])]
    texts[3] += " – naïve café, 語, 🙂."
    lines = "".join(json.dumps({"text": text, "number": n}) + "\n" for n, text in enumerate(texts))
    return made_once("corpus", lambda directory: (directory / "corpus.jsonl").write_text(lines)) / "corpus.jsonl"


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
def tiny_store(made_once: MadeOnce, tiny_extraction: dict[str, Any]) -> Path:
    """The sealed store of that extraction."""
    from pipeline.config.extract import ExtractConfig
    from pipeline.extract import extract

    def make(directory: Path) -> None:
        list(extract(ExtractConfig.model_validate({**tiny_extraction, "store": directory / "store"})))

    return made_once("store", make) / "store"


@pytest.fixture(scope="session")
def real_teacher_dir(made_once: MadeOnce) -> Path:
    """SmolLM2-135M-Instruct from the PyPI package, converted once for all workers (about 20 s)."""
    from pipeline.demo.teacher import convert

    made_once("real-teacher", lambda directory: convert())  # into the cache, which the workers share
    return convert()
