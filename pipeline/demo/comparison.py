"""How students of one store compare: summary.json, the table, and what the numbers say in words, win or lose.

Data path: evaluation, store, curves, clock -> **summary** -> table and verdict on a terminal, or report.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.evaluate import Evaluation
from pipeline.extraction.planning import Estimate
from stages.training.metrics import read_metrics
from storage.tools.status import Status

KD, CE = "kd", "ce"  # the twins: with the teacher's rows, and with cross-entropy alone


def summarise(
    *, evaluation: Evaluation, runs: Path, store: Status, planned: Estimate, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Return the content of summary.json.

    Args:
        evaluation: of teacher and students.
        runs: where the run directory of each student lies; its curve gives the tokens and seconds of its training.
        store: that they learned from.
        planned: what `pipeline plan` says of that store.
        seconds: of each step.
    """
    students: dict[str, Any] = {}
    for name, scores in evaluation.students.items():
        steps = [line for line in trained_lines(runs / name) if line["event"] == "step"]
        students[name] = {
            "nll": scores.nll,
            "kl": scores.kl,
            "top1_agreement": scores.top1_agreement,
            "top1_agreement_interval": scores.top1_agreement_interval,
            "ece": scores.ece,
            "tokens": sum(line["tokens"] for line in steps),
            "seconds": sum(line["seconds"] for line in steps),
            "calibration": [asdict(item) for item in scores.calibration],
        }
    return {
        "teacher": {
            "nll": evaluation.teacher.nll,
            "ece": evaluation.teacher.ece,
            "calibration": [asdict(item) for item in evaluation.teacher.calibration],
        },
        "students": students,
        "store": store_facts(store),
        "heldout": {"documents": evaluation.documents, "tokens": evaluation.tokens},
        "plan": {"tokens": planned.tokens, "rows": planned.rows, "bytes": planned.bytes, "seconds": planned.seconds},
        "timings": {**seconds, "teacher_for_later_students": 0.0},
    }


def trained_lines(run: Path) -> list[dict[str, Any]]:
    """Return the training curve of a student, empty for an untrained one."""
    return [dict(line) for line in read_metrics(run / "metrics.jsonl")]


def store_facts(store: Status) -> dict[str, Any]:
    """Return the store's part of the summary."""
    return {
        "rows": store.rows,
        "bytes": store.bytes,
        "bytes_per_row": store.bytes_per_row,
        "digest": store.digest,
        "shards": store.shards,
        "head_mass": store.head_mass,
    }


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """Explain the table, win or lose, and what it cannot show."""
    kd, ce = summary["students"][KD], summary["students"][CE]
    outcomes = []
    for key, title in (("kl", "KL"), ("nll", "NLL"), ("ece", "calibration error")):
        word = "wins" if kd[key] < ce[key] else "loses"
        outcomes.append(f"{word} on {title} ({kd[key]:.3f} against {ce[key]:.3f})")
    (kd_low, kd_high), (ce_low, ce_high) = kd["top1_agreement_interval"], ce["top1_agreement_interval"]
    apart = "the intervals are apart" if kd_low > ce_high or ce_low > kd_high else "the intervals overlap: undecided"
    outcomes.append(f"top-1 agreement {kd['top1_agreement']:.1%} against {ce['top1_agreement']:.1%}, {apart}")
    return [
        f"kd and ce share start, order and tokens; the stored rows are the only difference. kd {'; '.join(outcomes)}.",
        "KL is what distillation minimises and NLL what cross-entropy minimises, so a lead in KL is expected, one in "
        "NLL is a gift; small starts from the finished kd, so it has seen more text.",
        "A 4-bit 135M teacher and a few minutes on a processor show the mechanics, not the quality to be had.",
    ]


def table(summary: Mapping[str, Any]) -> list[str]:
    """Return the lines of the comparison table."""
    heldout = summary["heldout"]
    lines = [
        f"{heldout['tokens']:,} positions of {heldout['documents']} held-out topics; KL(teacher || student) over the "
        "full vocabulary; nats per token",
        f"{'':10}{'NLL':>8}{'KL':>8}  {'top-1 agreement':22}{'ECE':>7}{'tokens':>9}{'seconds':>9}",
        f"{'teacher':10}{summary['teacher']['nll']:8.3f}{'':8}  {'':22}{summary['teacher']['ece']:7.3f}",
    ]
    for name, scores in summary["students"].items():
        low, high = scores["top1_agreement_interval"]
        agreement = f"{scores['top1_agreement']:6.1%} [{low:.1%}, {high:.1%}]"
        lines.append(
            f"{name:10}{scores['nll']:8.3f}{scores['kl']:8.3f}  {agreement:22}{scores['ece']:7.3f}"
            f"{scores['tokens']:9,}{scores['seconds']:9.0f}"
        )
    return lines
