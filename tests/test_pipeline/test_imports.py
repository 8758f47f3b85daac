"""What an import may cost: the store needs no model library, the command line answers before any is loaded."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL_LIBRARIES = {"torch", "transformers", "datasets", "peft", "tokenizers"}
STORAGE_MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "storage").rglob("*.py")
    if path.name != "__init__.py"
)


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    script = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def test_storage_loads_no_model_library() -> None:
    loaded = loaded_by("\n".join(f"import {name}" for name in STORAGE_MODULES))
    assert {"zarr", "numpy", "pyarrow"} & loaded
    assert not loaded & (MODEL_LIBRARIES | {"click", "pydantic"})


@pytest.mark.parametrize("arguments", [["--help"], ["extract", "--help"], ["--version"]])
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    loaded = loaded_by(
        f"from pipeline.cli import main\ntry:\n    main({arguments!r}, prog_name='pipeline')\nexcept SystemExit: pass"
    )
    assert "click" in loaded
    assert not loaded & (MODEL_LIBRARIES | {"zarr", "numpy", "pyarrow", "pydantic", "matplotlib", "rich"})


def test_help_answers_in_half_a_second() -> None:
    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pipeline", "--help"], cwd=ROOT, capture_output=True, check=True)
        return time.perf_counter() - began

    assert any(seconds() < 0.5 for _ in range(10)), "in ten tries, as other tests may be running"


def test_reading_a_configuration_loads_no_model_library() -> None:
    assert not loaded_by("import pipeline.config.loading, pipeline.config.schema") & MODEL_LIBRARIES


def test_import_contracts() -> None:
    """`pipeline -> stages -> storage`, and the other contracts of pyproject.toml."""
    command = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
