"""The doctor: what it finds on this machine, and what it says where something is missing."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from pipeline import doctor
from pipeline.cli import main
from pipeline.doctor import Check, examine, exit_code


def by_topic(path: Path) -> dict[str, list[Check]]:
    found: dict[str, list[Check]] = {}
    for check in examine(path):
        found.setdefault(check.topic, []).append(check)
    return found


def test_this_machine_is_fit(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["doctor", str(tmp_path), "--json"])
    checks = json.loads(result.stdout)
    assert result.exit_code == 0, checks
    topics = {check["topic"] for check in checks}
    assert topics >= {"python", "libraries", "processor", "device", "memory", "disk", "file system", "model cache"}
    assert all(check["fix"] for check in checks if check["level"] != "ok")
    assert list(tmp_path.iterdir()) == [], "probe files were left behind"


def test_output_for_people_is_one_line_each_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOW_DISK", 2**70)
    out = CliRunner().invoke(main, ["doctor", str(tmp_path)]).stdout
    assert "ok    python" in out
    assert "warn  disk" in out
    assert "pipeline plan" in out


def test_a_place_that_does_not_exist_yet_is_judged_by_what_is_above_it(tmp_path: Path) -> None:
    (check,) = by_topic(tmp_path / "a" / "b")["file system"]
    assert check.level == "ok"
    assert check.found.endswith(str(tmp_path))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a directory that nobody can write to")
def test_a_place_that_cannot_be_written_fails_with_5() -> None:
    result = CliRunner().invoke(main, ["doctor", "/proc"])
    assert result.exit_code == 5
    assert "cannot write at /proc" in result.stdout


@pytest.mark.parametrize(
    ("name", "replacement", "words"),
    [
        ("link", lambda *names: (_ for _ in ()).throw(OSError(95, "Operation not supported")), "hard link"),
        ("link", lambda *names: None, "a second link to the same name was not refused"),
        ("fsync", lambda descriptor: (_ for _ in ()).throw(OSError(22, "Invalid argument")), "fsync does not work"),
        ("rename", lambda *names: None, "renaming a directory does not work"),
    ],
)
def test_file_systems_without_the_guarantees(
    name: str, replacement: object, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, name, replacement)
    (check,) = by_topic(tmp_path)["file system"]
    assert (check.level, check.exit_code) == ("fail", 5)
    assert words in check.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("requirement", "level", "words"),
    [
        ("numpy>=99", "fail", "numpy>=99"),
        ("no-such-library-of-ours>=1", "fail", "no-such-library-of-ours missing"),
        ("numpy>=99; extra == 'dev'", "warn", "numpy>=99"),
        ("no-such-library-of-ours; extra == 'demo'", "ok", "demo: without no-such-library-of-ours"),
    ],
)
def test_libraries(requirement: str, level: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "declared_requirements", lambda: [Requirement(requirement)])
    told = [f"{check.found} {check.fix}" for check in examine(tmp_path) if check.level == level]
    assert any(words in line for line in told), told
    assert exit_code(list(examine(tmp_path))) == (2 if level == "fail" else 0)


def test_requirements_from_a_source_tree_are_the_installed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    declared = doctor.declared_requirements()
    assert {"torch", "zarr", "click"} <= {item.name for item in declared if item.marker is None}
    assert {"pytest"} <= {item.name for item in declared if item.marker is not None}


def test_storage_failures_outweigh_the_rest() -> None:
    checks = [
        Check(level="fail", topic="a", found="", exit_code=2),
        Check(level="fail", topic="b", found="", exit_code=5),
        Check(level="warn", topic="c", found="", exit_code=7),
    ]
    assert exit_code(checks) == 5
    assert exit_code(checks[:1]) == 2
    assert exit_code(checks[2:]) == 0
