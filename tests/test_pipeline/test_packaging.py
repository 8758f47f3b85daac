"""The wheel: what it installs, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "stages", "storage")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel of a copy of the tree, tests and configurations included, built without network."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "tests", "configs", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    script = f"import setuptools.build_meta as backend; backend.build_wheel({str(out)!r})"
    built = subprocess.run([sys.executable, "-c", script], cwd=tree, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_top_level_names(wheel: zipfile.ZipFile) -> None:
    names = {name.split("/")[0] for name in wheel.namelist()}
    (information,) = [name for name in names if name.endswith(".dist-info")]
    assert names == {*PACKAGES, information}


def test_every_module_is_inside(wheel: zipfile.ZipFile) -> None:
    modules = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert modules == {name for name in wheel.namelist() if name.endswith(".py")}


def test_data_files_are_inside(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    templates = {
        path.relative_to(ROOT).as_posix()
        for folder in ("config/starter", "config/starter/schema", "report/templates")
        for path in (ROOT / "pipeline" / folder).iterdir()
        if path.is_file()
    }
    assert templates
    assert names >= {"storage/FORMAT.md", *(f"{package}/py.typed" for package in PACKAGES), *templates}


def test_command_and_licence(wheel: zipfile.ZipFile) -> None:
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert wheel.read(entry_points).decode().split() == ["[console_scripts]", "pipeline", "=", "pipeline.cli:main"]
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
