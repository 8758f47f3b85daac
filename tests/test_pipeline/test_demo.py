"""The demo on a tiny teacher: everything it promises to leave behind, and going on after an interruption."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.demo.comparison import verdict
from pipeline.demo.run import StepTimer, demo, link_teacher, program_name
from pipeline.demo.settings import DemoSettings
from storage.errors import IdentityError, UsageError
from storage.reader import StoreReader
from storage.tools.status import status


@pytest.fixture(scope="module")
def settings(tiny_corpus: Path) -> DemoSettings:
    return DemoSettings(
        corpus={"source": "jsonl", "path": str(tiny_corpus)},
        window=64,
        k=8,
        draws=4,
        layers=1,
        small_layers=1,
        steps=12,
        tokens_per_step=256,
        lr=1e-3,
        new_tokens=4,
    )


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, settings: DemoSettings
) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("demo")
    return directory, demo(directory, teacher=tiny_teacher_dir, settings=settings, quiet=True)


def test_summary_has_what_it_promises(finished: tuple[Path, dict[str, Any]]) -> None:
    directory, summary = finished
    assert json.loads((directory / "summary.json").read_bytes()) == json.loads(json.dumps(summary))
    assert set(summary["students"]) == {"untrained", "ce", "kd", "small"}
    for scores in summary["students"].values():
        assert {"nll", "kl", "top1_agreement", "ece", "tokens", "seconds"} <= scores.keys()
    assert summary["teacher"]["nll"] > 0
    assert summary["store"]["digest"] == StoreReader(directory / "store").digest
    assert summary["store"]["bytes_per_row"] == pytest.approx(summary["store"]["bytes"] / summary["store"]["rows"])
    assert summary["students"]["kd"]["tokens"] == summary["students"]["ce"]["tokens"] > 0
    assert summary["timings"]["teacher_reads_corpus"] > 0


def test_students_learn_and_distillation_comes_nearer_to_the_teacher(finished: tuple[Path, dict[str, Any]]) -> None:
    students = finished[1]["students"]
    assert students["kd"]["kl"] < students["untrained"]["kl"]
    assert students["kd"]["kl"] < students["ce"]["kl"]


def test_the_plan_is_right_within_a_factor_of_two(finished: tuple[Path, dict[str, Any]]) -> None:
    """Bytes without the tokenizer's files, which weigh more than the rows of so small a store."""
    plan, store = finished[1]["plan"], finished[1]["store"]
    assert plan["rows"] / 2 <= store["rows"] <= plan["rows"] * 2
    grown = status(finished[0] / "store").shard_bytes_per_row
    assert grown is not None
    assert plan["bytes"] / 2 <= grown * store["rows"] <= plan["bytes"] * 2


def test_it_leaves_report_runs_and_configurations(finished: tuple[Path, dict[str, Any]]) -> None:
    directory, summary = finished
    page = (directory / "report.html").read_text()
    assert summary["store"]["digest"] in page
    for name in ("kd", "ce", "small"):
        assert (directory / "runs" / name / "report.html").stat().st_size > 0
        assert (directory / "runs" / name / "model" / "model.safetensors").stat().st_size > 0
        assert (directory / f"{name}.yaml").exists()


def test_the_same_command_goes_on_after_an_interruption(
    tmp_path: Path,
    tiny_teacher_dir: Path,
    settings: DemoSettings,
    finished: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped while the teacher is out of reach: it is linked again, and no training is done twice."""
    calls = []

    def interrupt(name: str) -> None:
        calls.append(name)
        if name == "small":
            assert not (tmp_path / "teacher").exists()
            raise KeyboardInterrupt

    original = DemoSettings.train_config

    def train_config(self: DemoSettings, directory: Path, name: str) -> dict[str, Any]:
        interrupt(name)
        return original(self, directory, name)

    with monkeypatch.context() as patch:
        patch.setattr(DemoSettings, "train_config", train_config)
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path, teacher=tiny_teacher_dir, settings=settings, quiet=True)
    assert calls == ["kd", "ce", "small"]
    assert (tmp_path / "teacher").exists()
    before = (tmp_path / "runs" / "kd" / "metrics.jsonl").read_bytes()
    summary = demo(tmp_path, teacher=tiny_teacher_dir, settings=settings, quiet=True)
    assert (tmp_path / "runs" / "kd" / "metrics.jsonl").read_bytes() == before
    for name, scores in summary["students"].items():
        assert scores["kl"] == finished[1]["students"][name]["kl"], name


def test_other_settings_in_the_same_directory_are_refused(
    finished: tuple[Path, dict[str, Any]], tiny_teacher_dir: Path, tiny_corpus: Path
) -> None:
    other = DemoSettings(corpus={"source": "jsonl", "path": str(tiny_corpus)}, window=32, k=8, draws=4)
    with pytest.raises(IdentityError, match=r"rendering\.window: 64 -> 32"):
        demo(finished[0], teacher=tiny_teacher_dir, settings=other, quiet=True)


def test_timer_adds_up_over_interruptions(tmp_path: Path) -> None:
    StepTimer(tmp_path / "timings.json").add("step", 1.5)
    timer = StepTimer(tmp_path / "timings.json")
    timer.add("step", 2.0)
    assert timer.seconds == {"step": 3.5}


def test_link_is_replaced(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        link_teacher(tmp_path, tmp_path / name)
        assert (tmp_path / "teacher").resolve() == tmp_path / name


def test_a_directory_in_place_of_the_link_is_kept(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    with pytest.raises(UsageError, match="not a link"):
        link_teacher(tmp_path, tmp_path)


def test_verdict_says_lost_when_lost() -> None:
    def scores(kl: float, nll: float) -> dict[str, Any]:
        return {"kl": kl, "nll": nll, "ece": 0.1, "top1_agreement": 0.5, "top1_agreement_interval": (0.4, 0.6)}

    lines = verdict({"students": {"kd": scores(2.0, 5.0), "ce": scores(1.0, 4.0)}})
    assert "loses on KL (2.000 against 1.000)" in lines[0]
    assert "undecided" in lines[0]


def test_commands_to_try_next_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(program_name()).resolve() == (own / "pipeline").resolve()
    monkeypatch.setenv("PATH", str(own))
    assert program_name() == "pipeline"


def test_help_names_the_demo() -> None:
    from pipeline.cli import main

    assert "demo" in CliRunner().invoke(main, ["--help"]).output
