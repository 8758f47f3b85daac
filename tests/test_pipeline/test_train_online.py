"""pipeline.train with a live teacher: it learns, resumes exactly, refuses what is not its own, and needs no store."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from pipeline.cli import main
from pipeline.config.train import TrainConfig
from pipeline.terminal.progress import Lines, tell_train
from pipeline.train import train
from pipeline.training.data import open_training_data
from pipeline.training.estimate import dry_run
from pipeline.training.events import Finished, Started, StepDone, Validated
from pipeline.training.recipe import Recipe, build_learner
from stages.batches.microbatch import MicroBatch
from stages.devices import resolve_dtype
from stages.losses import TeacherHead
from stages.teacher.live import LiveTeacher
from stages.training.metrics import read_metrics
from storage.errors import IdentityError, UsageError

MakeConfig = Callable[..., TrainConfig]
TIME_KEYS = {"seconds", "tokens_per_second"}


@pytest.fixture
def configure(tiny_teacher_dir: Path, tiny_corpus: Path, tmp_path: Path) -> MakeConfig:
    """An online configuration of a two-layer student, with changes; None removes a key."""

    def make(**changes: Any) -> TrainConfig:
        values = {
            "teacher_model": {"path": str(tiny_teacher_dir), "dtype": "float32"},
            "corpus": [{"source": "jsonl", "path": str(tiny_corpus)}],
            "rendering": {"window": 64, "overlap": 8},
            "heldout": {"fraction": 0.15},
            "run": tmp_path / "run",
            "student": {"init": "layers_of_teacher", "path": str(tiny_teacher_dir), "layers": 2},
            "steps": 6,
            "tokens_per_step": 256,
            "tokens_per_batch": 128,
            "chunk_size": 48,
            "dtype": "float32",
            "device": "cpu",
            "optimizer": {"lr": 3e-3},
            "checkpoint": {"every": 2},
            "validation": {"every": 3, "sequences": 4},
            **changes,
        }
        return TrainConfig.model_validate({key: value for key, value in values.items() if value is not None})

    return make


def curve(run: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIME_KEYS} for line in lines]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("file", ["taken", "taken/config.json"])
def test_a_directory_of_something_else_is_refused_before_the_corpus_is_read(
    file: str, configure: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(UsageError, match=r"is a file|not a run directory") as caught:
        next(train(configure(run=tmp_path / "taken", corpus=[{"source": "jsonl", "path": str(tmp_path / "none")}])))
    assert caught.value.where == str(tmp_path / "taken")


def test_the_student_learns_from_the_live_teacher_alone(configure: MakeConfig, tiny_teacher_dir: Path) -> None:
    student = {"init": "from_config", "path": str(tiny_teacher_dir), "overrides": {"num_hidden_layers": 1}}
    config = configure(student=student, steps=60, kd_ratio=1.0, validation={"every": 60, "sequences": 64})
    events = list(train(config))
    first, *_, last = (event for event in events if isinstance(event, StepDone))
    (held_out,) = (event for event in events if isinstance(event, Validated))
    assert first.kd is not None
    assert held_out.kd is not None
    assert last.kd is not None
    assert first.ce is None
    assert last.kd < 0.6 * first.kd
    assert held_out.kd < 0.6 * first.kd
    AutoModelForCausalLM.from_pretrained(config.run / "model")
    card = (config.run / "model" / "README.md").read_text()
    assert "the live teacher's next-token distributions" in card
    assert str(tiny_teacher_dir) not in card


def test_a_student_that_is_the_teacher_has_nothing_to_learn(configure: MakeConfig, tiny_teacher_dir: Path) -> None:
    student = {"init": "pretrained", "path": str(tiny_teacher_dir)}
    events = list(train(configure(student=student, steps=1, kd_ratio=1.0)))
    (step,) = (event for event in events if isinstance(event, StepDone))
    assert step.kd == pytest.approx(0.0, abs=1e-9)
    assert step.grad_norm < 1e-5


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_run_that_was_interrupted_goes_on_to_the_same_end(
    stop_after: int, configure: MakeConfig, tmp_path: Path
) -> None:
    list(train(configure(run=tmp_path / "reference")))
    events = train(configure())
    for event in events:
        if isinstance(event, StepDone) and event.step == stop_after:
            break
    events.close()  # type: ignore[attr-defined]  # a generator
    started, *_, finished = train(configure())
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert started.step == (stop_after - 1) // 2 * 2
    assert curve(tmp_path / "run") == curve(tmp_path / "reference")
    assert weights(tmp_path / "run") == weights(tmp_path / "reference")


@pytest.mark.parametrize(
    "loss",
    [
        {"divergence": "reverse_kl", "temperature": 2.0},
        {"divergence": "jsd(0.3)", "logits_scale": 1.5},
        {"divergence": "tvd", "target_logits_scale": 0.5},
    ],
)
def test_divergences_and_temperatures_that_stores_cannot_serve(loss: dict[str, Any], configure: MakeConfig) -> None:
    config = configure(loss=loss, steps=20, kd_ratio=1.0)
    first, *_, last = (event for event in train(config) if isinstance(event, StepDone))
    assert last.loss < first.loss


def test_cross_entropy_alone_builds_no_teacher_and_sees_the_same_tokens(
    configure: MakeConfig, tiny_teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(train(configure(run=tmp_path / "kd")))
    bare = tmp_path / "tokenizer-and-config-only"
    shutil.copytree(tiny_teacher_dir, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    config = configure(teacher_model={"path": str(bare)}, kd_ratio=0.0)
    data = open_training_data(config)
    assert build_learner(config, data, Recipe.of(config, data)).teacher is None
    list(train(config))
    ours, theirs = curve(tmp_path / "run"), curve(tmp_path / "kd")
    assert [line.get("tokens") for line in ours] == [line.get("tokens") for line in theirs]
    assert ours[0]["ce"] == pytest.approx(theirs[0]["ce"], rel=1e-6)
    assert ours[0]["kd"] is None


def test_the_seed_orders_the_sequences(configure: MakeConfig, tmp_path: Path) -> None:
    """Weights of a student that is made of the teacher's layers know no seed."""
    curves = []
    for run, seed in (("first", 0), ("same", 0), ("other", 1)):
        list(train(configure(run=tmp_path / run, seed=seed, steps=2, kd_ratio=0.0)))
        curves.append([line["ce"] for line in curve(tmp_path / run) if line["event"] == "step"])
    first, same, other = curves
    assert first == same
    assert all(abs(one - another) > 1e-3 for one, another in zip(first, other, strict=True))


def other_teacher(teacher: Path, place: Path) -> Path:
    shutil.copytree(teacher, place)
    model = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    model.save_pretrained(place)
    return place


def test_another_corpus_rendering_or_teacher_is_refused_and_named(
    configure: MakeConfig, tiny_corpus: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    list(train(configure()))
    moved_corpus, moved_teacher = tmp_path / "moved.jsonl", tmp_path / "moved"
    shutil.copy(tiny_corpus, moved_corpus)
    shutil.copytree(tiny_teacher_dir, moved_teacher)
    moved = {"corpus": [{"source": "jsonl", "path": str(moved_corpus)}]}
    again = list(train(configure(**moved, teacher_model={"path": str(moved_teacher), "dtype": "float32"})))
    assert isinstance(again[-1], Finished)
    assert again[-1].already

    moved_corpus.write_text(moved_corpus.read_text() + '{"text": "one more document of a few words"}\n')
    other = other_teacher(tiny_teacher_dir, tmp_path / "other")
    for changes, named in (
        (moved, r"corpus\[0\]\.files\[0\]"),
        ({"rendering": {"window": 32}}, "rendering.overlap: 8 -> 0; rendering.window: 64 -> 32"),
        ({"heldout": None}, "heldout.fraction: 0.15 -> 0.0"),
        ({"teacher_model": {"path": str(tiny_teacher_dir), "dtype": "bfloat16"}}, "teacher.dtype: 'float32' -> 'bf"),
        ({"teacher_model": {"path": str(other), "dtype": "float32"}}, r"teacher\.files\.model\.safetensors"),
    ):
        with pytest.raises(IdentityError, match=named) as caught:
            list(train(configure(**changes)))
        assert caught.value.exit_code == 3


def test_what_auto_meant_on_another_machine_is_named(configure: MakeConfig, tiny_teacher_dir: Path) -> None:
    here = resolve_dtype("auto", torch.device("cpu"))
    elsewhere = "float32" if here == torch.bfloat16 else "bfloat16"
    list(train(configure(steps=2, teacher_model={"path": str(tiny_teacher_dir), "dtype": elsewhere})))
    with pytest.raises(IdentityError, match=rf"teacher\.dtype: '{elsewhere}' -> ") as caught:
        list(train(configure(steps=2, teacher_model={"path": str(tiny_teacher_dir)})))
    assert str(caught.value.fix).startswith(f"set the teacher's dtype to {elsewhere};")


def test_reading_a_long_corpus_is_told(
    configure: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stages.batches.corpus.TOKENS_BETWEEN_EVENTS", 1000)
    events = train(configure())
    tell_train(next(events), Lines())
    events.close()  # type: ignore[attr-defined]  # a generator
    told = capsys.readouterr().err
    assert re.fullmatch(r" *\d+%  \d+ of 40 documents tokenised  [\d,]+ tokens/s  [\d.]+ s left\n", told), told


def test_a_teacher_that_changes_after_it_was_hashed_is_refused(
    configure: MakeConfig, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    place = tmp_path / "teacher"
    shutil.copytree(tiny_teacher_dir, place)
    config = configure(teacher_model={"path": str(place), "dtype": "float32"})
    data = open_training_data(config)
    shutil.rmtree(place)
    other_teacher(tiny_teacher_dir, place)
    with pytest.raises(IdentityError, match="changed while it was being read"):
        build_learner(config, data, Recipe.of(config, data))


@pytest.mark.parametrize("when", ["step", "last step", "validation"])
def test_a_teacher_that_changes_during_a_step_ends_the_run(
    when: str, configure: MakeConfig, tiny_teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights on a CPU are mapped from their file, its head too. With the content back, the same call goes on."""
    place = tmp_path / "teacher"
    shutil.copytree(tiny_teacher_dir, place)
    config = configure(teacher_model={"path": str(place), "dtype": "float32"}, validation={"every": 6})
    weights = place / "model.safetensors"
    content, rows, steps = weights.read_bytes(), LiveTeacher.rows, []
    done = {"step": 1, "last step": 5, "validation": 6}[when]

    def edited(teacher: LiveTeacher, batch: MicroBatch) -> TeacherHead:
        found = rows(teacher, batch)
        if len(steps) == done:
            weights.write_bytes(content[:-1000] + bytes(1000))
        return found

    def run() -> None:
        for event in train(config):
            steps.extend([event] if isinstance(event, StepDone) else [])

    with monkeypatch.context() as patch:
        patch.setattr(LiveTeacher, "rows", edited)
        with pytest.raises(IdentityError, match="changed while it was being read"):
            run()
    assert len(steps) == done
    weights.write_bytes(content)
    assert isinstance(list(train(config))[-1], Finished)


def test_a_store_and_a_live_teacher_do_not_mix(configure: MakeConfig, tiny_store: Path) -> None:
    with pytest.raises(ValidationError, match="exactly one of store"):
        configure(store=tiny_store)
    with pytest.raises(ValidationError, match="exactly one of store"):
        configure(teacher_model=None)
    with pytest.raises(ValidationError, match="corpus and rendering and heldout belong to teacher_model"):
        configure(store=tiny_store, teacher_model=None)
    with pytest.raises(ValidationError, match="needs a corpus"):
        configure(corpus=None)
    with pytest.raises(ValidationError, match="allow_partial belongs to store"):
        configure(allow_partial=True)


def test_a_tail_policy_is_for_stored_rows(configure: MakeConfig) -> None:
    with pytest.raises(UsageError, match="stored rows") as caught:
        list(train(configure(loss={"tail": "bucket"})))
    assert caught.value.where == "loss.tail"


def test_a_corpus_without_training_sequences_is_told(configure: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    corpus = [{"source": "text", "path": str(tmp_path / "short.txt")}]
    config = configure(corpus=corpus, rendering={"window": 64, "min_tokens": 50})
    with pytest.raises(UsageError, match="no training sequence in 1 documents"):
        list(train(config))


def test_a_dry_run_counts_the_teacher_in(configure: MakeConfig, tmp_path: Path) -> None:
    online, alone = dry_run(configure()), dry_run(configure(kd_ratio=0.0))
    assert not (tmp_path / "run").exists()
    assert online.teacher_parameters is not None
    assert online.memory_bytes > alone.memory_bytes + 4 * online.teacher_parameters
    assert alone.teacher_parameters is None
    assert online.sequences == alone.sequences > 0


def test_the_teacher_runs_in_its_own_precision_and_its_head_in_float32(configure: MakeConfig) -> None:
    config = configure(teacher_model={"path": configure().teacher_model.path, "dtype": "bfloat16"})  # type: ignore[union-attr]
    data = open_training_data(config)
    learner = build_learner(config, data, Recipe.of(config, data))
    assert isinstance(learner.teacher, LiveTeacher)
    assert learner.teacher.body.dtype == torch.bfloat16
    assert learner.teacher.weight_VD.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in learner.teacher.body.parameters())
    assert not learner.teacher.body.training


def pipeline(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="pipeline")


def test_the_command_line_trains_evaluates_and_generates(
    configure: MakeConfig, tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(configure(steps=2).model_dump(mode="json", exclude_none=True)))
    told = pipeline("train", path, "--dry-run")
    assert [line.split()[0] for line in told.stdout.splitlines()] == [
        "student",
        "teacher",
        "steps",
        "corpus",
        "memory",
        "time",
    ], told.stderr
    told = pipeline("train", path)
    assert told.exit_code == 0, told.stderr
    run = tmp_path / "run"
    page = (run / "report.html").read_text()
    assert "corpus and teacher" in page
    assert str(tiny_teacher_dir) in page
    assert json.loads((run / "run.json").read_text())["store"]["teacher"]["directory"] == str(tiny_teacher_dir)
    refused = pipeline("eval", run)
    assert refused.exit_code == 2
    assert "--store" in refused.stderr
    scored = pipeline("eval", run, "--store", tiny_store, "--json")
    assert json.loads(scored.stdout)["students"]["run"]["kl"] > 0
    assert json.loads(scored.stdout)["warnings"] == []
    assert scored.stderr == ""
    answered = pipeline("generate", run, "The class", "--teacher", "--max-new-tokens", 3, "--json")
    assert [answer["role"] for answer in json.loads(answered.stdout)] == ["student", "teacher"]
    assert pipeline("train", path, "--set", "rendering.window=32").exit_code == 3


def test_scores_on_text_of_the_training_are_told(configure: MakeConfig, tiny_store: Path, tmp_path: Path) -> None:
    list(train(configure(steps=1, heldout=None)))
    run = tmp_path / "run"
    told = pipeline("eval", run, "--store", tiny_store, "--json")
    assert told.exit_code == 0
    (line,) = json.loads(told.stdout)["warnings"]
    assert line.startswith(f"{run} may have learned from 5 of the 5 documents that it is scored on")
    assert told.stderr == f"WARNING: {line}\n"
    assert pipeline("eval", run, "--store", tiny_store).stderr == told.stderr


def test_the_shipped_configuration_runs(tiny_teacher_dir: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """configs/train-online.yaml as it is, but for names, sizes and its length."""
    changes = {
        "teacher_model.path": tiny_teacher_dir,
        "student.path": tiny_teacher_dir,
        "corpus.0.path": tiny_corpus,
        "rendering.window": 64,
        "heldout.fraction": 0.15,
        "run": tmp_path / "run",
        "schedule.warmup_steps": 0,
        "tokens_per_step": 1024,
        "device": "cpu",
    }
    overrides = [argument for key, value in changes.items() for argument in ("--set", f"{key}={value}")]
    told = pipeline("train", Path(__file__).parents[2] / "configs" / "train-online.yaml", *overrides)
    assert told.exit_code == 0, told.stderr
    assert "held-out loss" in told.stderr
    assert (tmp_path / "run" / "model" / "config.json").is_file()
