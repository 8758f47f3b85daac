"""Every configuration in configs/ and in the starter templates loads, and every schema in the tree is current."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.loading import load
from pipeline.config.schema import MODELS, json_schema

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TEMPLATES = sorted((ROOT / "pipeline/config/starter").glob("*.yaml"))


def test_there_are_configurations() -> None:
    assert len(CONFIGS) >= 4
    assert len(TEMPLATES) == len(MODELS)


@pytest.mark.parametrize("path", CONFIGS + TEMPLATES, ids=lambda path: path.name)
def test_it_loads_as_what_its_first_line_names(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=schema/")
    phase = first.removeprefix("# yaml-language-server: $schema=schema/").removesuffix(".json")
    assert path.name.startswith(phase)
    load(MODELS[phase], path)  # type: ignore[index]
    if path in CONFIGS:
        assert (path.parent / "schema" / f"{phase}.json").is_file()


@pytest.mark.parametrize("phase", MODELS)
def test_schema_in_the_tree_is_what_the_command_prints(phase: str) -> None:
    stored = (ROOT / "configs" / "schema" / f"{phase}.json").read_text()
    assert stored == json_schema(phase), "run: make api"  # type: ignore[arg-type]


@pytest.mark.parametrize("phase", MODELS)
def test_every_key_of_the_schema_is_documented(phase: str) -> None:
    schema = json.loads(json_schema(phase))  # type: ignore[arg-type]
    for section in [schema, *schema["$defs"].values()]:
        for name, field in section["properties"].items():
            assert field.get("description"), f"{section['title']}.{name} has no description"


def test_the_configuration_for_ones_own_model_has_twelve_lines() -> None:
    lines = (ROOT / "configs" / "extract.yaml").read_text().splitlines()
    assert len([line for line in lines if not line.startswith("#")]) <= 12
