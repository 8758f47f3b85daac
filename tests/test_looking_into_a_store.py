"""docs/looking_into_a_store.md is true: its snippets and commands run, and say what they claim."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import warm_process
from click.testing import CliRunner

from pipeline.cli import main
from storage.exchange.arrow import schema

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "looking_into_a_store.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def demo(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a store in demo/store."""
    shutil.copytree(tiny_store, tmp_path / "demo" / "store")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("snippet", blocks("python"), ids=["duckdb", "polars", "pyarrow", "zarr"])
def test_snippets(snippet: str, demo: Path) -> None:
    done = warm_process.run(warm_process.script, snippet, folder=demo)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("block", blocks("bash"), ids=["terminal", "files", "copies"])
def test_commands(block: str, demo: Path) -> None:
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "pipeline"
        result = CliRunner().invoke(main, words[1:], prog_name="pipeline")
        assert result.exit_code == int(words[1] == "diff"), f"{line}\n{result.stderr}"


def test_columns() -> None:
    table = TEXT[TEXT.index("| column |") : TEXT.index("JSON Lines have")]
    described = {}
    for line in table.splitlines()[2:]:
        if line.startswith("|"):
            names, kind = line.split("|")[1:3]
            described |= dict.fromkeys(names.strip().split(", "), kind.strip())
    assert described == {field.name: type_name(field.type) for field in schema()}


def type_name(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {type_name(kind.value_type)}"
    return "float32" if pa.types.is_float32(kind) else str(kind)
