"""Phase 1 from configuration to sealed store, on the tiny teacher."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline import extract as phase
from pipeline.config.extract import ExtractConfig
from pipeline.extraction import events as extract_events
from pipeline.extraction import work
from pipeline.extraction.planning import build_plan, bytes_per_row
from stages.corpus.tokenizer import load_tokenizer
from storage.errors import IdentityError, NumericsError, OutOfSpaceError, UsageError
from storage.plan import Plan
from storage.reader import StoreReader
from storage.rows import SequenceBatch

K, DRAWS = 8, 4


@pytest.fixture
def config(tmp_path: Path, tiny_extraction: dict[str, Any]) -> dict[str, Any]:
    """Four shards, of which one is held out."""
    return {**tiny_extraction, "store": tmp_path / "store"}


@pytest.fixture
def copied_inputs(tmp_path: Path, tiny_teacher_dir: Path, tiny_corpus: Path) -> dict[str, Any]:
    """The keys that name copies of teacher and corpus, to be altered."""
    shutil.copytree(tiny_teacher_dir, tmp_path / "teacher")
    shutil.copy(tiny_corpus, tmp_path / "corpus.jsonl")
    return {
        "teacher": {"path": str(tmp_path / "teacher"), "dtype": "float32"},
        "corpus": [{"source": "jsonl", "path": str(tmp_path / "corpus.jsonl")}],
    }


def run(config: Mapping[str, Any], *, limit: int | None = None, **changes: Any) -> list[extract_events.Event]:
    return list(phase.extract(ExtractConfig.model_validate({**config, **changes}), limit=limit))


def summary(events: list[extract_events.Event]) -> extract_events.ExtractSummary:
    assert isinstance(events[-1], extract_events.ExtractSummary)
    return events[-1]


def tree(store: Path) -> dict[str, str]:
    """Hash of every file that counts; `recorded` of the plan may differ."""
    files = {path for path in store.rglob("*") if path.is_file() and path.name != "plan.json"}
    found = {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {**found, "plan.json": plan_of(store).store_id}


def plan_of(store: Path) -> Plan:
    return Plan.from_json((store / "plan.json").read_bytes())


def everything(store: Path, split: Any = "train") -> SequenceBatch:
    reader = StoreReader(store, split=split)
    return reader.read(list(range(len(reader))))


def test_events_of_a_run(config: dict[str, Any]) -> None:
    events = run(config)
    names = [type(event).__name__ for event in events]
    assert names[:2] == ["Started", "FirstRow"]
    assert names.count("FirstRow") == 1
    assert names[-1] == "ExtractSummary"
    done = [event for event in events if isinstance(event, extract_events.ShardDone)]
    assert [event.shard for event in done] == [0, 1, 2, 3]
    assert [event.split for event in done] == ["train", "train", "train", "heldout"]
    assert all(event.bytes > 0 and 0.0 < event.head_mass < 1.0 for event in done)
    progress = [event for event in events if isinstance(event, extract_events.Progress)]
    assert [event.rows for event in progress] == sorted(event.rows for event in progress)
    assert progress[-1].rows == progress[-1].rows_total == sum(event.rows for event in done)
    assert progress[-1].seconds_left == 0.0
    end = summary(events)
    assert (end.committed, end.shards, end.new_shards) == (4, 4, 4)
    assert end.new_rows == sum(event.rows for event in done)
    assert end.digest is not None


def test_first_row_shows_the_teacher(config: dict[str, Any], tiny_teacher_dir: Path) -> None:
    [first] = [event for event in run(config) if isinstance(event, extract_events.FirstRow)]
    assert first.context.startswith("The")
    assert len(first.candidates) == 5
    probabilities = [probability for _, probability in first.candidates]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) < first.head_mass < 1.0
    assert first.bytes_per_row == bytes_per_row(plan_of(config["store"]).target)


@pytest.mark.parametrize("prompt", [0, 10, 60, 120, 190])
def test_first_row_is_at_a_position_that_has_one(config: dict[str, Any], prompt: int) -> None:
    """Whatever the prompt hides: what is shown is a row of the store."""
    path, text = config["store"].parent / "pairs.jsonl", "".join(chr(97 + number**2 % 23) for number in range(200))
    path.write_text(json.dumps({"prompt": text[:prompt], "text": text[prompt:]}) + "\n")
    corpus = [{"source": "jsonl", "path": str(path), "prompt_field": "prompt"}]
    events = run(config, corpus=corpus, heldout={"fraction": 0.0}, rendering={"window": 256})
    [first] = [event for event in events if isinstance(event, extract_events.FirstRow)]
    batch, decode = everything(config["store"]), load_tokenizer(Path(config["teacher"]["path"])).decode
    tokens, rows = batch.tokens.tolist(), np.flatnonzero(batch.has_row)
    shown = next(at for at in rows if decode(tokens[: at + 1], skip_special_tokens=True) == first.context)
    assert first.following == decode([tokens[shown + 1]])
    assert shown == max((at for at in rows if at < work.CONTEXT_TOKENS), default=rows[0])


@torch.inference_mode()
def test_rows_are_the_teachers_distributions(config: dict[str, Any], tiny_teacher_dir: Path) -> None:
    """Each stored row against the full-vocabulary teacher on that window, within the codec's bound."""
    run(config)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher_dir, dtype=torch.float32)
    batch = everything(config["store"])
    assert batch.rows > 1000
    for index in range(len(batch)):
        tokens = slice(*batch.token_offset[index : index + 2])
        rows = slice(*batch.row_offset[index : index + 2])
        ids = torch.from_numpy(batch.tokens[tokens].astype(np.int64))
        wanted = np.flatnonzero(batch.has_row[tokens])
        logits = model(input_ids=ids[None]).logits[0, wanted, :512]  # 8 more rows of the head are padding
        expected = logits.log_softmax(-1).double().numpy()
        heads = slice(*batch.head_offset[index : index + 2])
        head_ids = batch.head_ids[heads].reshape(-1, K)
        found = batch.logprob[heads].reshape(-1, K)
        np.testing.assert_allclose(found, np.take_along_axis(expected, head_ids, 1), atol=0.15)
        np.testing.assert_allclose(found[:, 0], expected.max(1), atol=0.15)
        entropy = -(np.exp(expected) * expected).sum(1)
        np.testing.assert_allclose(batch.entropy[rows], entropy, atol=1e-2)
        after = np.take_along_axis(expected, ids.numpy()[wanted + 1][:, None], 1)[:, 0]
        np.testing.assert_allclose(batch.next_logprob[rows], after, atol=1.2e-2)
        mass = 1.0 / (1.0 + np.exp(batch.tail_logit[rows].astype(np.float64)))
        np.testing.assert_allclose(mass, np.exp(np.take_along_axis(expected, head_ids, 1)).sum(1), atol=3e-3)
    assert np.all(np.add.reduceat(batch.count, np.cumsum(batch.tail_size) - batch.tail_size) == DRAWS)


def test_each_document_token_has_one_row(config: dict[str, Any]) -> None:
    run(config)
    predicted: dict[int, list[int]] = {}
    for split in ("train", "heldout"):
        batch = everything(config["store"], split)
        for index in range(len(batch)):
            has_row = batch.has_row[slice(*batch.token_offset[index : index + 2])]
            positions = batch.window_start[index] + 1 + np.flatnonzero(has_row)
            predicted.setdefault(int(batch.document[index]), []).extend(positions.tolist())
    assert sorted(predicted) == list(range(40))
    assert all(sorted(found) == list(range(1, len(found) + 1)) for found in predicted.values())


def test_held_out_documents_are_apart(config: dict[str, Any]) -> None:
    run(config)
    rule = plan_of(config["store"]).heldout
    held_out = {number for number in range(40) if rule.holds_out(number)}
    assert 0 < len(held_out) < 20
    assert set(everything(config["store"], "heldout").document.tolist()) == held_out
    assert set(everything(config["store"]).document.tolist()) == set(range(40)) - held_out


def test_twice_the_same_bytes(config: dict[str, Any], tmp_path: Path) -> None:
    first = summary(run(config))
    second = summary(run(config, store=tmp_path / "again"))
    assert first.digest == second.digest
    assert tree(config["store"]) == tree(tmp_path / "again")


def test_in_pieces_the_same_bytes(config: dict[str, Any], tmp_path: Path) -> None:
    run(config, store=tmp_path / "whole")
    for committed in (1, 2, 3):
        end = summary(run(config, limit=1))
        assert (end.committed, end.new_shards, end.digest) == (committed, 1, None)
    events = run(config)
    assert [event.shard for event in events if isinstance(event, extract_events.ShardDone)] == [3]
    assert tree(config["store"]) == tree(tmp_path / "whole")


def test_again_does_nothing_and_needs_no_weights_in_memory(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = summary(run(config)).digest
    before = tree(config["store"])
    monkeypatch.setattr(phase, "load_teacher", lambda planned: pytest.fail("loaded the teacher for nothing"))
    end = summary(run(config))
    assert (end.digest, end.new_shards, end.tokens_per_second) == (digest, 0, None)
    assert tree(config["store"]) == before


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 3}, {"chunk_size": 7}])
def test_batches_and_chunks_do_not_change_float32_rows(
    changes: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    run(config)
    run(config, store=tmp_path / "other", **changes)
    ours, theirs = everything(config["store"]), everything(tmp_path / "other")
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    assert np.mean(ours.head_ids != theirs.head_ids) < 1e-3  # a last bit may swap two equals
    assert np.mean(ours.tail_size != theirs.tail_size) < 1e-3
    np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=1e-2)


def test_topk_rows_hold_no_samples(config: dict[str, Any]) -> None:
    run(config, target={"kind": "topk", "k": 3})
    batch = everything(config["store"])
    assert (batch.draws, len(batch.tail_ids)) == (0, 0)
    assert np.all(batch.head_size == 3)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"target": {"kind": "hybrid", "k": 4, "draws": DRAWS}}, "target.k: 8 -> 4"),
        ({"rendering": {"window": 32}}, "rendering.window: 64 -> 32"),
        ({"heldout": {"fraction": 0.5}}, "heldout.fraction: 0.15 -> 0.5"),
        ({"batch_size": 2}, "batching.sequences: None -> 2"),
    ],
)
def test_another_plan_is_refused(changes: dict[str, Any], field: str, config: dict[str, Any]) -> None:
    run(config, limit=1)
    before = tree(config["store"])
    with pytest.raises(IdentityError) as caught:
        run(config, **changes)
    assert field in str(caught.value)
    assert tree(config["store"]) == before


def test_a_changed_corpus_or_teacher_is_refused(
    config: dict[str, Any], tmp_path: Path, tiny_teacher_dir: Path, tiny_corpus: Path
) -> None:
    run(config, limit=1)
    other = tmp_path / "other.jsonl"
    other.write_text(tiny_corpus.read_text().replace("The", "Teh", 1))
    with pytest.raises(IdentityError, match=r"corpus\[0\]\.files\[0\]"):
        run(config, corpus=[{"source": "jsonl", "path": str(other)}])
    teacher = altered(tiny_teacher_dir, tmp_path / "teacher", 0.5)
    with pytest.raises(IdentityError, match=r"teacher\.files\.model\.safetensors"):
        run(config, teacher={"path": str(teacher), "dtype": "float32"})


def test_moved_teacher_and_corpus_are_the_same_store(
    config: dict[str, Any], tmp_path: Path, tiny_teacher_dir: Path, tiny_corpus: Path
) -> None:
    run(config, limit=1)
    shutil.copytree(tiny_teacher_dir, tmp_path / "moved")
    shutil.copy(tiny_corpus, tmp_path / "moved.jsonl")
    moved = {
        "teacher": {"path": str(tmp_path / "moved"), "dtype": "float32"},
        "corpus": [{"source": "jsonl", "path": str(tmp_path / "moved.jsonl")}],
    }
    assert summary(run(config, **moved)).digest is not None
    assert plan_of(config["store"]).recorded["teacher"]["name"] == str(tiny_teacher_dir)


def altered(teacher: Path, target: Path, value: float, name: str = "layers.0.mlp.down_proj", row: int = 0) -> Path:
    """Copy a teacher with one weight replaced."""
    shutil.copytree(teacher, target)
    weights = load_file(target / "model.safetensors")
    weights[f"model.{name}.weight"][row, 0] = value
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_teacher(value: float, config: dict[str, Any], tmp_path: Path, tiny_teacher_dir: Path) -> None:
    teacher = altered(tiny_teacher_dir, tmp_path / "broken", value)
    with pytest.raises(NumericsError, match="hold NaN or infinity"):
        run(config, teacher={"path": str(teacher), "dtype": "float32"})
    assert not config["store"].exists()


def test_a_teacher_that_breaks_at_one_token(config: dict[str, Any], tmp_path: Path, tiny_teacher_dir: Path) -> None:
    """The error names the document with the token whose embedding is NaN. (Attention spreads it within the document,
    backwards too: a masked weight of 0 times NaN is NaN.)"""
    counts = build_plan(ExtractConfig.model_validate(config)).sample.counts
    batch = run_and_read(config)
    token = next(int(index) for index in np.argsort(counts) if counts[index] and index not in batch.tokens[:1000])
    teacher = altered(tiny_teacher_dir, tmp_path / "broken", math.nan, "embed_tokens", token)
    with pytest.raises(NumericsError) as caught:
        run(config, store=tmp_path / "other", teacher={"path": str(teacher), "dtype": "float32"})
    found = re.fullmatch(r"document (\d+), position (\d+)", str(caught.value.where))
    assert found is not None
    whole = document_tokens(config, int(found[1]))
    assert token in whole
    assert int(found[2]) < len(whole)


def run_and_read(config: Mapping[str, Any]) -> SequenceBatch:
    run(config)
    return everything(Path(config["store"]))


def document_tokens(config: Mapping[str, Any], number: int) -> list[int]:
    """Return the tokens of a document, read from the store."""
    for split in ("train", "heldout"):
        batch = everything(Path(config["store"]), split)
        tokens: dict[int, int] = {}
        for index in np.flatnonzero(batch.document == number):
            part = batch.tokens[slice(*batch.token_offset[index : index + 2])].tolist()
            tokens.update(enumerate(part, start=int(batch.window_start[index])))
        if tokens:
            return [tokens[position] for position in sorted(tokens)]
    raise AssertionError(f"document {number} is not in the store")


def test_nothing_is_written_for_bad_input(config: dict[str, Any], tmp_path: Path, tiny_teacher_dir: Path) -> None:
    broken = tmp_path / "truncated"
    shutil.copytree(tiny_teacher_dir, broken)
    (broken / "model.safetensors").write_bytes(b"short")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": ""}\n')
    source = config["corpus"][0]
    for changes, what in (
        ({"corpus": [{**source, "path": str(tmp_path / "absent.jsonl")}]}, "no such file"),
        ({"corpus": [{**source, "path": str(empty)}]}, "corpus is empty"),
        ({"corpus": [{**source, "path": str(short)}]}, "no target row"),
        ({"corpus": [{**source, "field": "body"}]}, "no field 'body'; the fields are 'text', 'number'"),
        ({"target": {"k": 513}}, "k = 513 is more than the vocabulary of 512 tokens"),
        ({"teacher": {"path": str(tmp_path / "absent")}}, "no model directory"),
        ({"teacher": {"path": str(broken)}}, "cannot load the model"),
        ({"rendering": {"window": 513}}, "window = 513 is more than the 512 positions that the teacher knows"),
        ({"device": "cuda:99"}, "not available"),
    ):
        with pytest.raises(UsageError) as caught:
            run(config, **changes)
        assert what in str(caught.value)
        assert caught.value.where is not None
        assert not config["store"].exists()


@pytest.mark.parametrize("name", ["corpus.jsonl", "teacher/model.safetensors"])
@pytest.mark.parametrize("moment", [extract_events.Progress, extract_events.ShardDone])
def test_a_file_edited_during_the_run(
    moment: type, name: str, config: dict[str, Any], tmp_path: Path, copied_inputs: dict[str, Any]
) -> None:
    """No row of another text or teacher gets into the store (weights on a CPU are mapped from their file). With the
    content back, the same call ends as if nothing had been."""
    edited, path = {**config, **copied_inputs}, tmp_path / name
    content = path.read_bytes()
    events = phase.extract(ExtractConfig.model_validate(edited))
    while not isinstance(next(events), moment):
        pass
    path.write_bytes(content[:-1000] + bytes(1000))
    with pytest.raises(IdentityError, match="changed while it was being read") as caught:
        list(events)
    assert caught.value.where == str(path)
    path.write_bytes(content)
    committed = len(list((config["store"] / "commits").iterdir()))
    assert summary(run(edited)).new_shards == 4 - committed
    run(config, store=tmp_path / "whole")
    assert tree(config["store"]) == tree(tmp_path / "whole")


def test_a_teacher_replaced_before_it_is_loaded(config: dict[str, Any], copied_inputs: dict[str, Any]) -> None:
    planned = build_plan(ExtractConfig.model_validate({**config, **copied_inputs}))
    other = altered(Path(copied_inputs["teacher"]["path"]), config["store"].parent / "other", 0.5)
    (other / "model.safetensors").replace(copied_inputs["teacher"]["path"] + "/model.safetensors")
    with pytest.raises(IdentityError, match="changed while it was being read"):
        work.load_teacher(planned)


@pytest.mark.parametrize("words", [None, "MPS backend out of memory", "DefaultCPUAllocator: not enough memory"])
def test_out_of_memory_gives_advice(words: str | None, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.teacher.hf import HFTeacher

    def full(self: HFTeacher, hidden_ND: torch.Tensor) -> torch.Tensor:
        if len(hidden_ND) > 64:
            if words is not None:
                raise RuntimeError(words)
            return torch.empty(2**60)  # a real failure of the allocator
        return self.head(hidden_ND)

    monkeypatch.setattr(HFTeacher, "logits", full)
    with pytest.raises(OutOfSpaceError) as caught:
        run(config)
    assert "chunk_size" in str(caught.value)


def test_a_store_inside_a_file(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    with pytest.raises(UsageError, match="path is a file"):
        run(config, store=tmp_path / "file")


def test_tokenizer_travels_with_the_store(tiny_store: Path) -> None:
    plan = plan_of(tiny_store)
    assert "tokenizer.json" in plan.tokenizer["files"]
    assert plan.tokenizer["special_tokens"] == {"bos": 0, "eos": 1, "pad": 2}
    assert (tiny_store / "tokenizer").is_dir()
