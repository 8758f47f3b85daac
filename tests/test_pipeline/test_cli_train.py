"""`train`, `eval`, `generate` on the command line: one small run, everything that is done with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from pipeline.cli import main
from pipeline.config.loading import load_train
from storage.reader import StoreReader


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="pipeline")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path, tiny_teacher_dir: Path) -> Path:
    """A training configuration: one of the teacher's layers learns from the tiny store."""
    folder = tmp_path_factory.mktemp("train")
    content = {
        "store": str(tiny_store),
        "run": str(folder / "run"),
        "student": {"init": "layers_of_teacher", "path": str(tiny_teacher_dir), "layers": 1},
        "steps": 4,
        "tokens_per_step": 256,
        "dtype": "float32",
        "device": "cpu",
        "checkpoint": {"every": 2},
        "validation": {"every": 2, "sequences": 4},
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def told(config: Path) -> Result:
    """What the training said."""
    return run("train", config)


@pytest.fixture
def finished(config: Path, told: Result) -> Path:
    """The run directory."""
    assert told.exit_code == 0, told.stderr
    return config.parent / "run"


def test_training_tells_rate_and_time_left_and_leaves_a_run(told: Result, finished: Path) -> None:
    assert "tokens/s" in told.stderr
    assert " left" in told.stderr
    assert "step 4: held-out loss" in told.stderr
    assert told.stdout.startswith("4 steps, ")
    expected = {"config.yaml", "metrics.jsonl", "checkpoints", "model", "report.html"}
    assert {path.name for path in finished.iterdir() if not path.name.startswith(".")} >= expected
    assert load_train(finished / "config.yaml") == load_train(finished.parent / "train.yaml")


def test_the_same_command_again_has_nothing_to_do(config: Path, finished: Path) -> None:
    again = run("train", config)
    assert again.exit_code == 0
    assert again.stdout.startswith("finished already at step 4")


def test_json_events_are_one_object_per_line(config: Path, tmp_path: Path) -> None:
    result = run("train", config, "--json", "--set", f"run={tmp_path / 'run'}", "--set", "steps=2")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events].count("StepDone") == 2
    assert events[-1]["event"] == "Finished"
    assert "step 1" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "/no/such.yaml", "--json"],
        ["status", "/no/such/store", "--json"],
        ["status", "--json"],
        ["status", "--json", "--no-such-option"],
    ],
)
def test_with_json_a_failure_is_json_too(arguments: list[str]) -> None:
    result = run(*arguments)
    told = json.loads(result.stdout)
    assert (told["event"], told["exit_code"], result.exit_code) == ("Failed", 2, 2)
    assert result.stderr.splitlines()[0] == f"error: {told['error']}"
    assert run(*(word for word in arguments if word != "--json")).stdout == ""


@pytest.mark.parametrize("processes", [None, "1"])
def test_one_process_speaks_whatever_its_rank(
    processes: str | None, config: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finished / "report.html").unlink()
    monkeypatch.setenv("RANK", "1")
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    assert run("train", config).stdout.startswith("finished already")
    assert (finished / "report.html").exists()
    assert json.loads(run("train", config, "--dry-run", "--json").stdout)["steps"] == 4


def test_what_lies_beside_a_run_is_left_alone(config: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / ".tmp-mine").mkdir(parents=True)
    (project / "notes.txt").write_text("mine")
    assert run("train", config, "--set", f"run={project}", "--set", "steps=1").exit_code == 0
    assert {path.name for path in project.iterdir()} >= {".tmp-mine", "notes.txt", "report.html"}


def test_dry_run_writes_nothing(config: Path, tmp_path: Path) -> None:
    result = run("train", config, "--dry-run", "--set", f"run={tmp_path / 'run'}")
    assert result.exit_code == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["student", "steps", "store", "memory", "time"]
    assert json.loads(run("train", config, "--dry-run", "--json").stdout)["steps"] == 4
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("store=/no/such/store", 2, "/no/such/store"),
        ("student.path=/no/such/model", 2, "/no/such/model"),
        ("student.layers=99", 2, "99"),
        ("loss.divergence=kl", 2, "--set loss.divergence=kl"),
        ("optimizer.lr=fast", 2, "--set optimizer.lr=fast"),
        ("epochs=1", 2, "exactly one of steps and epochs"),
        (f"run={__file__}", 2, "the run directory is a file"),
    ],
)
def test_bad_input(override: str, code: int, words: str, config: Path, tmp_path: Path) -> None:
    result = run("train", config, "--set", f"run={tmp_path / 'run'}", "--set", override)
    assert result.exit_code == code, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_another_configuration_in_the_same_run_directory(config: Path, finished: Path) -> None:
    result = run("train", config, "--set", "seed=7")
    assert result.exit_code == 3
    assert "seed" in result.stderr


def test_eval_finds_the_store_and_scores_everyone(finished: Path, tiny_store: Path, tiny_teacher_dir: Path) -> None:
    told = run("eval", finished, "--teacher", tiny_teacher_dir)
    assert told.exit_code == 0, told.stderr
    assert [line.split()[0] for line in told.stdout.splitlines()[:3]] == ["NLL", "teacher", "run"]
    scores = json.loads(run("eval", finished, "--teacher", tiny_teacher_dir, "--store", tiny_store, "--json").stdout)
    assert scores["students"]["run"]["kl"] > 0
    assert scores["store_digest"] == StoreReader(tiny_store).digest


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["eval", "RUN", "--max-tokens", "1", "--json"], 0, '"documents": 1,'),
        (["eval", "RUN", "--teacher", "RUN/model"], 3, "not the store's teacher"),
        (["eval", "RUN", "--store", "RUN"], 2, "no store"),
        (["generate", "RUN", "The class", "--chat"], 2, "the tokenizer has no chat template"),
        (["train", "CONFIG", "--quiet", "--set", "run=OTHER", "--set", "steps=1"], 0, "1 steps, "),
    ],
)
def test_options_reach_what_they_are_for(
    options: list[str], code: int, words: str, config: Path, finished: Path, tmp_path: Path
) -> None:
    places = {"RUN": str(finished), "CONFIG": str(config), "OTHER": str(tmp_path / "other")}
    for place, path in places.items():
        options = [option.replace(place, path) for option in options]
    result = run(*options)
    assert result.exit_code == code, result.stderr
    assert words in (result.stderr if code else result.stdout)
    assert "tokens/s" not in result.stderr


def test_eval_names_models_by_what_tells_them_apart(finished: Path, tiny_teacher_dir: Path) -> None:
    models = [finished, tiny_teacher_dir, finished / "model", finished / "." / "model"]
    scores = json.loads(run("eval", *models, "--json").stdout)["students"]
    assert set(scores) == {"run", str(tiny_teacher_dir), str(finished / "model")}  # `teacher` is the teacher
    assert scores[str(tiny_teacher_dir)]["kl"] == pytest.approx(0.0, abs=1e-9)


def test_a_student_called_teacher_has_its_own_row(finished: Path, tiny_store: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "model", tmp_path / "student" / "teacher")
    told = run("eval", tmp_path / "student" / "teacher", "--store", tiny_store).stdout.splitlines()
    assert [line.split()[0] for line in told[1:3]] == ["teacher", str(tmp_path / "student" / "teacher")]


def test_eval_without_a_run_needs_a_store(tiny_teacher_dir: Path) -> None:
    result = run("eval", tiny_teacher_dir)
    assert result.exit_code == 2
    assert "--store" in result.stderr


def test_generate(finished: Path) -> None:
    told = run("generate", finished, "The class", "--teacher", "--max-new-tokens", 5)
    assert told.exit_code == 0, told.stderr
    assert "student" in told.stdout
    assert "teacher" in told.stdout
    answers = json.loads(run("generate", finished, "The class", "--max-new-tokens", 5, "--json").stdout)
    assert [answer["role"] for answer in answers] == ["student"]
    assert answers[0]["tokens"] <= 5


def test_generate_without_a_model(tmp_path: Path) -> None:
    result = run("generate", tmp_path, "The class")
    assert result.exit_code == 2
    assert "there is no model here" in result.stderr
