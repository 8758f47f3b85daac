"""Reports: one file that needs nothing else, says what the numbers say, and cannot be made to run anything."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.demo.settings import WORDING
from pipeline.inspect import Candidate, RowText
from pipeline.report.page import visible, write_comparison_report, write_run_report
from stages.training.run import read_config
from storage.errors import UsageError

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = "</style><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>"


class Page(HTMLParser):
    """Collects tags, attributes and text of a page, and checks that every element is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open):
            self.cells[-1] += data


def metrics(kd: bool, heldout: bool = True) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, 9):
        losses = {"loss": 9.0 / step, "kd": 3.0 / step if kd else None, "ce": 6.0 / step}
        rest = {"lr": 1e-3, "grad_norm": 1.0, "tokens": 100, "rows": 90, "seconds": 0.5, "tokens_per_second": 200.0}
        lines.append({"event": "step", "step": step, **losses, **rest})
        if heldout and step % 4 == 0:
            lines.append({"event": "validation", "step": step, **losses, "rows": 40, "seconds": 0.1})
    return lines


def make_run(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(
        "store: my-store\nrun: my-run\nsteps: 8\n"
        f"student: {{init: pretrained, path: '{HOSTILE}'}}\nloss: {{name: KDLoss, temperature: 1.5}}\n"
        "kd_ratio: 0.7\noptimizer: {lr: 0.001}\nschedule: {kind: cosine}\ntokens_per_step: 128\nseed: 3\n"
    )
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    return {name: make_run(tmp_path / name, metrics(kd=name != "ce")) for name in ("kd", "ce", "small")}


def summary() -> dict[str, Any]:
    bins = [{"confidence": 0.1, "accuracy": 0.2, "count": 5}, {"confidence": 0.9, "accuracy": 0.7, "count": 3}]
    scores = {
        "untrained": (9.8, 7.1, 0.01, 0.01),
        "ce": (5.2, 3.0, 0.27, 0.03),
        "kd": (5.3, 2.7, 0.29, 0.02),
        "small": (5.9, 3.2, 0.23, 0.04),
    }
    students = {
        name: {
            "nll": nll,
            "kl": kl,
            "top1_agreement": top,
            "ece": ece,
            "tokens": 800,
            "seconds": 4.0,
            "calibration": bins,
        }
        for name, (nll, kl, top, ece) in scores.items()
    }
    students["kd"]["top1_agreement_interval"] = [0.28, 0.30]
    return {
        "teacher": {"nll": 2.7},
        "students": students,
        "store": {
            "rows": 12345,
            "bytes": 950_000,
            "bytes_per_row": 76.96,
            "digest": "ab" * 32,
            "head_mass": 0.876543,
        },
        "timings": {"teacher_reads_corpus": 100.0, "train_kd": 50.0},
    }


SAMPLE = RowText(
    position=3,
    context=f"for {HOSTILE}",
    next_text="\n",
    next_probability=0.19,
    candidates=(
        Candidate(text=" class", probability=0.21, follows=False),
        Candidate(text="\n", probability=0.19, follows=True),
    ),
    head_mass=0.83,
    entropy=2.9,
    tail=((" a", 1),),
)


def comparison(tmp_path: Path, runs: dict[str, Path], **options: Any) -> Path:
    options = {"summary": summary(), "samples": [SAMPLE], "prompt": HOSTILE, "answers": {"kd": HOSTILE}, **options}
    return write_comparison_report(tmp_path / "report.html", runs=runs, **{"wording": WORDING, **options})


def assert_self_contained(page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(value is not None and value.startswith("#") for value in links)
    policy = [value for name, value in page.attributes if name == "content" and value and "default-src" in value]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_reports_are_self_contained_and_hostile_text_stays_text(tmp_path: Path, runs: dict[str, Path]) -> None:
    for path in (comparison(tmp_path, runs), write_run_report(runs["kd"])):
        page = Page(path)
        assert_self_contained(page)
        assert HOSTILE in page.text


def test_reports_adapt_to_light_and_dark(tmp_path: Path, runs: dict[str, Path]) -> None:
    text = comparison(tmp_path, runs).read_text()
    assert "prefers-color-scheme: dark" in text
    body = text[text.index("<body>") :]
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", body), "a colour that does not come from the page"


def test_the_same_data_give_the_same_bytes(tmp_path: Path, runs: dict[str, Path]) -> None:
    first = comparison(tmp_path, runs).read_bytes()
    assert comparison(tmp_path, runs).read_bytes() == first
    assert write_run_report(runs["kd"]).read_bytes() == write_run_report(runs["kd"]).read_bytes()


def test_table_marks_the_best_student_of_each_column(tmp_path: Path, runs: dict[str, Path]) -> None:
    path = comparison(tmp_path, runs)
    assert re.findall(r'class="best">([^<]+)<', path.read_text()) == ["5.2000", "2.7000", "29.00%", "0.0200"]
    cells = [cell.strip() for cell in Page(path).cells]
    assert "28.00% to 30.00%" in " ".join(cells)
    assert "Teacher" in cells
    assert cells.count("–") == 5, "the teacher has no KL, agreement, ECE, tokens or seconds"


def test_comparison_holds_curves_samples_store_and_timings(tmp_path: Path, runs: dict[str, Path]) -> None:
    page = Page(comparison(tmp_path, runs))
    assert page.tags.count("svg") == 3
    for words in (
        "Cross-entropy part",
        "KD part",
        "Calibration",
        "12,345",
        "950.0 kB",
        "0.8765",
        "1 min 40 s",
        "␣class",
    ):
        assert words in page.text


def test_comparison_without_the_optional_parts(tmp_path: Path) -> None:
    content = summary()
    content["students"] = {"mine": {"nll": 5.0, "kl": 3.0}}
    del content["timings"]
    page = Page(comparison(tmp_path, {}, summary=content, samples=[], answers=None))
    assert page.tags.count("svg") == 0
    assert "mine" in page.text
    assert "Where the time went" not in page.text


def test_run_report(runs: dict[str, Path]) -> None:
    page = Page(write_run_report(runs["kd"]))
    assert page.tags.count("svg") == 6
    for words in (
        "1.1250",
        "800",
        "200",
        "0.7 × KDLoss(temperature=1.5) + 0.3 × cross-entropy",
        "tokens_per_step: 128",
    ):
        assert words in page.text


def test_run_report_of_cross_entropy_without_held_out_rows(tmp_path: Path) -> None:
    page = Page(write_run_report(make_run(tmp_path / "run", metrics(kd=False, heldout=False))))
    assert page.tags.count("svg") == 5
    assert "held-out loss" not in page.text


@pytest.mark.parametrize("lines", [[], metrics(kd=True)[:0]])
def test_run_without_a_step(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no step has been taken"):
        write_run_report(make_run(tmp_path / "run", lines))


def test_a_configuration_that_grew_when_it_was_spelled_out_is_reported(runs: dict[str, Path], tmp_path: Path) -> None:
    """A user's may have 256 KiB; what a run writes of it has all defaults besides."""
    run = tmp_path / "run"
    shutil.copytree(runs["kd"], run)
    with (run / "config.yaml").open("a") as file:
        file.write("# a default\n" * 30_000)
    assert write_run_report(run).is_file()
    assert (read_config(run / "config.yaml") or {})["run"]


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no training run here"):
        write_run_report(tmp_path)


def test_visible_white_space() -> None:
    assert visible(" a\n\tb") == "␣a⏎⇥b"
    assert visible("") == "∅"
