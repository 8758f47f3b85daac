"""Each mutant is killed: a fault that somebody could make is noticed by the test that is named for it."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutants import MUTANTS
from mutation import Answer, Mutant, Mutation
from torture_results import save

ROOT = Path(__file__).parents[1]
ALL = [pytest.param(file, mutant, id=f"{file}: {mutant.fault}") for file in MUTANTS for mutant in MUTANTS[file]]
TESTS = sorted({mutant.test for mutants in MUTANTS.values() for mutant in mutants})


@pytest.mark.parametrize("file", MUTANTS)
def test_mutants_change_what_is_there(file: str) -> None:
    source = (ROOT / file).read_text()
    assert len({mutant.fault for mutant in MUTANTS[file]}) == len(MUTANTS[file])
    for mutant in MUTANTS[file]:
        assert mutant.applied(source) != source


def test_the_tests_of_mutants_exist() -> None:
    for test in TESTS:
        path, _, name = test.partition("::")
        functions = ast.parse((ROOT / "tests" / path).read_text()).body
        assert name.partition("[")[0] in {item.name for item in functions if isinstance(item, ast.FunctionDef)}, test


SMALL = {
    "storage/sums.py": "def half(value):\n    return value / 2\n",
    "tests/test_sums.py": (
        "from subprocess import check_output\n"
        "import sys\n"
        "import pytest\n"
        "PRINT = 'from storage.sums import half; print(half(4))'\n"
        "from storage.sums import half\n"
        "def test_half():\n    assert half(4) == 2\n"
        "def test_in_another_process():\n"
        "    assert check_output([sys.executable, '-c', PRINT]) == b'2.0\\n'\n"
        "@pytest.mark.parametrize('value', [0, 4])\n"
        "def test_cases(value):\n    assert half(value) == value / 2\n"
        "@pytest.fixture\n"
        "def broken():\n    assert half(4) == 2\n"
        "def test_fixture(broken):\n    pass\n"
        "def test_blind():\n    assert half(4)\n"
    ),
    "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '--import-mode=importlib'\n",
}


def test_what_becomes_of_a_mutant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name, text in SMALL.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def mutant(test: str, becomes: str = "value / 3") -> Mutant:
        return Mutant("another half", "value / 2", becomes, f"test_sums.py::{test}")

    found = {
        "test_half": "failed",
        "test_in_another_process": "failed",
        "test_cases": "failed",
        "test_cases[0]": "passed",
        "test_fixture": "error",
        "test_blind": "passed",
        "test_gone": "not run",
    }
    with Mutation(tmp_path, libraries=["pytest"]) as mutation:
        for test, outcome in found.items():
            answer = mutation.run_with(mutant(test), "storage/sums.py")
            assert answer.outcome(f"tests/test_sums.py::{test}") == outcome, answer.told
        whole = mutation.run("tests/test_sums.py")
        assert set(whole.outcomes.values()) == {"passed"}, whole.told
        killed = mutation.run_with(mutant("test_half", "__import__('os').abort()"), "storage/sums.py")
        assert killed.outcome("tests/test_sums.py::test_half") == "not run"
        for text in ("value / 4", "value"):
            with pytest.raises(ValueError, match=r"occurs [02] times"):
                mutation.run_with(Mutant("none", text, "0", "test_sums.py::test_half"), "storage/sums.py")
    assert (tmp_path / "storage/sums.py").read_text() == SMALL["storage/sums.py"]


@pytest.fixture(scope="module")
def mutation() -> Iterator[Mutation]:
    with Mutation(ROOT) as mutation:
        yield mutation


@pytest.fixture(scope="module")
def unchanged(mutation: Mutation) -> Answer:
    """All named tests without a mutant."""
    return mutation.run(*(f"tests/{test}" for test in TESTS))


@pytest.mark.torture
@pytest.mark.parametrize("test", TESTS)
def test_without_a_mutant_the_test_passes(test: str, unchanged: Answer) -> None:
    assert unchanged.outcome(f"tests/{test}") == "passed", unchanged.told


@pytest.fixture(scope="module")
def killed() -> Iterator[dict[str, list[float]]]:
    """Seconds of each mutant that was killed, by file; told as a table in the end."""
    seconds: dict[str, list[float]] = {}
    began = time.perf_counter()
    yield seconds
    if not seconds:
        return
    print("\n\nmutants  killed  s each  file")
    for file, mutants in MUTANTS.items():
        if file in seconds:
            mean = sum(seconds[file]) / len(seconds[file])
            print(f"{len(mutants):7}  {len(seconds[file]):6}  {mean:6.1f}  {file}")
    every, dead = sum(map(len, MUTANTS.values())), sum(map(len, seconds.values()))
    if dead == every:
        save("mutants of the code", started=began, mutants=every, killed=dead, files=len(MUTANTS))


@pytest.mark.torture
@pytest.mark.parametrize(("file", "mutant"), ALL)
def test_a_mutant_is_killed(file: str, mutant: Mutant, mutation: Mutation, killed: dict[str, list[float]]) -> None:
    began = time.perf_counter()
    answer = mutation.run_with(mutant, file)
    assert answer.outcome(f"tests/{mutant.test}") == "failed", answer.told
    killed.setdefault(file, []).append(time.perf_counter() - began)
