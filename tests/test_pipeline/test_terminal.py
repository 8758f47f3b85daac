"""Nothing that is not ours moves, styles or forges anything on a terminal: one rule, for everything that is written."""

from __future__ import annotations

import ast
import io
import json
import logging
import shutil
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from pipeline.cli import main
from pipeline.commands.models import show_answers
from pipeline.extraction.events import FirstRow
from pipeline.generate import Answer
from pipeline.runtime import LOGGER, message_text, printable, warnings_in_one_line
from pipeline.terminal.progress import Lines, Live, first_row_text
from pipeline.terminal.text import Styled, quoted, write
from storage.plan import Plan

ROOT = Path(__file__).parents[2]
HOSTILE = {
    "clear screen": "\x1b[2J",
    "title": "\x1b]0;owned\x07",
    "C1 control sequence": "\x9b31m",
    "C1 next line": "\x85",
    "delete": "\x7f",
    "carriage return": "\rerror: forged",
    "backspaces": "\b\b\b",
    "bidi override": "\u202e",
    "bidi isolate": "\u2067",
    "line separator": "\u2028",
    "paragraph separator": "\u2029",
    "zero width space": "\u200b",
    "byte order mark": "\ufeff",
    "tag": "\U000e0041",
    "lone surrogate": "\udc9b",
}
ALL = "".join(HOSTILE.values())
OURS = ("\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[4m", "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[36m")  # our own styles


def is_plain(told: str) -> bool:
    """Whether nothing is in it but characters that show, line ends, and styles of ours."""
    for style in OURS:
        told = told.replace(style, "")
    return all(char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in told)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_terminal_would_obey_is_an_escape(name: str) -> None:
    for written in (printable(HOSTILE[name]), printable(HOSTILE[name], lines=True), quoted(HOSTILE[name])):
        assert is_plain(written)
        assert "\\" in written
    assert json.loads(quoted(HOSTILE[name])) == HOSTILE[name]


def test_what_only_shows_stays() -> None:
    shown = "naïve café, 語, 🙂, 👩\u200d💻, می\u200cخواهم, \u00a0\u3000, é"
    assert printable(shown) == shown
    assert printable("a\n\tb") == "a\\n\\tb"
    assert printable("a\n\tb", lines=True) == "a\n\tb"
    assert message_text("not YAML:\nfix: rm -rf\n    in line 3\n") == "not YAML:\n  fix: rm -rf\n    in line 3\n  "


def test_every_way_to_the_terminal(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    write(ALL, Styled(text=ALL, fg="red"), lines=True)
    Lines().line(ALL)
    Lines().advance(1, 2, ALL)
    with warnings_in_one_line():
        logging.getLogger(LOGGER).warning("of %s and %d", ALL, 7)
        logging.getLogger("some.library").error("of a file: %s", ALL)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn(ALL, stacklevel=1)
    told = capsys.readouterr()
    assert is_plain(told.out + told.err)
    assert told.err.count("\\u202e") == 4
    assert " and 7\n" in told.err
    assert is_plain(caplog.text)
    assert "of a file: \\u001b[2J" in caplog.text
    console = Console(file=io.StringIO(), force_terminal=False, width=300)
    with Live(console) as live:
        live.line(ALL)
        live.advance(1, 2, ALL)
    assert isinstance(console.file, io.StringIO)
    assert is_plain(console.file.getvalue())


def test_the_first_row_shows_a_hostile_corpus() -> None:
    event = FirstRow(
        context=f"before {ALL}", following=ALL, candidates=((ALL, 0.5),), head_mass=0.9, bytes_per_row=30.0,
        at_most=False, seconds=1.0,
    )  # fmt: skip
    assert is_plain(first_row_text(event))


def spoken(*arguments: object) -> tuple[int, str]:
    """Exit code and everything that a command writes, as a terminal would get it."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="pipeline", color=True)
    assert is_plain(done.stdout), arguments
    assert is_plain(done.stderr), arguments
    return done.exit_code, done.stdout + done.stderr


@pytest.fixture
def hostile(tiny_store: Path, tmp_path: Path) -> Path:
    """A store whose plan and whose files' names say what a terminal would obey."""
    text = ALL.replace("\udc9b", "")  # no UTF-8 holds it
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    plan = Plan.from_json((store / "plan.json").read_bytes())
    fields: dict[str, Any] = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    named = Plan(**{**fields, "recorded": {"teacher": {"name": text, "directory": text}}})
    (store / "plan.json").write_bytes(named.to_json())
    for place in ("", "tmp/", "shards/", "commits/"):
        (store / f"{place}{text.replace('/', '')}").write_bytes(b"x")
    return tmp_path


def test_commands_on_a_hostile_store(hostile: Path, tiny_teacher_dir: Path) -> None:
    store = hostile / "store"
    for command in ("status", "verify", "gc", "repair"):
        for form in ((), ("--json",)):
            code, told = spoken(command, store, *form)
            assert code == 0, told
            assert "\\u202e" in told or command == "repair"
    code, told = spoken("eval", tiny_teacher_dir, "--store", store)
    assert (code, "\\u202e" in told) == (2, True)
    code, told = spoken("status", hostile / ALL.replace("/", "").replace("\udc9b", ""))
    assert (code, "\\u202e" in told) == (2, True)


def test_a_hostile_corpus_is_read_and_looked_into(tiny_extraction: dict[str, Any], tmp_path: Path) -> None:
    text = ALL.replace("\udc9b", "") + " and "
    lines = "".join(json.dumps({"text": text * number}) + "\n" for number in range(1, 9))
    (tmp_path / "corpus.jsonl").write_text(lines)
    corpus = [{"source": "jsonl", "path": str(tmp_path / "corpus.jsonl")}]
    config = {**tiny_extraction, "corpus": corpus, "store": str(tmp_path / "store")}
    (tmp_path / "extract.yaml").write_text(yaml.safe_dump(config))
    for command in (["extract", tmp_path / "extract.yaml"], ["inspect", tmp_path / "store", "--rows", 20]):
        code, told = spoken(*command)
        assert (code, "\\u" in told) == (0, True), told


def test_an_answer_of_a_model_is_shown_and_not_obeyed() -> None:
    answer = Answer(role="student", model=f"m\n{ALL}", text=f"{ALL}\nerror: none", tokens=3, seconds=1.0)
    with CliRunner().isolation(color=True) as streams:
        for as_json in (False, True):
            show_answers([answer], as_json=as_json)
        told = streams[0].getvalue().decode()
    assert is_plain(told)
    assert told.count("\\u202e") == 4


def calls_past_the_rule(source: str) -> list[str]:
    """Calls in a module that write to a terminal by themselves."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("print", "click.echo", "click.secho", "click.style", "echo", "secho") or name in (
                "sys.stdout.write", "sys.stderr.write", "traceback.print_exception", "traceback.print_exc",
            ):  # fmt: skip
                found.append(f"line {node.lineno}: {name}")
    return found


def test_nothing_is_written_past_the_rule() -> None:
    own = {"pipeline/terminal/text.py", "pipeline/runtime.py", "storage/faults.py", "pipeline/cli.py"}
    modules = [file for package in ("pipeline", "stages", "storage") for file in (ROOT / package).rglob("*.py")]
    found = {
        name: calls
        for file in modules
        if (name := file.relative_to(ROOT).as_posix()) not in own and (calls := calls_past_the_rule(file.read_text()))
    }
    assert found == {}
    assert calls_past_the_rule("click.echo(1)\nprint(2)") == ["line 1: click.echo", "line 2: print"]
