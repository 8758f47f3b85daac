"""The curves of a report: metrics.jsonl of one run or of several -> plots with a title and a note.

Data path: RUN/metrics.jsonl -> **plots** -> report. Losses are means per target row in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.report.plots import Series, line_plot
from stages.training.metrics import read_metrics
from storage.errors import UsageError

_NEEDED = {"step": ("loss", "tokens", "rows", "seconds"), "validation": ("loss",)}
LOSSES = {"loss": "Total loss", "ce": "Cross-entropy part", "kd": "KD part"}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot as the templates show it: heading, SVG, and a line below it."""

    title: str
    svg: Markup
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What a run measured.

    Attributes:
        steps: step lines of metrics.jsonl, each with `tokens_seen`, the running total.
        validations: validation lines, likewise.
    """

    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]


def read_curves(run: Path) -> Curves:
    """Read RUN/metrics.jsonl; empty lists if there is none.

    Raises:
        UsageError: a line is damaged, or lacks a number that training writes.
    """
    curves = Curves(steps=[], validations=[])
    seen = 0
    for number, values in enumerate(read_metrics(run / "metrics.jsonl"), start=1):
        lacks = [key for key in _NEEDED.get(values["event"], ()) if values.get(key) is None]
        if lacks:
            raise UsageError(f"line {number} has no {' and no '.join(lacks)}", where=str(run / "metrics.jsonl"))
        if values["event"] == "step":
            seen += values["tokens"]
            curves.steps.append({**values, "tokens_seen": seen})
        elif values["event"] == "validation":
            curves.validations.append({**values, "tokens_seen": seen})
    return curves


def loss_plots(runs: Mapping[str, Curves], colors: Mapping[str, int], losses: Sequence[str]) -> list[Plot]:
    """Draw one plot per loss: training thin, held-out with dots (training alone where nothing was held out)."""
    plots = []
    for key in losses:
        series: list[Series] = []
        for name, curves in runs.items():
            x, y = _points(curves.steps, key)
            held_x, held_y = _points(curves.validations, key)
            series.append(Series(x=x, y=y, color=colors[name], faint=bool(held_y)))
            series.append(Series(x=held_x, y=held_y, color=colors[name], marked=True))
        if any(len(item.y) for item in series):
            svg = line_plot(series, x_label="tokens trained on", y_label="nats per row")
            plots.append(Plot(title=LOSSES[key], svg=Markup(svg), note="thin: training; dots: held out"))
    return plots


def optimisation_plots(curves: Curves) -> list[Plot]:
    """Draw learning rate, gradient norm and speed of one run."""
    wanted = (
        ("lr", "Learning rate", "per step"),
        ("grad_norm", "Gradient norm", "before clipping"),
        ("tokens_per_second", "Speed", "tokens per second"),
    )
    plots = []
    for key, title, y_label in wanted:
        x, y = _points(curves.steps, key)
        if y:
            svg = line_plot([Series(x=x, y=y, color=0)], x_label="tokens trained on", y_label=y_label, from_zero=True)
            plots.append(Plot(title=title, svg=Markup(svg)))
    return plots


def calibration_plots(students: Mapping[str, Mapping[str, Any]], colors: Mapping[str, int]) -> list[Plot]:
    """Draw a reliability diagram from each student's `calibration` bins; none if no student has them."""
    series = []
    for name, values in students.items():
        bins = [item for item in values.get("calibration", ()) if item["count"]]
        if bins:
            x, y = [item["confidence"] for item in bins], [item["accuracy"] for item in bins]
            series.append(Series(x=x, y=y, color=colors[name], marked=True))
    if not series:
        return []
    svg = line_plot(series, x_label="confidence", y_label="accuracy", diagonal=True)
    return [Plot(title="Calibration", svg=Markup(svg), note="dashed: confidence equals accuracy")]


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    kept = [line for line in lines if line.get(key) is not None]
    return [line["tokens_seen"] for line in kept], [line[key] for line in kept]
