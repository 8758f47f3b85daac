"""README is true: its snippets run, its configuration loads, its commands and files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import warm_process

from pipeline.cli import main
from pipeline.config.loading import load_extract

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def pipeline_commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["pipeline"]]


@pytest.mark.parametrize("snippet", blocks("python"), ids=["zarr", "pyarrow"])
def test_snippets_run_and_are_short(snippet: str, tiny_store: Path, tmp_path: Path) -> None:
    assert len([line for line in snippet.splitlines() if line]) <= 5
    done = warm_process.run(warm_process.script, snippet.replace("demo/store", str(tiny_store)), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_configuration_loads_and_is_short(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    assert len(block.splitlines()) <= 12
    path = tmp_path / "extract.yaml"
    path.write_text(block)
    assert load_extract(path).target.k == 32


@pytest.mark.parametrize("words", pipeline_commands(), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    command = main.commands[words[0]]
    with click.Context(command, resilient_parsing=False) as context:
        command.parse_args(context, words[1:])


def test_every_file_that_is_named_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    paths = re.findall(r"`((?:pipeline|stages|storage|docs)/[\w/.]*)`", TEXT)
    named = {*links, *paths}
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_no_placeholder_is_left() -> None:
    assert "@@" not in TEXT
