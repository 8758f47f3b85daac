"""Rules that version 0.1 did not have: told before the teacher reads, and stated by the plans they change alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase

from pipeline.cli import main
from pipeline.config.extract import ExtractConfig
from pipeline.config.train import TrainConfig
from pipeline.demo.settings import DemoSettings
from pipeline.extract import extract
from pipeline.extraction import survey
from pipeline.extraction.planning import build_plan, estimate
from pipeline.train import train
from pipeline.training.data import open_training_data
from stages.corpus.tokenizer import load_tokenizer
from storage.errors import IdentityError
from storage.plan import Plan
from storage.reader import StoreReader
from storage.writer import StoreWriter

KEYS_OF_01 = {"input", "window", "overlap", "min_tokens", "bos", "eos"}
PLAIN = [{"prompt": "The import statement", "text": f" binds a name, number {number}."} for number in range(8)]
PROMPTED = {"prompt_field": "prompt"}
# By key of the plan: one document that brings it, how the corpus is read, and what `plan` says.
RULES: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "byte_order_mark": ({"text": "\ufeffThe end."}, {}, "1 document begins with a byte order mark"),
    "begin_token": ({"text": "<s>The end."}, {}, "1 document begins with the begin token: no second one"),
    "end_token": ({"text": "The end.</s>\n"}, {}, "1 document ends with the end token: no second one"),
    "token_end": ({"text": "un cafe\u0301"}, {}, ""),
    "prompt_border": ({"prompt": "The stat", "text": "ement"}, PROMPTED, "1 document would merge prompt and text"),
    "too_long": ({"prompt": "code 4711. " * 40, "text": "4711"}, PROMPTED, "1 document with a prompt that fills"),
}


@pytest.fixture
def normalising_teacher(tiny_teacher_dir: Path, tmp_path: Path) -> Path:
    """The tiny teacher, whose tokenizer composes characters."""
    directory = tmp_path / "teacher"
    directory.mkdir()
    for file in tiny_teacher_dir.iterdir():
        (directory / file.name).symlink_to(file)
    tokenizer = Tokenizer.from_file(str(tiny_teacher_dir / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    (directory / "tokenizer.json").unlink()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def configuration(
    rule: str | None, place: Path, teacher: Path, *, documents: list[dict[str, str]] | None = None
) -> dict[str, Any]:
    """An extraction of plain documents, and of one that a rule changes."""
    odd, reading, _ = RULES[rule] if rule else ({}, PROMPTED, "")
    lines = documents or [*PLAIN, *([{"prompt": "", **odd}] if odd else [])]
    (place / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "store": str(place / "store"),
        "teacher": {"path": str(teacher), "dtype": "float32"},
        "corpus": [{"source": "jsonl", "path": str(place / "corpus.jsonl"), **reading}],
        "rendering": {"window": 64, "overlap": 8, "bos": "always"},
        "target": {"kind": "topk", "k": 4},
        "documents_per_shard": 4,
        "device": "cpu",
    }


def of_01(plan: Plan) -> Plan:
    """The same plan as version 0.1 would have written it."""
    return replace(plan, rendering={key: value for key, value in plan.rendering.items() if key in KEYS_OF_01})


@pytest.mark.parametrize("rule", RULES)
def test_a_plan_states_the_rule_that_changes_it(rule: str, tmp_path: Path, normalising_teacher: Path) -> None:
    """`plan` tells the count, `extract` refuses the store that 0.1 began, and readers open what is written."""
    values = configuration(rule, tmp_path, normalising_teacher)
    planned = build_plan(ExtractConfig.model_validate(values))
    assert set(planned.plan.rendering) - KEYS_OF_01 == {rule}
    assert Plan.from_json(planned.plan.to_json()).store_id == planned.plan.store_id != of_01(planned.plan).store_id

    config = tmp_path / "extract.yaml"
    config.write_text(json.dumps(values))
    told = CliRunner().invoke(main, ["plan", str(config)])
    assert told.exit_code == 0
    assert RULES[rule][2] in told.output
    StoreWriter.create(
        tmp_path / "store", of_01(planned.plan), remap=planned.remap, tokenizer_files=planned.tokenizer_files
    )
    refused = CliRunner().invoke(main, ["extract", str(config)])
    assert refused.exit_code == 3
    assert f"rendering.{rule}: not stated -> '{planned.plan.rendering[rule]}'" in refused.output

    list(extract(ExtractConfig.model_validate({**values, "store": tmp_path / "new"})))
    assert len(StoreReader(tmp_path / "new")) >= len(PLAIN)


def test_a_plan_that_no_rule_changes_is_that_of_01(tmp_path: Path, normalising_teacher: Path) -> None:
    values = configuration(None, tmp_path, normalising_teacher)
    for changes in ({}, {"corpus": [{"source": "topics"}]}):
        planned = build_plan(ExtractConfig.model_validate({**values, **changes}))
        rendering = {"input": "text", "window": 64, "overlap": 8, "min_tokens": 2, "bos": 0, "eos": 1}
        assert planned.plan.rendering == rendering
        assert planned.notes == ()


def test_the_demo_plan_is_that_of_01(tmp_path: Path, tiny_teacher_dir: Path) -> None:
    values = DemoSettings().extract_config(tmp_path) | {"teacher": {"path": str(tiny_teacher_dir)}}
    planned = build_plan(ExtractConfig.model_validate(values))
    rendering = {"input": "text", "window": 512, "overlap": 0, "min_tokens": 2, "bos": None, "eos": 1}
    assert planned.plan.rendering == rendering


def test_a_rule_is_found_beyond_the_sample(
    tmp_path: Path, normalising_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = configuration("end_token", tmp_path, normalising_teacher, documents=PLAIN * 8)
    lines = (tmp_path / "corpus.jsonl").read_text().splitlines()
    lines[1] = json.dumps(RULES["end_token"][0])
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(survey, "SAMPLE_TOKENS", 1)
    planned = build_plan(ExtractConfig.model_validate(values))
    assert planned.sample.documents < len(planned.corpus)
    assert planned.plan.rendering["end_token"] == "once"
    assert planned.notes == ("a few documents end with the end token: no second one is put behind",)


def test_counts_are_extrapolated(tmp_path: Path, normalising_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = configuration("end_token", tmp_path, normalising_teacher, documents=[{"text": "a b </s> c"}] * 64)
    monkeypatch.setattr(survey, "SAMPLE_TOKENS", 1)
    (note,) = estimate(ExtractConfig.model_validate(values)).notes
    assert note.startswith("about 64 documents spell special tokens, which are read as such (</s>: 64)")


@pytest.mark.parametrize("special_tokens", ["parse", "text"])
def test_special_tokens_in_prose(special_tokens: str, tmp_path: Path, normalising_teacher: Path) -> None:
    values = configuration("end_token", tmp_path, normalising_teacher, documents=[{"text": "a b </s> c"}] * 4)
    values["rendering"]["special_tokens"] = special_tokens
    planned = build_plan(ExtractConfig.model_validate(values))
    list(extract(ExtractConfig.model_validate(values)))
    tokens = StoreReader(tmp_path / "store").read([0]).tokens
    assert np.count_nonzero(tokens == 1) == (2 if special_tokens == "parse" else 1)
    assert ("special_tokens" in planned.plan.rendering) == (special_tokens == "text")
    assert bool(planned.notes) == (special_tokens == "parse")


def online(values: dict[str, Any], run: Path, **changes: Any) -> TrainConfig:
    teacher = values["teacher"]
    return TrainConfig.model_validate(
        {
            "teacher_model": teacher,
            "corpus": values["corpus"],
            "rendering": values["rendering"],
            "run": run,
            "student": {"init": "layers_of_teacher", "path": teacher["path"], "layers": 1},
            "steps": 1,
            "tokens_per_step": 128,
            "dtype": "float32",
            "device": "cpu",
            **changes,
        }
    )


@pytest.mark.parametrize("rule", RULES)
def test_an_online_run_of_01_is_refused_by_name(rule: str, tmp_path: Path, normalising_teacher: Path) -> None:
    config = online(configuration(rule, tmp_path, normalising_teacher), tmp_path / "run")
    events: list[Any] = list(train(config))
    assert (
        any(RULES[rule][2] in " ".join(event.notes) for event in events if hasattr(event, "notes"))
        or rule == "token_end"
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(record["store"]["identity"]["rendering"]) - KEYS_OF_01 == {rule}
    del record["store"]["identity"]["rendering"][rule]
    record["store"]["digest"] = "0" * 64
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(IdentityError, match=rf"rendering\.{rule}: not stated -> ") as caught:
        list(train(config))
    assert caught.value.exit_code == 3


def test_online_and_stored_sequences_are_the_same(tmp_path: Path, normalising_teacher: Path) -> None:
    """With every rule at work, each in one document."""
    odd = [{"prompt": "", **document} for document, _, _ in RULES.values()]
    values = configuration("too_long", tmp_path, normalising_teacher, documents=[*PLAIN, *odd])
    list(extract(ExtractConfig.model_validate(values)))
    stored = StoreReader(tmp_path / "store")
    data = open_training_data(online(values, tmp_path / "run"))
    assert set(stored.plan.rendering) - KEYS_OF_01 == set(RULES)
    assert data.record["identity"]["rendering"] == dict(stored.plan.rendering)
    assert len(stored) == len(data.train) == len(PLAIN) + len(RULES) - 1
    everything = list(range(len(stored)))
    ours, theirs = data.train.read(everything, targets=False), stored.read(everything)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.has_row, theirs.has_row)


CHATS = {
    "begin in the template": ("{{ bos_token }}Q: {{ messages[0]['content'] }} A:", "always"),
    "none in the template": ("Q: {{ messages[0]['content'] }} A:", "always"),
    "none at all": ("Q: {{ messages[0]['content'] }} A:", "never"),
    "in the template alone": ("{{ bos_token }}Q: {{ messages[0]['content'] }} A:", "never"),
}


@pytest.mark.parametrize(("template", "bos"), CHATS.values(), ids=CHATS)
def test_a_question_has_the_ids_that_training_had(
    template: str, bos: str, tmp_path: Path, normalising_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run learns rendered conversations; `generate --chat` asks with the same beginning, one begin token or none."""
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(normalising_teacher)
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "why"}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False)) + " since"
    values = configuration(None, tmp_path, normalising_teacher, documents=[{"prompt": "", "text": text}] * 4)
    values["rendering"]["bos"] = bos
    list(extract(ExtractConfig.model_validate(values)))
    config = online(values, tmp_path / "run", store=tmp_path / "store", teacher_model=None, corpus=None, rendering=None)
    list(train(config))
    (tmp_path / "run" / "model" / "chat_template.jinja").write_text(template)
    asked: list[list[int]] = []
    forward = "transformers.LlamaForCausalLM.generate"
    monkeypatch.setattr(forward, lambda self, ids, **rest: (asked.append(ids[0].tolist()), ids)[1])
    from pipeline.generate import generate

    list(generate(tmp_path / "run", "why", chat=True, max_new_tokens=1, device="cpu", dtype="float32"))
    learned = StoreReader(tmp_path / "store").read([0]).tokens.tolist()
    assert learned[: len(asked[0])] == asked[0]
    assert asked[0].count(0) == (0 if bos == "never" and "bos" not in template else 1)
