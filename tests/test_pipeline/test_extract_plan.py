"""Plans and estimates: pure functions of configuration and content, right without loading a weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from pipeline.config.extract import ExtractConfig, TargetConfig
from pipeline.extract import extract
from pipeline.extraction import planning, survey
from pipeline.extraction.events import ExtractSummary
from pipeline.extraction.foresight import stored_size
from pipeline.extraction.planning import build_plan, bytes_per_row, estimate
from pipeline.extraction.survey import sample_rounds
from storage.commit import bounds
from storage.commit.manifest import compress_tokenizer_file
from storage.errors import UsageError
from storage.reader import StoreReader


@pytest.fixture
def config(tmp_path: Path, tiny_extraction: dict[str, Any]) -> dict[str, Any]:
    return {**tiny_extraction, "store": tmp_path / "store"}


def test_plan_is_a_pure_function(config: dict[str, Any]) -> None:
    first, second = (build_plan(ExtractConfig.model_validate(config)) for _ in range(2))
    assert first.plan.store_id == second.plan.store_id
    semantic = json.dumps(first.plan.semantic())
    assert str(config["teacher"]["path"]) not in semantic
    assert str(config["corpus"][0]["path"]) not in semantic
    assert first.plan.vocab_size == 512
    assert first.plan.recorded["libraries"]["torch"] == torch.__version__
    counts = first.sample.counts
    assert np.all(np.diff(counts[first.remap]) <= 0)
    assert first.sample.documents == first.plan.documents


def test_what_a_stage_refuses_is_told_with_the_configurations_key(config: dict[str, Any], tmp_path: Path) -> None:
    for changes, where in (
        ({"corpus": [{"source": "jsonl", "path": str(tmp_path / "absent")}]}, "corpus.path, relative to "),
        ({"corpus": [{"source": "dataset", "path": str(tmp_path), "split": "x"}]}, "corpus.name: None, split: 'x'"),
        ({"target": {"k": 600}}, "target.k"),
    ):
        with pytest.raises(UsageError) as caught:
            estimate(ExtractConfig.model_validate({**config, **changes}))
        assert str(caught.value.where).startswith(where)


def test_documents_per_shard_auto(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config["documents_per_shard"] = "auto"
    assert build_plan(ExtractConfig.model_validate(config)).plan.documents_per_shard > 40
    monkeypatch.setattr(planning, "ROWS_PER_SHARD", 1000)
    planned = build_plan(ExtractConfig.model_validate(config))
    rows = planned.sample.rows / 40 * 0.85 * planned.plan.documents_per_shard
    assert abs(rows - 1000) < 100


def test_more_sequences_than_a_shard_may_have_are_refused(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "LARGEST_SEQUENCES", 16)
    estimate(ExtractConfig.model_validate({**config, "documents_per_shard": 1}))
    for plan in (estimate, build_plan):
        with pytest.raises(UsageError, match=r"100 documents would put about .* shard, which may hold 16") as caught:
            plan(ExtractConfig.model_validate({**config, "documents_per_shard": 100}))
        assert caught.value.where == "documents_per_shard"


def test_estimate_against_the_truth(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checked = ExtractConfig.model_validate(config)
    before = estimate(checked)
    assert (before.tokens_per_second, before.rate_source, before.seconds) == (None, None, None)
    given = estimate(checked, tokens_per_second=100.0)
    assert given.seconds == pytest.approx(given.tokens / 100.0)
    *_, end = extract(checked)
    assert isinstance(end, ExtractSummary)
    after = estimate(checked)
    assert after.exact
    assert (after.documents, after.shards) == (40, 4)
    assert (after.rows, after.tokens) == (end.new_rows, end.new_tokens)
    assert after.rate_source == "measured"
    assert after.seconds is not None
    rate = end.tokens_per_second
    assert rate is not None
    assert after.seconds == pytest.approx(end.new_tokens / rate, rel=0.5)
    held_out = StoreReader(config["store"], split="heldout")
    assert after.heldout_documents == len(set(held_out.read(list(range(len(held_out)))).document.tolist()))


@pytest.mark.parametrize(
    ("target", "measured"),
    [
        ({"kind": "hybrid", "k": 12, "draws": 4}, 34.0),
        ({"kind": "hybrid", "k": 32, "draws": 8}, 72.4),
        ({"kind": "topk", "k": 64}, 112.5),
        ({"kind": "sampled"}, 29.3),
    ],
)
def test_estimated_bytes_are_those_of_real_text(target: dict[str, Any], measured: float) -> None:
    """SmolLM2 on the Python documentation, shards and records."""
    assert bytes_per_row(TargetConfig(**target).spec()) == pytest.approx(measured, rel=0.03)


def test_estimate_of_ragged_heads_is_a_bound(config: dict[str, Any]) -> None:
    topp = ExtractConfig.model_validate({**config, "target": {"kind": "topp", "k": 8, "p": 0.9}})
    topk = ExtractConfig.model_validate({**config, "target": {"kind": "topk", "k": 8}})
    assert estimate(topp).at_most
    assert not estimate(topk).at_most
    assert estimate(topp).bytes == estimate(topk).bytes
    assert "mass 0.9, at most 8" in estimate(topp).contents


def test_estimate_from_a_sample(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    exact = estimate(ExtractConfig.model_validate(config))
    monkeypatch.setattr(survey, "SAMPLE_TOKENS", 1500)
    sampled = estimate(ExtractConfig.model_validate(config))
    assert not sampled.exact
    assert sampled.tokens == pytest.approx(exact.tokens, rel=0.3)


@pytest.mark.parametrize("count", [1, 2, 7, 40, 1000])
def test_sample_rounds_visit_everything_evenly(count: int) -> None:
    rounds = list(sample_rounds(count))
    assert sorted(number for numbers in rounds for number in numbers) == list(range(count))
    assert all(numbers == sorted(numbers) for numbers in rounds)
    if count == 1000:
        taken = sorted(number for numbers in rounds[:3] for number in numbers)
        assert len(taken) == 64
        assert np.diff(taken).max() <= 3 * 1000 // 64


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_window_against_the_teachers_positions(
    architecture: str, config: dict[str, Any], tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """`n_positions` counts as `max_position_embeddings` does; the greatest window is allowed."""
    directory = tmp_path / "teacher"
    shutil.copytree(tiny_tokenizer_dir, directory)
    limit = {"llama": "max_position_embeddings", "gpt2": "n_positions"}[architecture]
    AutoConfig.for_model(architecture, **{limit: 100, "vocab_size": 520}).save_pretrained(directory)
    for window in (100, 101):
        changed = {**config, "teacher": {"path": str(directory)}, "rendering": {"window": window}}
        checked = ExtractConfig.model_validate(changed)
        if window == 100:
            assert estimate(checked).rows > 0
        else:
            with pytest.raises(UsageError, match="window = 101 is more than the 100 positions") as caught:
                estimate(checked)
            assert caught.value.fix == "set rendering.window to at most 100"


def test_a_device_is_refused_before_anything_is_tokenised(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "take_sample", lambda *arguments: pytest.fail("tokenised for nothing"))
    with pytest.raises(UsageError, match="unknown device 'abacus'"):
        estimate(ExtractConfig.model_validate({**config, "device": "abacus"}))


def test_the_planned_size_has_the_tokenizer_and_the_remap(config: dict[str, Any]) -> None:
    """A corpus of a few documents, where they are most of the store."""
    few = {**config, "target": {"kind": "topk", "k": 2}, "heldout": {"fraction": 0.0}, "documents_per_shard": 40}
    estimated = estimate(ExtractConfig.model_validate(few)).bytes
    list(extract(ExtractConfig.model_validate(few)))
    fixed = sum(path.stat().st_size for path in [config["store"] / "remap", *(config["store"] / "tokenizer").iterdir()])
    rows = StoreReader(config["store"]).rows
    assert estimated == fixed + round(rows * bytes_per_row(TargetConfig(kind="topk", k=2).spec()))


def test_the_size_of_a_large_file_is_estimated_from_pieces() -> None:
    assert stored_size(b"a token " * 99) == len(compress_tokenizer_file(b"a token " * 99))
    noise = np.random.default_rng(0).bytes(6 << 20)
    assert stored_size(noise) == pytest.approx(len(noise), rel=0.01)


@pytest.mark.parametrize(
    ("k", "temperatures", "told"), [(32, [2.0], ["2"]), (32, [1.1], []), (8, [1.1, 1.5, 2.0], ["1.5", "2"])]
)
def test_a_plan_says_which_temperatures_leave_little_in_the_head(
    k: int, temperatures: list[float], told: list[str], config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    asked = ExtractConfig.model_validate({**config, "target": {"k": k, "temperatures": temperatures}})
    notes = estimate(asked).notes
    assert [note.split(" about ")[0] for note in notes] == [f"at temperature {at}" for at in told]
    assert all(f"its {k} likeliest" in note for note in notes)
    build_plan(asked)
    assert [record.message for record in caplog.records] == list(notes)
