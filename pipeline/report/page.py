"""metrics.jsonl, configuration and summary -> one HTML file that needs nothing else: no scripts, no network.

Data path: store -> student -> **report**. `write_run_report` tells about one run, `write_comparison_report` about
several runs from one store against their teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from pipeline.config.loading import load_train
from pipeline.inspect import RowText
from pipeline.report.curves import Curves, calibration_plots, loss_plots, optimisation_plots, read_curves
from pipeline.report.plots import PALETTE
from pipeline.terminal.text import bytes_text, duration_text
from stages.durable import replace_file
from stages.training.run import LARGEST_RECORD, RunDirectory
from storage.errors import UsageError
from storage.files.regular import read_regular

TEACHER = "teacher"
TEACHER_LABEL = "Teacher"


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What a comparison says of its models, which it knows by name only.

    Attributes:
        labels: what to call each model; one without is called by its name. Their order sets the colours.
        references: models that are there to compare with and are never marked as best.
        headline: students whose KL to the teacher stands at the top of the page, if all of them are there: name and
            what to call it.
    """

    labels: Mapping[str, str] = field(default_factory=dict)
    references: frozenset[str] = frozenset()
    headline: Mapping[str, str] = field(default_factory=dict)

    def label(self, name: str) -> str:
        """Return what to call a model."""
        return self.labels.get(name, TEACHER_LABEL if name == TEACHER else name)

    def colors(self, names: Iterable[str]) -> dict[str, int]:
        """Return the number of each model's colour: the labelled ones first, in their order."""
        wanted = list(dict.fromkeys(names))
        ranked = [name for name in self.labels if name in wanted] + [name for name in wanted if name not in self.labels]
        return {name: ranked.index(name) % PALETTE for name in wanted}


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the comparison table.

    Attributes:
        key: field of a student in the summary; `<key>_interval` may hold a pair of bounds.
        title, hint: heading and what is better.
        pattern: format of the value.
        lower: whether lower is better; None: no value is better than another.
    """

    key: str
    title: str
    hint: str
    pattern: str
    lower: bool | None = None


COLUMNS = (
    Column(key="nll", title="NLL", hint="nats, lower", pattern="{:.4f}", lower=True),
    Column(key="kl", title="KL to teacher", hint="nats, lower", pattern="{:.4f}", lower=True),
    Column(key="top1_agreement", title="Top-1 agreement", hint="higher", pattern="{:.2%}", lower=False),
    Column(key="ece", title="ECE", hint="lower", pattern="{:.4f}", lower=True),
    Column(key="tokens", title="Tokens", hint="trained on", pattern="{:,.0f}"),
    Column(key="seconds", title="Seconds", hint="of training", pattern="{:,.0f}"),
)


def write_run_report(run: Path) -> Path:
    """Write RUN/report.html from RUN/config.yaml and RUN/metrics.jsonl, and return its path.

    Raises:
        UsageError: there is no run, or it has not taken a step yet.
    """
    RunDirectory(path=run).require_plain()
    data = read_regular(run / "config.yaml", most=LARGEST_RECORD)
    if data is None:
        raise UsageError("there is no training run here", where=str(run), fix="pipeline train CONFIG makes one")
    config = load_train(run / "config.yaml", most=LARGEST_RECORD).model_dump(mode="json")
    text = data.decode(errors="replace")
    curves = read_curves(run)
    if not curves.steps:
        raise UsageError("no step has been taken yet", where=str(run / "metrics.jsonl"))
    page = (
        _environment()
        .get_template("run.html.j2")
        .render(
            title=run.resolve().name,
            subtitle=f"Student from {config['student']['path']}, trained on {_learned_from(config)}.",
            headline=_run_headline(curves),
            curves=loss_plots({run.name: curves}, {run.name: 0}, ("loss", "ce", "kd")),
            optimisation=optimisation_plots(curves),
            run_facts=_run_facts(config, curves),
            config=text,
        )
    )
    return _write(run / "report.html", page)


def write_comparison_report(
    path: Path,
    *,
    runs: Mapping[str, Path],
    summary: Mapping[str, Any],
    samples: Sequence[RowText] = (),
    prompt: str = "",
    answers: Mapping[str, str] | None = None,
    title: str = "One teacher, one store, several students",
    notes: Sequence[str] = (),
    wording: Wording | None = None,
) -> Path:
    """Write the report that compares students of one store, and return its path.

    Args:
        path: the HTML file; an older one is replaced.
        runs: run directory by student; students without a run (the untrained one) are left out.
        summary: `teacher`, `students`, `store`, `timings` as in the demo's summary.json. A student's `calibration`,
            a list of {confidence, accuracy, count}, adds a reliability diagram; `<field>_interval` adds bounds.
        samples: rows of the store to show.
        prompt, answers: one prompt, and its continuation by each model.
        notes: sentences that explain the table.
        wording: what the models are called, and which of them are references.
    """
    wording = wording or Wording()
    students: Mapping[str, Mapping[str, Any]] = summary["students"]
    colors = wording.colors((*students, *runs))
    curves = {name: read_curves(run) for name, run in runs.items()}
    page = (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            title=title,
            subtitle="The teacher read the corpus once. Every student below learned from the store alone.",
            headline=_comparison_headline(summary, wording),
            ece_bins=15,
            columns=COLUMNS,
            rows=list(_table(summary[TEACHER], students, colors, wording)),
            notes=notes,
            legend=[{"label": wording.label(name), "color": color} for name, color in colors.items()],
            curves=loss_plots(curves, colors, ("ce", "kd")) + calibration_plots(students, colors),
            samples=samples,
            prompt=prompt,
            answers=[
                {"label": wording.label(name), "color": colors.get(name), "text": text}
                for name, text in (answers or {}).items()
            ],
            store_facts=_store_facts(summary["store"]),
            timings=list(_timings(summary.get("timings", {}))),
        )
    )
    return _write(path, page)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"visible": visible, "breaks": lambda text: text.replace("\n", "⏎")}
    return environment


def visible(token: str) -> str:
    """Write a token so that its white space shows: a leading space as ␣, line breaks as ⏎, tabs as ⇥."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def _write(path: Path, page: str) -> Path:
    replace_file(path, page.encode())
    return path


def _run_headline(curves: Curves) -> list[dict[str, str]]:
    last, seconds = curves.steps[-1], sum(line["seconds"] for line in curves.steps)
    headline = [{"label": "training loss, last step", "value": f"{last['loss']:.4f}"}]
    if curves.validations:
        headline.insert(0, {"label": "held-out loss, last", "value": f"{curves.validations[-1]['loss']:.4f}"})
    return [
        *headline,
        {"label": "steps", "value": f"{last['step']:,}"},
        {"label": "tokens", "value": f"{last['tokens_seen']:,}"},
        {"label": "in training steps", "value": duration_text(seconds)},
        {"label": "tokens per second", "value": f"{last['tokens_seen'] / max(seconds, 1e-9):,.0f}"},
    ]


def _run_facts(config: Mapping[str, Any], curves: Curves) -> list[tuple[str, str]]:
    loss = dict(config["loss"])
    fields = ", ".join(f"{key}={value}" for key, value in loss.items() if key != "name")
    share = config["kd_ratio"]
    return [
        ("store" if config["store"] else "corpus and teacher", _learned_from(config)),
        ("student", f"{config['student']['init']} of {config['student']['path']}"),
        ("loss", f"{share:g} × {loss.get('name', 'KDLoss')}({fields}) + {1 - share:g} × cross-entropy"),
        ("optimizer", f"AdamW, peak learning rate {config['optimizer']['lr']:g}, {config['schedule']['kind']}"),
        ("tokens per step", f"{config['tokens_per_step']:,} at most"),
        ("rows", f"{sum(line['rows'] for line in curves.steps):,}"),
        ("seed", str(config["seed"])),
    ]


def _learned_from(config: Mapping[str, Any]) -> str:
    """Return the store, or corpus and live teacher, of a run's configuration."""
    if config["store"]:
        return str(config["store"])
    sources = ", ".join(str(source["path"] or source["source"]) for source in config["corpus"])
    return f"{sources} with the live teacher {config['teacher_model']['path']}"


def _comparison_headline(summary: Mapping[str, Any], wording: Wording) -> list[dict[str, str]]:
    """Return how far distillation closed the gap, where there is a twin to compare with, and the store's numbers."""
    students, store = summary["students"], summary["store"]
    headline = []
    if wording.headline.keys() <= students.keys():
        headline = [
            {"label": f"KL to the teacher, {what}", "value": f"{students[name]['kl']:.3f}"}
            for name, what in wording.headline.items()
        ]
    return [
        *headline,
        {"label": "rows in the store", "value": f"{store['rows']:,}"},
        {"label": "bytes per row", "value": f"{store['bytes_per_row']:.1f}"},
    ]


def _table(
    teacher: Mapping[str, Any],
    students: Mapping[str, Mapping[str, Any]],
    colors: Mapping[str, int],
    wording: Wording,
) -> Iterator[dict[str, Any]]:
    trained = [values for name, values in students.items() if name not in wording.references]
    best = {column.key: _best(column, trained) for column in COLUMNS}
    for name, values in ((TEACHER, teacher), *students.items()):
        reference = name == TEACHER or name in wording.references
        cells = [_cell(column, values, None if reference else best[column.key]) for column in COLUMNS]
        yield {"label": wording.label(name), "color": colors.get(name), "cells": cells, "reference": reference}


def _cell(column: Column, values: Mapping[str, Any], best: float | None) -> dict[str, Any]:
    value, bounds = values.get(column.key), values.get(f"{column.key}_interval")
    return {
        "text": "–" if value is None else column.pattern.format(value),
        "best": value is not None and value == best,
        "interval": None if bounds is None else " to ".join(column.pattern.format(bound) for bound in bounds),
    }


def _best(column: Column, students: Sequence[Mapping[str, Any]]) -> float | None:
    values: list[float] = [student[column.key] for student in students if student.get(column.key) is not None]
    if column.lower is None or not values:
        return None
    return min(values) if column.lower else max(values)


def _store_facts(store: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = {"rows", "bytes", "bytes_per_row", "digest"}
    others = [
        (name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
        for name, value in store.items()
        if name not in known
    ]
    return [
        ("rows", f"{store['rows']:,}"),
        ("size", f"{bytes_text(store['bytes'])}, {store['bytes_per_row']:.1f} bytes per row"),
        *others,
        ("digest", str(store["digest"])),
    ]


def _timings(timings: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    longest = max(timings.values(), default=0.0) or 1.0
    for name, seconds in timings.items():
        share = 100.0 * seconds / longest
        yield {"label": name.replace("_", " "), "share": share, "text": duration_text(seconds)}
