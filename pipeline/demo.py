"""The main job on a real teacher and real text, in minutes: extract once, train three students, compare them all.

Everything goes through the same functions as the commands, from configurations that the demo writes beside its results,
so that each step can be run again by hand. Interrupt it anywhere: the same command goes on.

    DIR/extract.yaml kd.yaml ce.yaml small.yaml    what was run
    DIR/teacher                                    link to the converted teacher; absent while the third student trains
    DIR/store  DIR/runs/{untrained,ce,kd,small}    what came out
    DIR/summary.json  DIR/report.html              how it compares
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from pipeline.config.loading import load_extract, load_train
from pipeline.console import bytes_text, duration_text, print_json
from pipeline.evaluate import Evaluation, evaluate
from pipeline.extract import extract
from pipeline.generate import generate
from pipeline.inspect import sample_sequences
from pipeline.planning import Estimate, estimate
from pipeline.progress import show_extract, show_train
from pipeline.report import write_comparison_report, write_run_report
from pipeline.train import train
from stages.student.save import CardFacts, save_student
from stages.student.source import StudentSource, build_student
from stages.teacher.smollm2 import convert
from stages.training.durable import replace_file
from stages.training.metrics import read_metrics
from storage.reader import StoreReader
from storage.status import Status, status

Event = TypeVar("Event")

UNTRAINED, CE, KD, SMALL = "untrained", "ce", "kd", "small"
TRAINED = (KD, CE, SMALL)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo. The defaults fit ten minutes on two cores.

    Attributes:
        corpus: one corpus source, as in an extract configuration.
        window, k, draws: tokens per teacher forward, exact head entries and tail samples per row.
        heldout_fraction, heldout_seed: what is set aside for evaluation. Of the seeds this one sets aside many short
            topics instead of a few long ones: a quarter of the documents with 9% of the text; the intervals need many.
        layers, small_layers: layers of the two twins (taken from the teacher) and of the third student (taken from
            the first, since the teacher is out of reach by then).
        steps, tokens_per_step, lr: training of each student.
        prompt, new_tokens: what teacher and students are asked to continue, and how far.
    """

    corpus: Mapping[str, Any] = field(default_factory=lambda: {"source": "topics"})
    window: int = 512
    k: int = 32
    draws: int = 8
    heldout_fraction: float = 0.2
    heldout_seed: int = 16
    layers: int = 6
    small_layers: int = 3
    steps: int = 72
    tokens_per_step: int = 1024
    lr: float = 1e-3
    prompt: str = "The with statement is used to"
    new_tokens: int = 40

    def extract_config(self, directory: Path) -> dict[str, Any]:
        """Return the extract configuration."""
        return {
            "store": str(directory / "store"),
            "teacher": {"path": str(directory / "teacher")},
            "corpus": [dict(self.corpus)],
            "rendering": {"window": self.window},
            "target": {"kind": "hybrid", "k": self.k, "draws": self.draws},
            "heldout": {"fraction": self.heldout_fraction, "seed": self.heldout_seed},
        }

    def train_config(self, directory: Path, name: str) -> dict[str, Any]:
        """Return the configuration of the student called `name`; the twins differ in `kd_ratio` and nothing else."""
        if name == SMALL:
            origin = {"path": str(directory / "runs" / KD / "model"), "layers": self.small_layers}
        else:
            origin = {"path": str(directory / "teacher"), "layers": self.layers}
        return {
            "store": str(directory / "store"),
            "run": str(directory / "runs" / name),
            "student": {"init": "layers_of_teacher", **origin},
            "loss": {"name": "KDLoss", "divergence": "forward_kl"},
            "kd_ratio": 0.0 if name == CE else 0.7,
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "optimizer": {"lr": self.lr},
            "schedule": {"kind": "cosine", "warmup_steps": max(1, self.steps // 10)},
            "checkpoint": {"every": max(1, self.steps // 3), "keep": 1},
            "validation": {"every": max(1, self.steps // 3), "sequences": 8},
        }


class StepTimer:
    """Seconds per step of the demo, on disk after every event, because an interrupted demo goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_bytes()) if path.exists() else {}

    def over(self, step: str, events: Iterator[Event]) -> Iterator[Event]:
        """Pass `events` through, adding the time that making each took to `step`."""
        began = time.perf_counter()
        for event in events:
            self.add(step, time.perf_counter() - began)
            yield event
            began = time.perf_counter()
        self.add(step, time.perf_counter() - began)

    def add(self, step: str, seconds: float) -> None:
        """Add seconds to a step."""
        self.seconds[step] = self.seconds.get(step, 0.0) + seconds
        replace_file(self.path, json.dumps(self.seconds).encode())


def demo(
    directory: Path,
    *,
    teacher: Path | None = None,
    settings: DemoSettings | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> dict[str, Any]:
    """Run the demo, or what is left of it, and return the content of summary.json.

    Args:
        directory: where everything goes; created if missing.
        teacher: a model directory to use in place of the demo's own teacher.
        settings: sizes.
        quiet: no progress.
        as_json: write summary.json to stdout in place of the table.

    Raises:
        DistillError: as the commands that it runs; IdentityError if `directory` was made by other settings.
    """
    settings = settings or DemoSettings()
    directory.mkdir(parents=True, exist_ok=True)
    timer = StepTimer(directory / "timings.json")
    tell = _silent if quiet or as_json else _heading
    tell("1 of 5: the teacher")
    with timed(timer, "prepare_teacher"):
        teacher = teacher if teacher is not None else convert()
    link_teacher(directory, teacher)
    tell("2 of 5: the teacher reads the corpus, once")
    planned = extract_store(directory, settings, timer, quiet=quiet or as_json)
    tell(
        f"3 of 5: two twins learn, {settings.layers} of the teacher's layers each: with the store, and from text alone"
    )
    save_untrained(directory, settings)
    train_student(directory, settings, KD, timer, quiet=quiet or as_json)
    train_student(directory, settings, CE, timer, quiet=quiet or as_json)
    tell(f"4 of 5: a third, smaller student, {settings.small_layers} layers, while the teacher is out of reach")
    (directory / "teacher").unlink()
    train_student(directory, settings, SMALL, timer, quiet=quiet or as_json)
    link_teacher(directory, teacher)
    tell("5 of 5: all of them on held-out text, beside the teacher")
    with timed(timer, "evaluate"):
        runs = {name: directory / "runs" / name / "model" for name in (UNTRAINED, CE, KD, SMALL)}
        evaluation = evaluate(directory / "store", runs, directory / "teacher")
        answers = answer_prompt(directory, settings)
    summary = summarise(directory, settings, planned, evaluation, timer)
    replace_file(directory / "summary.json", json.dumps(summary, indent=1).encode() + b"\n")
    write_report(directory, settings, summary, answers)
    if as_json:
        print_json(summary)
    else:
        show_summary(directory, settings, summary, answers)
    return summary


def link_teacher(directory: Path, teacher: Path) -> None:
    """Put the teacher within reach: the configurations know it by this link alone."""
    link = directory / "teacher"
    link.unlink(missing_ok=True)
    link.symlink_to(teacher.resolve(), target_is_directory=True)


def extract_store(directory: Path, settings: DemoSettings, timer: StepTimer, *, quiet: bool) -> Estimate:
    """Plan and extract; return what the plan promised when the extraction first began."""
    path = write_config(directory / "extract.yaml", settings.extract_config(directory), "extract")
    config = load_extract(path)
    promised = estimate(config)
    kept = directory / "plan.json"
    if not kept.exists():
        replace_file(kept, json.dumps(asdict(promised), default=str).encode())
    duration = "unknown" if promised.seconds is None else f"about {duration_text(promised.seconds)}"
    if not quiet:
        click.echo(
            f"plan: {promised.documents} topics ({promised.heldout_documents} held out), {promised.tokens:,} tokens, "
            f"about {bytes_text(promised.bytes)}; time {duration}",
            err=True,
        )
    run(show_extract, timer.over("teacher_reads_corpus", extract(config)), quiet=quiet)
    return promised


def save_untrained(directory: Path, settings: DemoSettings) -> None:
    """Save the twins' starting point, which the evaluation needs too."""
    target = directory / "runs" / UNTRAINED / "model"
    if target.exists():
        return
    source = StudentSource(init="layers_of_teacher", path=str(directory / "teacher"), layers=settings.layers)
    model = build_student(source, seed=0)
    reader = StoreReader(directory / "store")
    facts = CardFacts(
        teacher=str(reader.plan.recorded["teacher"].get("name")),
        store_digest=reader.digest,
        store_id=reader.plan.store_id,
        initialisation=f"{settings.layers} layers of the teacher",
        loss="none: untrained",
        parameters=model.num_parameters(),
        steps=0,
        tokens=0,
    )
    save_student(model, target, tokenizer_files=reader.tokenizer_files(), facts=facts)


def train_student(directory: Path, settings: DemoSettings, name: str, timer: StepTimer, *, quiet: bool) -> None:
    """Train one student and write its report."""
    path = write_config(directory / f"{name}.yaml", settings.train_config(directory, name), "train")
    config = load_train(path)
    run(show_train, timer.over(f"train_{name}", train(config)), quiet=quiet)
    write_run_report(config.run)


def run(show: Callable[..., None], events: Iterator[Any], *, quiet: bool) -> None:
    """Exhaust the events of a phase, showing them unless told otherwise."""
    if quiet:
        deque(events, maxlen=0)
    else:
        show(events, quiet=False, as_json=False)


def answer_prompt(directory: Path, settings: DemoSettings) -> dict[str, str]:
    """Continue the prompt with the teacher and both twins."""
    models = {"teacher": directory / "teacher", CE: directory / "runs" / CE, KD: directory / "runs" / KD}
    answers = {
        name: next(generate(path, settings.prompt, max_new_tokens=settings.new_tokens)).text
        for name, path in models.items()
    }
    return {name: " ".join(text.split()) for name, text in answers.items()}


def summarise(
    directory: Path, settings: DemoSettings, planned: Estimate, evaluation: Evaluation, timer: StepTimer
) -> dict[str, Any]:
    """Return the content of summary.json. Tokens and seconds of a student are those of its training."""
    store = status(directory / "store")
    students: dict[str, Any] = {}
    for name, scores in evaluation.students.items():
        steps = [line for line in trained_lines(directory, name) if line["event"] == "step"]
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
        "timings": {**timer.seconds, "teacher_for_later_students": 0.0},
    }


def trained_lines(directory: Path, name: str) -> list[dict[str, Any]]:
    """The training curve of a student, empty for the untrained one."""
    path = directory / "runs" / name / "metrics.jsonl"
    return [dict(line) for line in read_metrics(path)]


def store_facts(store: Status) -> dict[str, Any]:
    """The store's part of the summary."""
    return {
        "rows": store.rows,
        "bytes": store.bytes,
        "bytes_per_row": store.bytes_per_row,
        "digest": store.digest,
        "shards": store.shards,
        "head_mass": store.head_mass,
    }


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """Two lines that explain the table, win or lose, and what it cannot show."""
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


def show_summary(
    directory: Path, settings: DemoSettings, summary: Mapping[str, Any], answers: Mapping[str, str]
) -> None:
    """Write table, verdict, teacher time, answers and what to try next."""
    click.echo()
    for line in (*table(summary), "", *verdict(summary), ""):
        click.echo(line)
    timings, store = summary["timings"], summary["store"]
    click.echo(
        f"store: {store['rows']:,} rows in {bytes_text(store['bytes'])}, {store['bytes_per_row']:.1f} bytes per row "
        f"(planned {bytes_text(summary['plan']['bytes'])})\n"
        f"teacher time: {timings['teacher_reads_corpus']:.0f} s for the first student, "
        f"{timings['teacher_for_later_students']:.0f} s for each later one"
    )
    click.echo(f"\nprompt: {settings.prompt}")
    for name, text in answers.items():
        click.echo(f"  {name:8} … {text}")
    click.echo(f"\n{directory / 'report.html'} shows all of it. Try next:")
    for command in next_commands(directory, settings):
        click.echo(f"  {command}")


def table(summary: Mapping[str, Any]) -> list[str]:
    """Lines of the comparison table."""
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


def next_commands(directory: Path, settings: DemoSettings) -> list[str]:
    """Three commands to try next."""
    return [
        f"pipeline inspect {directory / 'store'} --sample 3",
        f'pipeline generate {directory / "runs" / KD} "{settings.prompt}" --teacher',
        f"pipeline train {directory / 'kd.yaml'} --set run={directory / 'runs' / 'reverse'} "
        "--set loss.divergence=reverse_kl",
    ]


def write_report(
    directory: Path, settings: DemoSettings, summary: Mapping[str, Any], answers: Mapping[str, str]
) -> None:
    """Write DIR/report.html."""
    samples = [
        row for item in sample_sequences(StoreReader(directory / "store"), count=2, rows=4) for row in item.shown
    ]
    write_comparison_report(
        directory / "report.html",
        runs={name: directory / "runs" / name for name in (CE, KD, SMALL)},
        summary=summary,
        samples=samples,
        prompt=settings.prompt,
        answers=answers,
        notes=verdict(summary),
    )


def write_config(path: Path, content: Mapping[str, Any], phase: str) -> Path:
    """Write a configuration that `pipeline extract` or `pipeline train` accepts."""
    text = yaml.safe_dump(dict(content), sort_keys=False)
    replace_file(path, f"# Written by `pipeline demo`. Run it: pipeline {phase} {path}\n{text}".encode())
    return path


@contextmanager
def timed(timer: StepTimer, step: str) -> Iterator[None]:
    """Add the time of a block to a step."""
    began = time.perf_counter()
    yield
    timer.add(step, time.perf_counter() - began)


def _heading(text: str) -> None:
    click.secho(f"\n{text}", bold=True, err=True)


def _silent(text: str) -> None:
    del text
