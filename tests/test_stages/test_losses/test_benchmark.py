"""The losses' benchmark: peaks do not depend on what the allocator keeps, and every goal is printed and judged."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent.parent
FORWARD, REVERSE, JSD = (f"ours: fused sparse {name} + CE" for name in ("forward KL", "reverse KL", "JSD"))
FULL = "ours: fused full JSD + CE"
TIME, GOAL = (f"time beside cross-entropy's, {kind}" for kind in ("limit", "goal"))
PEAK, SHARE, FLAT, FASTER, SMALLER = "peak: ", "peak beside", "flat", "faster", "smaller"
WORDS = (TIME, GOAL, PEAK, SHARE, FLAT, FASTER, SMALLER)  # how the goals begin


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    from benchmarks import loss_cases, loss_report, losses

    return loss_cases, loss_report, losses


def result(bench, *, k=40, tokens=4096, **found):
    """A bfloat16 result at V = 49,152; `found` holds (time, peak) by name."""
    cases, report, _ = bench
    found = {"cross-entropy": (1.0, 1000.0), "three products": (0.8, 100.0), **found}
    return report.Result(
        setting=cases.Setting(tokens=tokens, vocab=49_152, k=k),
        rounds=11,
        clock="process",
        threads=1,
        torch=torch.__version__,
        cross_entropy_seconds=1.0,
        ratio={name: time for name, (time, _) in found.items()},
        mib={name: peak for name, (_, peak) in found.items()},
        left_out={},
    )


def verdicts(bench, one, others=()):
    """(case, goal) -> the verdict, as printed."""
    lines = [line.strip("| ") for line in bench[1].table(one, [one, *others]) if "≤" in line or "≥" in line]
    rows = [line.split(" | ") for line in lines]
    return {(row[0], next(goal for goal in WORDS if row[1].startswith(goal))): row[4] for row in rows}


def test_a_peak_holds_at_least_the_weight_gradient_and_a_chunk(bench, monkeypatch):
    """Also where the allocator keeps all that the making of the inputs has freed.

    In float32: a processor without products in bfloat16 makes float32 copies, and the peak depends on which one it is.
    """
    cases, _, losses = bench
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", str(1 << 40))
    setting = cases.Setting(tokens=256, vocab=16_384, k=16, dtype="float32")
    least = (cases.WIDTH + 256) * setting.vocab * 4 / (1 << 20)
    assert least <= losses.peak_mib(setting, JSD) <= least + 20


def test_settings_of_other_k_share_what_does_not_depend_on_it(bench, monkeypatch):
    cases, _, losses = bench
    asked = []  # a process for each: too long for a test
    monkeypatch.setattr(losses, "peak_mib", lambda setting, name: asked.append((setting.k, name)) or 1.0)
    settings = [cases.Setting(tokens=16, vocab=512, k=k) for k in (12, 16)]
    names = [*cases.BASE, FORWARD, "ours: KDLoss on logits"]
    first, second = losses.measure(settings, names, 3, "process")
    assert asked == [*((12, name) for name in names), (16, FORWARD)]
    assert list(first.ratio) == list(first.mib) == names
    assert set(second.ratio) == set(second.mib) == {*cases.BASE, FORWARD}
    assert [second.ratio[name] for name in cases.BASE] == [first.ratio[name] for name in cases.BASE]
    assert first.ratio["cross-entropy"] == 1.0


GOOD = {
    FORWARD: (0.84, 90.0),
    REVERSE: (1.2, 90.0),
    JSD: (1.2, 90.0),
    FULL: (1.3, 300.0),
    "trl sparse forward KL with tail": (1.3, 300.0),
    "torchtune reverse KL, teacher free": (2.0, 1000.0),
    "trl JSD, teacher free": (4.0, 900.0),
    "trl JSD": (4.0, 900.0),
}


@pytest.mark.parametrize(
    ("name", "found", "missed"),
    [
        (FORWARD, (0.86, 90.0), {GOAL}),
        (FORWARD, (1.01, 90.0), {TIME, GOAL, FASTER}),
        (FORWARD, (0.84, 98.0), {FLAT}),
        (FORWARD, (0.84, 98.1), {PEAK, FLAT}),
        (FORWARD, (0.84, 121.0), {PEAK, FLAT, SHARE, SMALLER}),
        (REVERSE, (1.31, 90.0), {TIME}),
        (REVERSE, (1.3, 401.0), {SMALLER}),
        (JSD, (1.31, 90.0), {TIME}),
        (FULL, (1.41, 300.0), {GOAL}),
        (FULL, (1.71, 601.0), {TIME, GOAL, SHARE, SMALLER}),
        ("trl JSD", (1.9, 900.0), {FASTER}),
    ],
)
def test_every_goal_is_judged(bench, name, found, missed):
    fewer = result(bench, tokens=1024, **{FORWARD: (0.84, 72.0)})
    good = verdicts(bench, result(bench, **GOOD), [fewer])
    assert set(good.values()) == {"met"}
    both = {FASTER, SMALLER}
    assert set(good) == {
        *((FORWARD, goal) for goal in WORDS),
        *((case, goal) for case in (REVERSE, JSD) for goal in {TIME, *both}),
        *((FULL, goal) for goal in {TIME, GOAL, SHARE, *both}),
    }
    bad = verdicts(bench, result(bench, **{**GOOD, name: found}), [fewer])
    mine = FULL if name == "trl JSD" else name
    assert {key for key, verdict in bad.items() if verdict == "MISSED"} == {(mine, goal) for goal in missed}


def test_a_dense_peer_is_looked_up_where_it_was_measured(bench):
    """At another k; with nothing to compare with, the goal is still printed."""
    alone = result(bench, k=64, **{JSD: (1.2, 90.0)})
    other = result(bench, **GOOD)
    assert {goal for (_, goal), found in verdicts(bench, alone).items() if found == "not measured"} == {FASTER, SMALLER}
    assert "not measured" not in verdicts(bench, alone, [other]).values()


def test_the_report_is_written_anew_from_what_is_kept(bench, monkeypatch, tmp_path):
    _, report, losses = bench
    report.save([result(bench, **GOOD), result(bench, tokens=1024, **GOOD)], tmp_path)
    report.save([replace(result(bench, **GOOD), rounds=12)], tmp_path)
    kept = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [(item["setting"]["tokens"], item["rounds"]) for item in kept] == [(1024, 11), (4096, 12)]
    assert kept[1] == json.loads(json.dumps(asdict(replace(result(bench, **GOOD), rounds=12))))
    written = (tmp_path / "losses.md").read_text()
    (tmp_path / "losses.md").unlink()
    monkeypatch.setattr("sys.argv", ["losses", "--render", str(tmp_path)])
    losses.main()
    assert (tmp_path / "losses.md").read_text() == written


def test_the_kept_report_is_that_of_the_kept_numbers(bench, tmp_path):
    kept = ROOT / "benchmarks" / "results"
    (tmp_path / "losses.jsonl").write_text((kept / "losses.jsonl").read_text())
    bench[1].render(tmp_path)
    assert (tmp_path / "losses.md").read_text() == (kept / "losses.md").read_text()
