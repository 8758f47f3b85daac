"""The rule of the house: no import circle at any level, also not for type checking, and no two files of one name.

The layers themselves are contracts in pyproject.toml, which `make lint` checks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "stages", "storage")
# What both phases have is called the same, and so is a section of the configuration and what it configures.
TWICE = {"pipeline/extraction/events.py", "pipeline/training/events.py"}


LAZY = re.compile(r'"((?:pipeline|stages|storage)(?:\.\w+)+):[\w.]+"')


@cache
def import_graph() -> grimp.ImportGraph:
    """All imports, also for type checking, and those that a literal table spells as `module:name`."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None, exclude_type_checking_imports=False)
    for name in sorted(graph.modules):
        path = ROOT.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for imported in LAZY.findall(file.read_text(encoding="utf-8")):
            graph.add_import(importer=name, imported=imported)
    return graph


def test_imports_that_tables_spell_are_seen() -> None:
    assert "stages.teacher.hf" in import_graph().find_modules_directly_imported_by("stages.teacher")


def imports_between_children(parent: str, modules: grimp.ImportGraph) -> dict[str, set[str]]:
    """Which children of a package import which others, each child with all that is inside it."""
    graph: dict[str, set[str]] = defaultdict(set)
    depth = parent.count(".") + 2
    for module in modules.modules:
        if module.startswith(f"{parent}."):
            child = ".".join(module.split(".")[:depth])
            for found in modules.find_modules_directly_imported_by(module):
                other = ".".join(found.split(".")[:depth])
                if found.startswith(f"{parent}.") and other != child:
                    graph[child].add(other)
    return graph


def packages() -> list[str]:
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")}
    return sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


@pytest.mark.parametrize("package", packages())
def test_no_circle_between_the_rooms_of_a_package(package: str) -> None:
    TopologicalSorter(imports_between_children(package, import_graph())).prepare()


def test_no_circle_between_modules() -> None:
    modules = import_graph()
    TopologicalSorter({name: modules.find_modules_directly_imported_by(name) for name in modules.modules}).prepare()


def test_a_circle_would_be_found() -> None:
    """Two rooms that know each other through different files: no circle of modules, but one of rooms."""
    graph = grimp.ImportGraph()
    for importer, imported in (("house.a.one", "house.b.one"), ("house.b.two", "house.a.two")):
        graph.add_module(importer)
        graph.add_module(imported)
        graph.add_import(importer=importer, imported=imported)
    with pytest.raises(CycleError):
        TopologicalSorter(imports_between_children("house", graph)).prepare()


@pytest.mark.parametrize(
    "package",
    ["pipeline", "storage", *sorted(f"stages/{path.parent.name}" for path in ROOT.glob("stages/*/__init__.py"))],
)
def test_no_two_files_of_one_name(package: str) -> None:
    names: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / package).rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if path.name != "__init__.py" and not place.startswith("pipeline/config/") and place not in TWICE:
            names[path.name].append(place)
    assert {name: places for name, places in names.items() if len(places) > 1} == {}


def test_a_folder_is_never_a_file_too() -> None:
    both = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.with_suffix("").is_dir()]
    assert both == []
