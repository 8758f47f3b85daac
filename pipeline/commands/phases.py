"""`pipeline plan`, `extract` and `train`: the two phases, and what they would take."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.options import config_argument, dry_run_option, json_option, set_option
from pipeline.runtime import is_main_process
from pipeline.terminal.application import Session, common_options
from pipeline.terminal.text import bytes_text, counted, duration_text, print_facts, print_json, size_line, write
from storage.errors import DistillError, StoppedError

if TYPE_CHECKING:
    from pipeline.extraction.planning import Estimate
    from pipeline.training.estimate import TrainingEstimate


@click.command()
@config_argument
@set_option
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Teacher tokens per second.")
@json_option
@common_options
def plan(config_path: Path, overrides: tuple[str, ...], rate: float | None, as_json: bool) -> None:
    """Tell what `extract` would take: rows, bytes, time. Loads no weights."""
    from pipeline.config.loading import load_extract
    from pipeline.extraction.planning import estimate

    show_estimate(estimate(load_extract(config_path, overrides), tokens_per_second=rate), as_json=as_json)


@click.command()
@config_argument
@set_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Stop after N new shards; run again to go on.")
@dry_run_option
@json_option
@common_options
@click.pass_obj
def extract(
    session: Session, config_path: Path, overrides: tuple[str, ...], limit: int | None, dry_run: bool, as_json: bool
) -> None:
    """Read a corpus with a teacher and store what it predicts.

    The same command again goes on where it stopped.
    """
    from pipeline import extract
    from pipeline.config.loading import load_extract
    from pipeline.extraction.planning import estimate
    from pipeline.terminal.progress import show_extract

    config = load_extract(config_path, overrides)
    if dry_run:
        show_estimate(estimate(config), as_json=as_json)
    else:
        try:
            show_extract(extract.extract(config, limit=limit), quiet=session.quiet, as_json=as_json)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(_interrupted(config.store)) from error


@click.command()
@config_argument
@set_option
@dry_run_option
@json_option
@common_options
@click.pass_obj
def train(session: Session, config_path: Path, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Train a student from a store or from a live teacher. After an interruption the same command goes on."""
    from pipeline import train
    from pipeline.config.loading import load_train
    from pipeline.report.page import write_run_report
    from pipeline.terminal import progress
    from pipeline.training.estimate import dry_run as estimate_of

    config = load_train(config_path, overrides)
    if dry_run:
        with progress.display(quiet=session.quiet or as_json) as screen:
            estimate = estimate_of(config, tell=lambda event: progress.tell_train(event, screen))
        if is_main_process():
            show_training_estimate(estimate, as_json=as_json)
    else:
        progress.show_train(train.train(config), quiet=session.quiet, as_json=as_json)
        if is_main_process():
            try:
                write(f"report {write_run_report(config.run)}", err=True)
            except KeyboardInterrupt:
                raise StoppedError(
                    "interrupted while the report was written: the training is finished and its model saved",
                    where=str(config.run),
                    fix="nothing is lost; the same command again writes the report",
                ) from None


def _interrupted(store: Path) -> str:
    """Say what an interrupted extraction keeps."""
    from storage.commit.manifest import Manifest
    from storage.files import open_files

    with suppress(DistillError):  # it was not begun yet, or something is wrong with it that the next run will tell
        manifest = Manifest.open(open_files(store))
        committed = sum(manifest.record(spec) is not None for spec in manifest.shards)
        shards = f"{committed} of {counted(len(manifest.shards), 'shard')} are committed and kept"
        return f"interrupted; {shards}" + ("; one in work is computed anew" if committed < len(manifest.shards) else "")
    return "interrupted"


def show_estimate(estimate: Estimate, *, as_json: bool) -> None:
    """Write what an extraction would take."""
    if as_json:
        print_json(estimate)
        return
    about = "" if estimate.exact else "about "
    bound = "at most" if estimate.at_most else "about"
    held_out = f" ({estimate.heldout_documents:,} held out)" if estimate.heldout_documents else ""
    if estimate.seconds is None or estimate.tokens_per_second is None:
        time = "unknown until this teacher has run here with these settings; pipeline plan --rate N assumes a rate"
    else:
        rate = f"{estimate.tokens_per_second:,.0f} tokens/s ({estimate.rate_source})"
        time = f"about {duration_text(estimate.seconds)} at {rate}"
    print_facts(
        [
            ("teacher", f"{estimate.teacher}, {estimate.dtype} on {estimate.device}"),
            ("corpus", f"{counted(estimate.documents, 'document')}{held_out}, {about}{estimate.tokens:,} tokens"),
            ("rows", f"{about}{estimate.rows:,} in {counted(estimate.shards, 'shard')}; {estimate.contents}"),
            ("size", f"{bound} {size_line(estimate.bytes, estimate.bytes_per_row)}"),
            ("time", time),
            *(("note", note) for note in estimate.notes),
        ]
    )


def show_training_estimate(estimate: TrainingEstimate, *, as_json: bool) -> None:
    """Write what a training run would take."""
    if as_json:
        print_json(estimate)
        return
    computed = f"{estimate.dtype} on {estimate.device}"
    facts = [
        ("student", f"{estimate.parameters / 1e6:,.1f}M parameters, {computed}"),
        ("steps", f"{estimate.steps:,}, about {estimate.tokens:,} tokens, {estimate.epochs:.2f} epochs"),
        ("corpus" if estimate.online else "store", f"{estimate.sequences:,} sequences"),
        ("memory", f"about {bytes_text(estimate.memory_bytes)}"),
        ("time", f"about {duration_text(estimate.seconds)}, from one micro-batch measured now"),
    ]
    if estimate.teacher_parameters is not None:
        facts.insert(1, ("teacher", f"{estimate.teacher_parameters / 1e6:,.1f}M parameters, live"))
    print_facts(facts)
