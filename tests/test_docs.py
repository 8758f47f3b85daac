"""The documents are true: files that they name exist, the floors are the contracts', the index is the docstrings'."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from pipeline.config.loading import load_extract

ROOT = Path(__file__).parent.parent
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = {(page.parent / name).resolve() for name in re.findall(r"\]\(([^)#:]+)\)", text)}
    paths = {ROOT / name for name in re.findall(r"`((?:pipeline|stages|storage|docs|tests)/[\w/.]*)`", text)}
    assert [path for path in sorted(links | paths) if not path.exists()] == []


def test_the_rendering_of_the_documents_page_loads(tmp_path: Path) -> None:
    (block,) = re.findall(
        r"```yaml\n(.*?)```", (ROOT / "docs/documents.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    (tmp_path / "extract.yaml").write_text(block)
    config = load_extract(tmp_path / "extract.yaml")
    assert config.corpus[0].prompt_field == "question"
    assert set(config.rendering.model_fields_set) == {"window", "too_long", "special_tokens", "bos", "eos"}


def test_the_architecture_is_short_and_shows_the_floors() -> None:
    assert len(ARCHITECTURE.splitlines()) < 150
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = {item["containers"][0]: item["layers"] for item in contracts if "containers" in item}
    assert set(floors) == {"pipeline", "stages", "stages.losses", "storage"}
    for package, layers in floors.items():
        assert f"`{package}`: {' > '.join(layer.replace(' | ', ' · ') for layer in layers)}\n" in ARCHITECTURE


def test_the_tables_that_the_architecture_names_exist() -> None:
    tables = dict(re.findall(r"`([A-Z]{3,}|open_files)` in `([\w/.]+)`", ARCHITECTURE))
    assert set(tables) == {"SOURCES", "BACKENDS", "KINDS", "DIVERGENCES", "CODECS", "COMMANDS", "open_files"}
    for table, path in tables.items():
        assert re.search(rf"^(?:def )?{table}\b", (ROOT / path).read_text(), flags=re.MULTILINE), (table, path)


def test_the_index_of_what_is_public_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs/make_api.py")
    assert spec is not None
    assert spec.loader is not None
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    written = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert written == make_api.index(), "run: make api"
    assert not re.search(r": ?$", written, flags=re.MULTILINE), "a docstring is missing"


def test_commit_hooks_are_those_of_make_lint() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (lint,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    commands = [line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in lint.splitlines()]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == commands
