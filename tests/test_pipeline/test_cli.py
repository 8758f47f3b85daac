"""The command line as a user meets it: help, bad input, exit codes, output for people and for machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from pipeline.cli import main
from pipeline.config.loading import load_extract, load_train
from pipeline.config.schema import MODELS

COMMANDS = list(main.commands)


def run(*arguments: str | Path) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="pipeline")


def fails(result: Result, code: int, *words: str) -> None:
    """Assert an exit code, a message of at most three parts that holds `words`, and no traceback."""
    assert result.exit_code == code, result.stderr
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("     then ")]
    assert [line.split(":")[0] for line in lines] in (["error", "where"], ["error", "where", "fix"]), result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture
def config(tmp_path: Path, tiny_teacher_dir: Path, tiny_corpus: Path) -> Path:
    """An extract configuration of the tiny teacher and corpus."""
    path = tmp_path / "extract.yaml"
    content = {
        "store": str(tmp_path / "store"),
        "teacher": {"path": str(tiny_teacher_dir), "dtype": "float32"},
        "corpus": [{"source": "jsonl", "path": str(tiny_corpus)}],
        "rendering": {"window": 64},
        "target": {"kind": "topk", "k": 4},
        "documents_per_shard": 16,
        "device": "cpu",
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_help_lists_every_command_in_order_of_work() -> None:
    result = run("--help")
    assert result.exit_code == 0
    listed = [line.split()[0] for line in result.output.split("Commands:")[1].strip().splitlines()]
    assert listed == COMMANDS
    assert "..." not in result.output.split("Commands:")[1], "a summary is cut off"
    assert run().output == result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_debug_and_quiet(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--debug" in result.output
    assert "--quiet" in result.output


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("topk-distill ")


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("targets: {}", 2, ["unknown key 'targets'", "extract.yaml:1", "did you mean 'target'?"]),
        ("target: {kk: 1}", 2, ["unknown key 'kk' in target", "did you mean 'k'?"]),
        ("target: {k: many}", 2, ["target.k: expected a whole number, found 'many'", "extract.yaml:1"]),
        ("target: [", 2, ["not valid YAML", "extract.yaml:1, column 10"]),
        ("target: {}\ntarget: {}", 2, ["key 'target' is given twice, first on line 1", "extract.yaml:2"]),
    ],
)
def test_bad_configuration(text: str, code: int, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "extract.yaml"
    path.write_text(text)
    for command in ("plan", "extract"):
        fails(run(command, path), code, *words)


def test_missing_configuration(tmp_path: Path) -> None:
    fails(run("extract", tmp_path / "none.yaml"), 2, "no such configuration file", "none.yaml", "pipeline init")
    fails(run("train", tmp_path / "none.yaml"), 2, "no such configuration file")


def test_bad_arguments() -> None:
    fails(run("extrct"), 2, "No such command 'extrct'", "pipeline --help")
    fails(run("extract"), 2, "Missing argument 'CONFIG'", "pipeline extract --help")
    fails(run("extract", "x", "--limit", "0"), 2, "--limit")
    fails(run("schema", "both"), 2, "'both'")
    fails(run("status", "--nope", "x"), 2, "No such option", "--nope")


def test_k_beyond_the_vocabulary(config: Path) -> None:
    fails(run("extract", config, "--set", "target.k=600"), 2, "600", "512", "target.k")


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("corpus.0.path=/no/such/corpus.jsonl", 2, ["/no/such/corpus.jsonl"]),
        ("corpus.0.field=body", 2, ["body", "text"]),
        ("teacher.path=/no/such/model", 2, ["/no/such/model"]),
        ("device=cuda:99", 2, ["cuda:99"]),
        ("target.k=0", 2, ["--set target.k=0"]),
    ],
)
def test_bad_input_to_extract(override: str, code: int, words: list[str], config: Path) -> None:
    fails(run("extract", config, "--set", override), code, *words)


def test_store_that_is_not_there(tmp_path: Path) -> None:
    for command in ("status", "verify", "repair", "inspect"):
        fails(run(command, tmp_path), 2, str(tmp_path))


def test_target_that_cannot_be_written(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails(run("extract", config, "--set", f"store={tmp_path / 'file' / 'store'}"), 5, str(tmp_path / "file"))


def test_a_bug_is_told_as_one_and_debug_shows_where(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.extraction.planning

    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(pipeline.extraction.planning, "estimate", broken)
    fails(run("plan", config), 70, "this is a bug", "ZeroDivisionError: division by zero", "--debug")
    told = run("plan", config, "--debug")
    assert told.exit_code == 70
    assert "Traceback (most recent call last)" in told.stderr
    assert run("--debug", "plan", config).stderr == told.stderr


def test_init_writes_configurations_that_load_and_overwrites_nothing(tmp_path: Path) -> None:
    result = run("init", tmp_path / "new")
    assert result.exit_code == 0, result.stderr
    load_extract(tmp_path / "new" / "extract.yaml")
    load_train(tmp_path / "new" / "train.yaml")
    for phase in MODELS:
        first = (tmp_path / "new" / f"{phase}.yaml").read_text().splitlines()[0]
        assert first == f"# yaml-language-server: $schema=schema/{phase}.json"
        assert json.loads((tmp_path / "new" / "schema" / f"{phase}.json").read_text())["type"] == "object"
    (tmp_path / "new" / "train.yaml").write_text("mine")
    fails(run("init", tmp_path / "new"), 2, "exists already")
    assert (tmp_path / "new" / "train.yaml").read_text() == "mine"


def test_init_writes_nothing_if_one_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("mine")
    fails(run("init", tmp_path), 2, "train.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["train.yaml"]


def test_plan_tells_what_it_will_take(config: Path) -> None:
    estimate = json.loads(run("plan", config, "--json", "--rate", "500").stdout)
    assert estimate["documents"] == 40
    assert estimate["seconds"] == pytest.approx(estimate["tokens"] / 500)
    told = run("plan", config, "--rate", "500").stdout
    assert "40 documents" in told
    assert "500 tokens/s (given)" in told
    assert estimate["heldout_documents"] == 0
    other = run("plan", config, "--json", "--set", "heldout.fraction=0.5")
    assert json.loads(other.stdout)["heldout_documents"] > 10
    assert not (config.parent / "store").exists()


def test_dry_run_of_extract_is_the_plan(config: Path) -> None:
    assert json.loads(run("extract", config, "--dry-run", "--json").stdout)["documents"] == 40
    assert not (config.parent / "store").exists()


def test_extract_stops_at_the_limit_goes_on_and_refuses_another_plan(config: Path) -> None:
    first = run("extract", config, "--limit", "1")
    assert first.exit_code == 0, first.stderr
    assert "the teacher reads" in first.stderr
    assert "the same command again goes on" in first.stdout
    status = run("status", config.parent / "store")
    assert "1 of 3 committed, not sealed" in status.stdout
    assert "2 shards missing" in status.stdout

    events = [json.loads(line) for line in run("extract", config, "--json").stdout.splitlines()]
    assert {"Started", "FirstRow", "ShardDone"} <= {event["event"] for event in events}
    assert events[-1]["digest"] == json.loads(run("status", config.parent / "store", "--json").stdout)["digest"]

    again = run("extract", config, "--quiet")
    assert (again.exit_code, again.stderr) == (0, "")
    assert "complete, 3 shards; 0 new shards" in again.stdout

    other = run("extract", config, "--set", "target.k=5")
    assert other.exit_code == 3
    assert "target.k: 4 -> 5" in other.stderr

    coarser = run("extract", config, "--set", "rendering.window=16", "--set", "rendering.special_tokens=text").stderr
    assert [line.split(":")[0].strip() for line in coarser.splitlines()[1:-2]] == [
        "rendering.window",
        "rendering.special_tokens",
        "(not stated",
    ]


def test_termination_ends_in_75_and_the_same_command_goes_on(config: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "extract", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as stopped:
        assert stopped.stderr is not None
        told = stopped.stderr.readline()
        stopped.terminate()
        told += stopped.stderr.read()
    assert stopped.returncode == 75, told
    assert "error: interrupted" in told
    assert "Traceback" not in told
    assert run("extract", config).exit_code == 0


def test_an_interrupted_extraction_says_what_is_kept(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # a signal just after the first commit
        patch.setattr("pipeline.extract.write_rate", lambda key, rate: signal.raise_signal(signal.SIGTERM))
        told = run("extract", config)
    kept = "interrupted; 1 of 3 shards are committed and kept; one in work is computed anew"
    assert told.exit_code == 75
    assert told.stderr.splitlines()[-3:] == [
        f"error: {kept}",
        "where: pipeline extract",
        "fix: run the same command again to go on",
    ]
    assert run("extract", config).exit_code == 0


def test_damage_is_found_repaired_and_computed_anew(config: Path) -> None:
    store = config.parent / "store"
    assert run("extract", config).exit_code == 0
    digest = json.loads(run("status", store, "--json").stdout)["digest"]
    objects = [path for path in (store / "shards").rglob("*") if path.is_file()]
    victim = max(objects, key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)

    found = run("verify", store)
    assert found.exit_code == 4
    assert str(victim.relative_to(store)) in found.stdout
    assert f"pipeline repair {store}" in found.stdout
    assert json.loads(run("verify", store, "--json").stdout)["ok"] is False
    assert run("verify", store, "--quick").exit_code == 0, "sizes did not change"

    proposed = run("repair", store)
    assert "would be moved to quarantine" in proposed.stdout
    assert victim.exists()
    assert "moved to quarantine/" in run("repair", store, "--yes").stdout
    assert run("extract", config).exit_code == 0
    assert run("verify", store).exit_code == 0
    assert json.loads(run("status", store, "--json").stdout)["digest"] == digest


def test_reader_that_has_seen_enough_is_no_error(tiny_store: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "inspect", str(tiny_store), "--format", "row-jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stderr is not None
        json.loads(reader.stdout.readline())
        reader.stdout.close()
        told = reader.stderr.read()
    assert (reader.returncode, told) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_no_space_left_on_stdout(tiny_store: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pipeline", "inspect", str(tiny_store), "--format", "row-jsonl"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 6
    assert "no space left" in done.stderr


def test_python_m_pipeline() -> None:
    done = subprocess.run([sys.executable, "-m", "pipeline", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: pipeline ")
