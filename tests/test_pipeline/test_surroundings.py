"""Runs and models with links and special files in them, and stores and runs that name a model of the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from special_files import neither_waits_nor_swells, precious, put_in_place, state_of
from torture_results import save

from pipeline.cli import main
from stages.input_files import file_sha256, find_files
from stages.models.files import find_model
from storage.errors import CorruptionError, UsageError
from storage.plan import Plan

STEPS = 4
WHOLE = ("run.json", "config.yaml", "metrics.jsonl", "report.html", ".lock", "checkpoints", "model")


@pytest.fixture(scope="module")
def trained(made_once: Any, tiny_store: Path, tiny_teacher_dir: Path) -> Path:
    """A finished run, its configuration, and a copy of the teacher. Copy it before changing anything."""

    def make(folder: Path) -> None:
        shutil.copytree(tiny_teacher_dir, folder / "teacher")
        config = {
            "store": str(tiny_store),
            "run": str(folder / "run"),
            "student": {"init": "layers_of_teacher", "path": str(tiny_teacher_dir), "layers": 1},
            "steps": STEPS,
            "schedule": {"kind": "constant"},
            "tokens_per_step": 128,
            "dtype": "float32",
            "device": "cpu",
            "checkpoint": {"every": 2},
        }
        (folder / "train.yaml").write_text(yaml.safe_dump(config))
        assert call("train", folder / "train.yaml", "--quiet") == 0

    return Path(made_once("surroundings", make))


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "place"))


def call(*arguments: object) -> int:
    """Exit code of a command; it has not waited for anything, nor taken much memory."""
    with neither_waits_nor_swells():
        done = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="pipeline")
    assert done.exit_code != 70, done.stderr
    assert done.exit_code == 0 or "fix: " in done.stderr, done.stderr
    return done.exit_code


def go_on(place: Path) -> int:
    """Exit code of training that goes on with the run."""
    return call(
        "train", place / "train.yaml", "--quiet", "--set", f"run={place / 'run'}", "--set", f"steps={STEPS + 1}"
    )


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kind", ["named pipe", "link to what was there"])
def test_nothing_in_a_run_is_a_link_or_a_special_file(place: Path, name: str, kind: str) -> None:
    put_in_place(place / "run" / name, kind, place / "outside")
    precious(place / "outside")
    before = state_of(place / "outside")
    assert go_on(place) == 4
    codes = {call("eval", place / "run"), call("generate", place / "run", "The", "--max-new-tokens", 1)}
    assert codes == {4}
    assert state_of(place / "outside") == before


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "progress.json", "."])
@pytest.mark.parametrize("kind", ["named pipe", "directory", "link to what was there", "sparse"])
def test_a_checkpoint_with_something_else_in_it_is_set_aside(place: Path, name: str, kind: str) -> None:
    newest = place / "run" / "checkpoints" / f"step-{STEPS:08d}"
    put_in_place(newest / name if name != "." else newest, kind, place / "outside")
    before = state_of(place / "outside")
    assert go_on(place) == 0
    assert os.path.lexists(newest.with_name(f"unusable-{newest.name}"))
    assert state_of(place / "outside") == before


TEMPORARY = (".tmp-run.json", ".tmp-config.yaml", ".tmp-metrics.jsonl", ".tmp-report.html", ".tmp-model",
             ".tmp-old-model", "checkpoints/.tmp-step-00000005", "checkpoints/step-00000001",
             "checkpoints/unusable-step-00000004")  # fmt: skip


@pytest.mark.parametrize("leads_to", ["file", "deep", "nothing"])
def test_training_writes_through_no_link(place: Path, leads_to: str) -> None:
    """Under the names that it uses for a moment, and under those that it clears away."""
    outside = precious(place / "outside")
    for name in TEMPORARY:
        (place / "run" / name).symlink_to(outside / leads_to)
    (place / "run" / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").write_bytes(b"")
    before = state_of(outside)
    assert go_on(place) == 0
    assert state_of(outside) == before
    assert call("generate", place / "run", "The", "--max-new-tokens", 1) == 0


@pytest.mark.parametrize("kind", ["named pipe", "socket", "directory", "link to nothing", "link to a device"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_model_is_made_of_files(place: Path, name: str, kind: str) -> None:
    put_in_place(place / "teacher" / name, kind, place / "outside")
    with neither_waits_nor_swells(), pytest.raises(UsageError, match=f"{name} is .*, not a file") as caught:
        find_model(str(place / "teacher"))
    assert caught.value.where == str(place / "teacher" / name)
    assert call("generate", place / "teacher", "The") == 2


@pytest.mark.parametrize("kind", ["named pipe", "socket", "link to nothing"])
@pytest.mark.parametrize("name", [".#config.json", "extra.bin"])
def test_what_no_library_reads_may_be_anything(place: Path, name: str, kind: str) -> None:
    put_in_place(place / "teacher" / name, kind, place / "outside")
    assert find_model(str(place / "teacher")).directory == place / "teacher"


@pytest.mark.parametrize(
    ("leads_to", "words"), [("nothing", "is a link that leads nowhere"), ("n" * 300, "cannot be reached: File name")]
)
def test_a_link_is_said_to_lead_nowhere_where_it_does(place: Path, leads_to: str, words: str) -> None:
    config = place / "teacher" / "config.json"
    config.unlink()
    config.symlink_to(leads_to)
    with pytest.raises(UsageError, match=f"config.json {words}"):
        find_model(str(place / "teacher"))


def test_a_model_may_be_links_to_files_and_its_description_has_a_bound(place: Path) -> None:
    for path in sorted((place / "teacher").iterdir()):
        put_in_place(path, "link to what was there", place / "blobs")
    assert call("generate", place / "teacher", "The", "--max-new-tokens", 1) == 0
    put_in_place(place / "teacher" / "tokenizer.json", "sparse", place / "outside")
    assert call("generate", place / "teacher", "The") == 2


def test_a_file_that_is_hashed_or_read_as_a_corpus_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with neither_waits_nor_swells(5), pytest.raises(CorruptionError, match="it is a named pipe, not a file"):
        file_sha256(tmp_path / "pipe.txt")
    with pytest.raises(UsageError, match=r"pipe\.txt is a named pipe, not a file"):
        find_files(str(tmp_path / "pipe.txt"))


@pytest.mark.parametrize(
    ("kind", "told"), [("named pipe", "a named pipe"), ("link to nothing", "a link that leads no")]
)
def test_no_match_of_a_pattern_is_passed_over(kind: str, told: str, tmp_path: Path) -> None:
    """Else a disk that is not mounted makes a smaller corpus, and another store."""
    corpus = tmp_path / "corpus"
    (corpus / "folder").mkdir(parents=True)
    for name in ("a", "b"):
        (corpus / name).write_text("text")
    assert find_files(str(corpus / "*")) == [corpus / "a", corpus / "b"]
    put_in_place(corpus / "b", kind, tmp_path / "outside")
    with pytest.raises(UsageError, match=f"/b is {told}"):
        find_files(str(corpus / "*"))


@pytest.mark.torture
def test_every_kind_in_place_of_every_file_of_a_run_and_its_model(trained: Path, tmp_path: Path) -> None:
    started, calls = time.perf_counter(), 0
    inside = [path.relative_to(trained).as_posix() for path in sorted(trained.rglob("*"))]
    kinds = ("named pipe", "directory", "link to nothing", "link to a device", "link to what was there", "sparse")
    for name in [name for name in inside if name.startswith(("run/", "teacher/"))]:
        for kind in kinds:
            place = Path(shutil.copytree(trained, tmp_path / "place"))
            put_in_place(place / name, kind, place / "outside")
            before = state_of(place / "outside")
            go_on(place)
            call("eval", place / "run", "--teacher", place / "teacher", "--max-tokens", 64)
            call("generate", place / ("run" if name.startswith("run/") else "teacher"), "The", "--max-new-tokens", 1)
            assert state_of(place / "outside") == before, f"{kind} at {name}"
            calls += 3
            shutil.rmtree(place)
    save("a special file in place of every file of a run and of a model, every command", started=started,
         commands=calls, kinds=len(kinds))  # fmt: skip


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (key, *strings(item))
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def test_paths_of_the_machine_are_where_security_md_says(
    trained: Path, tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"document": range(40), "weight": range(40)}), tmp_path / "weights.parquet")
    column = f"weight={tmp_path / 'weights.parquet'}"
    assert call("convert", tiny_store, tmp_path / "new", "--add-column", column, "--quiet") == 0
    written = {}
    for name, folder in (("store", tiny_store), ("new", tmp_path / "new"), ("run", trained / "run")):
        for path in sorted(folder.rglob("*")):
            content = path.read_bytes() if path.is_file() else b""
            if str(tiny_teacher_dir.parent).encode() in content or str(tmp_path).encode() in content:
                written[f"{name}/{path.relative_to(folder)}"] = content
    assert set(written) == {
        "store/plan.json", "new/plan.json", "run/run.json", "run/config.yaml", "run/report.html",
    }  # fmt: skip
    for name in ("store/plan.json", "new/plan.json"):
        assert not [text for text in strings(Plan.from_json(written[name]).semantic()) if os.path.isabs(text)]
    security = (Path(__file__).parents[2] / "SECURITY.md").read_text()
    told = security[security.index("**Paths of your machine**") :]
    assert all(f"`{name.partition('/')[2]}`" in told for name in written)


class Hub(ThreadingHTTPServer):
    """A server in place of the hub, that knows nothing and notes what it is asked."""

    def __init__(self) -> None:
        asked = self.asked = list[tuple[str, str | None]]()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, self.headers.get("Authorization")))
                self.send_error(404)

            do_HEAD = do_GET

            def log_message(self, *arguments: object) -> None:
                """Nothing."""

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_a_store_or_a_run_says_is_no_name_to_fetch(place: Path, tiny_store: Path, hub: Hub) -> None:
    """A plan and a record that name a model of the hub, with their hashes mended. The user's own word is asked for."""
    store = Path(shutil.copytree(tiny_store, place / "store"))
    plan = Plan.from_json((store / "plan.json").read_bytes())
    named = {"name": "evil/store", "directory": "evil/store"}
    mended = Plan(**{**vars_of(plan), "recorded": {**plan.recorded, "teacher": named}})
    (store / "plan.json").write_bytes(mended.to_json())
    record = json.loads((place / "run" / "run.json").read_bytes())
    record["store"] |= {"teacher": {"name": "evil/run", "directory": "evil/run"}, "path": str(store)}
    (place / "run" / "run.json").write_text(json.dumps(record))
    elsewhere = Path(shutil.copytree(place / "run", place / "elsewhere"))
    record["store"]["path"] = "s3://evil/bucket"
    (elsewhere / "run.json").write_text(json.dumps(record))
    config = json.loads((place / "teacher" / "config.json").read_bytes())
    config |= {"text_config": {"_attn_implementation": "evil/kernel"}, "auto_map": {"AutoConfig": "evil/x--a.B"}}
    (place / "teacher" / "config.json").write_text(json.dumps(config))
    (place / "config.json").write_text(json.dumps({**config, "attn_implementation": "evil/kernel"}))
    (place / "train.yaml").write_text(
        (place / "train.yaml").read_text().replace("layers_of_teacher", "from_config").replace("layers: 1", "")
    )
    commands = [
        ["eval", str(place / "run")],
        ["generate", str(place / "run"), "The", "--teacher", "--max-new-tokens", "1"],
        ["eval", str(elsewhere)],
        ["status", str(store)],
        ["generate", str(place / "teacher"), "The"],
        ["train", str(place / "train.yaml"), "--set", f"student.path={place / 'config.json'}", "--dry-run"],
        ["eval", str(place / "run"), "--teacher", "own/word"],
    ]
    told = in_another_process(commands, hub)
    assert [code for code, _ in told] == [2, 2, 2, 0, 2, 2, 2]
    assert "the teacher is not where the store says that it was: what is recorded is no directory" in told[0][1]
    assert "with --teacher" in told[0][1]
    assert "the teacher is not where it was: what is recorded is no directory" in told[1][1]
    assert "no directory of this machine: s3:/evil/bucket" in told[2][1]
    assert "text_config._attn_implementation: 'evil/kernel' would be fetched from the hub and run" in told[4][1]
    assert "attn_implementation: 'evil/kernel' would be fetched" in told[5][1]
    assert {path.split("?")[0] for path, _ in hub.asked} == {"/api/models/own/word/revision/main"}
    assert {token for _, token in hub.asked} == {"Bearer hf_token_of_the_user"}, "the control: it would be heard"


def vars_of(plan: Plan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


def in_another_process(commands: list[list[str]], hub: Hub) -> list[tuple[int, str]]:
    """Exit code and errors of commands in a process that may ask the hub, with a token."""
    program = """
import json, sys
from click.testing import CliRunner
from pipeline.cli import main
told = [CliRunner().invoke(main, command, prog_name="pipeline") for command in json.loads(sys.argv[1])]
print("\\n" + json.dumps([(one.exit_code, one.stderr) for one in told]))
"""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_TOKEN": "hf_token_of_the_user",
        "NO_PROXY": "*",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(commands)], env=environment, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(code, told) for code, told in json.loads(done.stdout.splitlines()[-1])]
