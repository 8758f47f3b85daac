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
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipeline.config.loading import load_extract, load_train
from pipeline.demo.comparison import CE, KD, summarise, table, verdict
from pipeline.demo.settings import SMALL, UNTRAINED, WORDING, DemoSettings
from pipeline.demo.teacher import convert
from pipeline.evaluate import evaluate
from pipeline.extract import extract
from pipeline.extraction.planning import Estimate, estimate
from pipeline.generate import generate
from pipeline.inspect import sample_sequences
from pipeline.report.page import write_comparison_report, write_run_report
from pipeline.terminal.progress import show_extract, show_train
from pipeline.terminal.text import Styled, bytes_text, duration_text, print_json, write
from pipeline.train import train
from stages.durable import replace_file
from stages.student.save import CardFacts, save_student
from stages.student.source import StudentSource, build_student
from storage.errors import UsageError
from storage.reader import StoreReader
from storage.tools.status import status
from storage.values import is_amount, parse_json

Event = TypeVar("Event")

WIDTH = 110  # columns of the final text


class StepTimer:
    """Seconds per step of the demo, on disk after every event, because an interrupted demo goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        with suppress(FileNotFoundError, ValueError):  # a note for the last page: one that is damaged begins anew
            noted = parse_json(path.read_bytes(), most=64 * 1024)
            self.seconds = {key: noted[key] for key in noted if is_amount(noted[key])}

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
    with teacher_out_of_reach(directory, teacher):
        train_student(directory, settings, SMALL, timer, quiet=quiet or as_json)
    tell("5 of 5: all of them on held-out text, beside the teacher")
    with timed(timer, "evaluate"):
        runs = {name: directory / "runs" / name / "model" for name in (UNTRAINED, CE, KD, SMALL)}
        evaluation = evaluate(directory / "store", runs, directory / "teacher")
        answers = answer_prompt(directory, settings)
    summary = summarise(
        evaluation=evaluation,
        runs=directory / "runs",
        store=status(directory / "store"),
        planned=planned,
        seconds=timer.seconds,
    )
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
    if link.exists() and not link.is_symlink():
        raise UsageError("not a link, and the demo makes a link of that name", where=str(link), fix="move it away")
    link.unlink(missing_ok=True)
    link.symlink_to(teacher.resolve(), target_is_directory=True)


@contextmanager
def teacher_out_of_reach(directory: Path, teacher: Path) -> Iterator[None]:
    """Take the link away for a while."""
    (directory / "teacher").unlink()
    try:
        yield
    finally:
        link_teacher(directory, teacher)


def extract_store(directory: Path, settings: DemoSettings, timer: StepTimer, *, quiet: bool) -> Estimate:
    """Plan and extract; return what a plan says now that the teacher's rate here is known."""
    path = write_config(directory / "extract.yaml", settings.extract_config(directory), "extract")
    config = load_extract(path)
    promised = estimate(config)
    if not quiet:
        duration = "not known yet" if promised.seconds is None else f"about {duration_text(promised.seconds)}"
        write(
            f"plan: {promised.documents} topics ({promised.heldout_documents} held out), {promised.tokens:,} tokens, "
            f"about {bytes_text(promised.bytes)}; time {duration}",
            err=True,
        )
    run(show_extract, timer.over("teacher_reads_corpus", extract(config)), quiet=quiet)
    return estimate(config)


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


def show_summary(
    directory: Path, settings: DemoSettings, summary: Mapping[str, Any], answers: Mapping[str, str]
) -> None:
    """Write table, verdict, teacher time, answers and what to try next."""
    write()
    for line in (*table(summary), "", *(textwrap.fill(text, WIDTH) for text in verdict(summary)), ""):
        write(line, lines=True)
    timings, store = summary["timings"], summary["store"]
    write(
        f"store: {store['rows']:,} rows in {bytes_text(store['bytes'])}, {store['bytes_per_row']:.1f} bytes per row "
        f"(planned {bytes_text(summary['plan']['bytes'])})\n"
        f"`pipeline plan` now says {planned_time(summary)} for this extraction; it took "
        f"{duration_text(timings['teacher_reads_corpus'])}\n"
        f"teacher time: {timings['teacher_reads_corpus']:.0f} s for the first student, "
        f"{timings['teacher_for_later_students']:.0f} s for each later one",
        lines=True,
    )
    write()
    write(f"prompt: {settings.prompt}")
    for name, text in answers.items():
        write(f"  {name:8} … {textwrap.shorten(text, WIDTH - 13, placeholder=' …')}")
    write()
    write(f"{directory / 'report.html'} shows all of it. Try next:")
    for command in next_commands(directory, settings):
        write(f"  {command}")


def planned_time(summary: Mapping[str, Any]) -> str:
    """Return the time that the plan states, in words."""
    seconds = summary["plan"]["seconds"]
    return "nothing" if seconds is None else duration_text(seconds)


def next_commands(directory: Path, settings: DemoSettings) -> list[str]:
    """Return three commands to try next, as they can be typed in this shell."""
    program = program_name()
    return [
        f"{program} inspect {directory / 'store'} --sample 3",
        f'{program} generate {directory / "runs" / KD} "{settings.prompt}" --teacher',
        f"{program} train {directory / 'kd.yaml'} --set run={directory / 'runs' / 'reverse'} "
        "--set loss.divergence=reverse_kl",
    ]


def program_name() -> str:
    """Return `pipeline` if the shell finds this environment's, else its path."""
    own = Path(sys.executable).parent / "pipeline"
    found = shutil.which("pipeline")
    if found is not None and Path(found).resolve() == own.resolve():
        return "pipeline"
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)


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
        wording=WORDING,
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
    write(err=True)
    write(Styled(text=text, bold=True), err=True)


def _silent(text: str) -> None:
    del text
