"""Online runs: a corpus in memory reads like a store's split; a live teacher's rows are the model's own logits."""

from __future__ import annotations

import shutil
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedModel

import stages.batches.corpus
from stages.batches.corpus import TokenizedCorpus, split_corpus
from stages.batches.microbatch import MicroBatch, to_microbatch
from stages.batches.sequences import join, part
from stages.corpus.tokenize import TokenWindow
from stages.models.files import find_model
from stages.teacher.live import LiveTeacher
from storage.plan import HeldoutRule
from storage.rows import ARRAYS, ArrayField, SequenceBatch

REAL_TOKENS = 512
SHAPE = {
    "vocab_size": 520,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.5,
}


def sequences(count: int = 9) -> list[TokenWindow]:
    """Of 2 to 12 tokens, three windows to a document, rows behind a prompt of one token."""
    drawn = np.random.default_rng(0)
    made = []
    for index in range(count):
        length = int(drawn.integers(2, 13))
        has_row = np.ones(length, np.bool_)
        has_row[[0, -1]] = False
        tokens = drawn.integers(0, REAL_TOKENS, length).astype(np.uint32)
        end_byte = np.zeros(length, np.uint32)
        made.append(
            TokenWindow(
                document=index // 3, window_start=index % 3, tokens=tokens, token_end_byte=end_byte, has_row=has_row
            )
        )
    return made


def test_a_corpus_gives_back_its_sequences_in_any_order() -> None:
    given = sequences()
    corpus = TokenizedCorpus(given)
    assert (len(corpus), corpus.tokens) == (9, sum(len(one) for one in given))
    assert corpus.lengths().tolist() == [len(one) for one in given]
    wanted = [7, 0, 0, 8, 3]
    batch = corpus.read(wanted, targets=False)
    for at, number in enumerate(wanted):
        one = part(batch, at, at + 1)
        assert one.tokens.tolist() == given[number].tokens.tolist()
        assert one.has_row.tolist() == given[number].has_row.tolist()
        assert one.rows == int(given[number].has_row.sum())
        assert (one.document[0], one.window_start[0]) == (number // 3, number % 3)
    again = join([part(batch, 0, 2), part(batch, 2, 5)])
    assert np.array_equal(again.row_offset, batch.row_offset)
    assert len(corpus.read([], targets=False)) == 0
    with pytest.raises(ValueError, match="live teacher"):
        corpus.read([0])


def test_a_field_added_to_rows_is_there_without_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    added = ArrayField(name="varentropy", axis="row", dtype=np.float32, stored="real", only_with=None, absent=0)
    wider = make_dataclass("Wider", [(added.name, Any)], bases=(SequenceBatch,), frozen=True, kw_only=True)
    monkeypatch.setattr(stages.batches.corpus, "SequenceBatch", wider)
    monkeypatch.setattr(stages.batches.corpus, "ARRAYS", (*ARRAYS, added))
    batch: Any = TokenizedCorpus(sequences()).read([1, 0], targets=False)
    assert batch.varentropy.dtype == np.float32
    assert batch.varentropy.tolist() == [0.0] * batch.rows


def split(given: list[TokenWindow], rule: HeldoutRule) -> tuple[TokenizedCorpus, TokenizedCorpus]:
    reading = split_corpus(iter(given), rule, documents=given[-1].document + 1)
    while True:
        try:
            next(reading)
        except StopIteration as end:
            return end.value


def test_documents_are_held_out_by_the_rule_of_a_store() -> None:
    rule = HeldoutRule(fraction=0.5, seed=3)
    given = sequences(60)
    train, heldout = split(given, rule)
    kept = [one for one in given if not rule.holds_out(one.document)]
    assert 0 < len(heldout) < 60
    assert len(train) + len(heldout) == 60
    assert train.read(range(len(train)), targets=False).tokens.tolist() == [
        token for one in kept for token in one.tokens.tolist()
    ]


def test_a_long_tokenisation_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.batches.corpus.TOKENS_BETWEEN_EVENTS", 50)
    given = sequences(60)  # of 20 documents
    expected, tokens = [], 0
    for one, end in zip(given, np.cumsum([len(one) for one in given]).tolist(), strict=True):
        if end >= tokens + 50:
            tokens = end
            expected.append((one.document + 1, end))
    told = list(split_corpus(iter(given), HeldoutRule(fraction=0.5, seed=3), documents=20))
    assert len(expected) > 3
    assert [(event.documents, event.tokens) for event in told] == expected
    for event in told:
        assert event.seconds_left == pytest.approx(event.seconds / event.documents * (20 - event.documents))


def saved(model: PreTrainedModel, tokenizer: Path, place: Path) -> Path:
    shutil.copytree(tokenizer, place)
    model.save_pretrained(place)
    return place


def packed(corpus: TokenizedCorpus) -> MicroBatch:
    return to_microbatch(corpus.read(range(len(corpus)), targets=False), with_targets=False)


@pytest.mark.parametrize(
    ("model_class", "config", "attention"),
    [
        (Gemma2ForCausalLM, Gemma2Config(**SHAPE, final_logit_softcapping=3.0), "eager"),
        (
            GraniteForCausalLM,
            GraniteConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, logits_scaling=4.0),
            "sdpa",
        ),
    ],
)
def test_rows_are_the_models_own_logits_with_cap_scale_and_padding(
    model_class: Any, config: Any, attention: str, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    directory = saved(model_class(config), tiny_tokenizer_dir, tmp_path / "teacher")
    device, attend = torch.device("cpu"), attention
    teacher = LiveTeacher.load(
        find_model(str(directory)), vocab_size=REAL_TOKENS, device=device, dtype=torch.float32, attention=attend
    )
    given = sequences()
    rows = teacher.rows(packed(TokenizedCorpus(given)))
    found = torch.empty(len(rows.hidden_ND), REAL_TOKENS)
    rows.head(REAL_TOKENS, torch.float32).fill(rows.hidden_ND, found)
    model = model_class.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        alone = [model(torch.from_numpy(one.tokens.astype(np.int64))[None]).logits[0] for one in given]
    expected = torch.cat([logits[torch.from_numpy(one.has_row)] for logits, one in zip(alone, given, strict=True)])
    torch.testing.assert_close(found, expected[:, :REAL_TOKENS], rtol=1e-4, atol=1e-4)
    assert rows.softcap == (3.0 if model_class is Gemma2ForCausalLM else None)
    assert rows.logit_multiplier == (1.0 if model_class is Gemma2ForCausalLM else 0.25)
