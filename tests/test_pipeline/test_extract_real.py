"""Phase 1 on the real teacher: SmolLM2 reads a little text, and its own model agrees with the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.extract import ExtractConfig
from pipeline.extract import extract
from pipeline.extraction.events import FirstRow
from stages.corpus.tokenizer import load_tokenizer
from storage.reader import StoreReader


@pytest.mark.real_teacher
@torch.inference_mode()
def test_real_teacher(tmp_path: Path, real_teacher_dir: Path, topic_texts: list[str]) -> None:
    """SmolLM2 on a few hundred tokens: the text is likely under the stored rows, and rows keep most of the mass."""
    (tmp_path / "a.txt").write_text(topic_texts[0][:1200])
    (tmp_path / "b.txt").write_text(topic_texts[1][:600])
    config = ExtractConfig.model_validate(
        {
            "store": tmp_path / "store",
            "teacher": {"path": str(real_teacher_dir)},
            "corpus": [{"source": "text", "path": str(tmp_path / "*.txt")}],
            "rendering": {"window": 256},
            "device": "cpu",
        }
    )
    [first] = [event for event in extract(config) if isinstance(event, FirstRow)]
    assert first.context.startswith('The "assert" statement')
    reader = StoreReader(tmp_path / "store")
    batch = reader.read(range(len(reader)))
    assert batch.rows > 300
    assert -batch.next_logprob.astype(np.float64).mean() < 3.5
    head_mass = np.exp(batch.logprob.astype(np.float64)).reshape(-1, 32).sum(1)
    assert head_mass.mean() > 0.8
    assert batch.token_end_byte is not None
    decoded = load_tokenizer(real_teacher_dir).decode(batch.tokens[: batch.token_offset[1]].tolist())
    assert decoded == topic_texts[0][:1200].encode()[: batch.token_end_byte[batch.token_offset[1] - 1]].decode()
    model = AutoModelForCausalLM.from_pretrained(real_teacher_dir, dtype=torch.float32)
    ids = torch.from_numpy(batch.tokens[: batch.token_offset[1]].astype(np.int64))
    expected = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    found = torch.from_numpy(batch.next_logprob[: len(ids) - 1].astype(np.float32))
    exact = expected.gather(1, ids[1:, None])[:, 0]
    assert (found - exact).abs().mean() < 0.05  # a bfloat16 forward against a float32 one
