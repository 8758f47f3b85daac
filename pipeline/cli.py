"""The command line. Each command loads its phase inside its body, so that `pipeline --help` imports no model library.

A command parses, calls one function of the application and shows what comes back; it decides nothing. It returns an
exit code, or None for 0. Failures are exceptions and end in `pipeline.application`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.application import DISTRIBUTION, Application, Session, common_options, distribution_version
from pipeline.runtime import is_main_process

if TYPE_CHECKING:
    from pipeline.config.schema import Phase
    from pipeline.export import FileFormat, Format
    from storage.plan import Split

config_argument = click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
store_argument = click.argument("store", type=click.Path(path_type=Path))
set_option = click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a configuration value: target.k=64."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and do not do it.")
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")


@click.group(
    cls=Application,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option("--version", is_flag=True, help="Show the version.")
@common_options
@click.pass_context
def main(context: click.Context, version: bool) -> None:
    """Offline top-k logit distillation: read a teacher once, train any number of students from the store.

    \b
    pipeline init          writes configurations to start from
    pipeline extract       teacher over a corpus  ->  store
    pipeline train         store -> student
    """
    if version:
        click.echo(f"{DISTRIBUTION} {distribution_version()}")
    elif context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path())
@common_options
def init(directory: Path) -> None:
    """Write configurations to start from.

    They go into DIRECTORY (default: here) and overwrite nothing.
    """
    from pipeline.init import write_starter

    for path in write_starter(directory):
        click.echo(f"wrote {path}")
    click.echo(f"next: pipeline plan {directory / 'extract.yaml'}")


@main.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path())
@json_option
@common_options
def doctor(path: Path, as_json: bool) -> int:
    """Examine this machine, and PATH as the place of a store."""
    from pipeline.console import show_checks
    from pipeline.doctor import examine, exit_code

    checks = show_checks(examine(path), as_json=as_json)
    return exit_code(checks)


@main.command()
@config_argument
@set_option
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Teacher tokens per second.")
@json_option
@common_options
def plan(config_path: Path, overrides: tuple[str, ...], rate: float | None, as_json: bool) -> None:
    """Tell what `extract` would take: rows, bytes, time. Loads no weights."""
    from pipeline.config.loading import load_extract
    from pipeline.console import show_estimate
    from pipeline.planning import estimate

    show_estimate(estimate(load_extract(config_path, overrides), tokens_per_second=rate), as_json=as_json)


@main.command()
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
    from pipeline import console, extract, planning, progress
    from pipeline.config.loading import load_extract

    config = load_extract(config_path, overrides)
    if dry_run:
        console.show_estimate(planning.estimate(config), as_json=as_json)
    else:
        progress.show_extract(extract.extract(config, limit=limit), quiet=session.quiet, as_json=as_json)


@main.command()
@store_argument
@json_option
@common_options
def status(store: Path, as_json: bool) -> None:
    """Show what a store holds and what is missing."""
    from pipeline.console import show_status
    from storage.tools.status import status

    show_status(status(store), as_json=as_json)


@main.command()
@store_argument
@click.option("--quick", is_flag=True, help="Records and sizes only.")
@json_option
@common_options
def verify(store: Path, quick: bool, as_json: bool) -> int:
    """Check every byte of a store. Changes nothing; exit code 0 or 4."""
    from pipeline.console import show_verification
    from storage.tools.verify import verify

    return show_verification(verify(store, quick=quick), store, as_json=as_json)


@main.command()
@store_argument
@click.option("--yes", is_flag=True, help="Do it; without it, only say what would be done.")
@json_option
@common_options
def repair(store: Path, yes: bool, as_json: bool) -> None:
    """Move damaged shards out of a store, to be computed anew.

    No worker may run meanwhile. Nothing is deleted: everything goes to STORE/quarantine.
    What an interrupted gc has left out of its place goes back there.
    """
    from pipeline.console import show_repair
    from storage.tools.repair import command_after, repair

    actions = repair(store, apply=yes)
    show_repair(actions, store, command=command_after(store), applied=yes, as_json=as_json)


@main.command()
@store_argument
@click.option("--yes", is_flag=True, help="Do it; without it, only say what would be done.")
@json_option
@common_options
def gc(store: Path, yes: bool, as_json: bool) -> None:
    """Remove what interrupted runs and repairs left in a store.

    No worker may run meanwhile. What a commit record names is never touched; a damaged store is refused.
    """
    from pipeline.console import show_garbage
    from storage.tools.gc import collect_garbage

    show_garbage(collect_garbage(store, apply=yes), store, applied=yes, as_json=as_json)


@main.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@json_option
@common_options
def diff(first: Path, second: Path, as_json: bool) -> int:
    """Compare two stores: plans, then rows. Exit code 0: equal, 1: different.

    Of a store that is not finished, the shards committed so far are compared.
    """
    from pipeline.console import show_difference
    from storage.tools.diff import diff

    return show_difference(diff(first, second), as_json=as_json)


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--codec", metavar="ID[,NAME=VALUE...]", help="Codec of log-probabilities: exact, or sqrt-delta,...")
@click.option("--k", type=click.IntRange(min=1), metavar="N", help="A smaller exact head.")
@click.option("--documents-per-shard", type=click.IntRange(min=1), metavar="N", help="Another sharding.")
@click.option("--add-column", "columns", metavar="NAME=FILE", multiple=True, help="Values from a Parquet file.")
@json_option
@common_options
@click.pass_obj
def convert(session: Session, /, source: Path, target: Path, as_json: bool, **changes: object) -> None:
    """Write a changed copy of a finished store. SOURCE is only read.

    After an interruption the same command goes on.
    """
    from pipeline.conversion import conversion_of
    from pipeline.progress import show_convert
    from storage.tools.convert import convert

    show_convert(convert(source, target, conversion_of(changes)), quiet=session.quiet, as_json=as_json)


@main.command()
@store_argument
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(["parquet", "arrow", "jsonl"]), help="Default: what OUTPUT ends in.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N sequences.")
@click.option("--split", type=click.Choice(["train", "heldout"]), default="train", show_default=True)
@common_options
def export(store: Path, output: Path, form: FileFormat | None, limit: int | None, split: Split) -> None:
    """Write rows into one file for other tools.

    parquet and arrow have one line per target row, jsonl one per sequence.
    """
    from pipeline.export import export_store, form_of
    from pipeline.inspect import open_store

    rows = export_store(open_store(store, split), output, form or form_of(output), limit=limit)
    click.echo(f"{rows:,} rows in {output}", err=True)


@main.command()
@store_argument
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Sequences (text: 3; other forms: all).")
@click.option("--rows", type=click.IntRange(min=1), default=8, help="Rows shown per sequence, text only.")
@click.option("--seed", type=int, default=0, help="Chooses the sample.")
@click.option("--split", type=click.Choice(["train", "heldout"]), default="train")
@click.option("--format", "form", type=click.Choice(["text", "json", "arrow", "parquet"]), default="text")
@click.option("--output", type=click.Path(path_type=Path), help="File to write; json goes to stdout without it.")
@common_options
def inspect(
    store: Path, sample: int | None, rows: int, seed: int, split: Split, form: Format, output: Path | None
) -> None:
    """Show what the teacher believed, or write rows for other tools.

    The shards committed so far suffice.
    """
    from pipeline import console, export, inspect

    reader = inspect.open_store(store, split)
    if form == "text" and output is None:
        console.show_sequences(inspect.sample_sequences(reader, count=sample or 3, seed=seed, rows=rows), len(reader))
    else:
        chosen = None if sample is None else inspect.choose(reader, sample, seed)
        rows = export.export_rows(reader, form, output, sequences=chosen)
        click.echo(f"{rows:,} rows" + (f" in {output}" if output else ""), err=True)


@main.command()
@config_argument
@set_option
@dry_run_option
@json_option
@common_options
@click.pass_obj
def train(session: Session, config_path: Path, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Train a student from a store or from a live teacher. After an interruption the same command goes on."""
    from pipeline import console, progress, report, train
    from pipeline.config.loading import load_train

    config = load_train(config_path, overrides)
    if dry_run:
        with progress.display(quiet=session.quiet or as_json) as place:
            estimate = train.dry_run(config, tell=lambda event: progress.tell_train(event, place))
        if is_main_process():
            console.show_training_estimate(estimate, as_json=as_json)
    else:
        progress.show_train(train.train(config), quiet=session.quiet, as_json=as_json)
        if is_main_process():
            click.echo(f"report {report.write_run_report(config.run)}", err=True)


@main.command("eval")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--teacher", metavar="PATH", type=click.Path(path_type=Path), help="Teacher directory (default: recorded)."
)
@click.option("--store", metavar="PATH", type=click.Path(path_type=Path), help="Store (default: the one of the runs).")
@click.option("--max-tokens", type=click.IntRange(min=1), default=100_000, show_default=True, help="Held-out tokens.")
@json_option
@common_options
def evaluate(runs: tuple[Path, ...], teacher: Path | None, store: Path | None, max_tokens: int, as_json: bool) -> None:
    """Score students beside their teacher on held-out documents."""
    from pipeline.console import show_evaluation
    from pipeline.evaluate import evaluate
    from pipeline.runs import find_store, name_models

    found = evaluate(store or find_store(runs), name_models(runs), teacher, max_tokens=max_tokens)
    show_evaluation(found, as_json=as_json)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--teacher", is_flag=True, help="Let the teacher answer too.")
@click.option("--chat", is_flag=True, help="Use the tokenizer's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@json_option
@common_options
def generate(run: Path, prompt: str, teacher: bool, chat: bool, max_new_tokens: int, as_json: bool) -> None:
    """Continue PROMPT with the model of RUN, greedily."""
    from pipeline.console import show_answers
    from pipeline.generate import generate

    answers = generate(run, prompt, teacher=teacher, chat=chat, max_new_tokens=max_new_tokens)
    show_answers(answers, as_json=as_json)


@main.command()
@click.argument("phase", type=click.Choice(["extract", "train"]))
@common_options
def schema(phase: Phase) -> None:
    """Print the JSON Schema of a configuration."""
    from pipeline.config.schema import json_schema

    click.echo(json_schema(phase), nl=False)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("demo"))
@click.option("--teacher", metavar="PATH", type=click.Path(path_type=Path), help="A model in place of the demo's own.")
@json_option
@common_options
@click.pass_obj
def demo(session: Session, directory: Path, teacher: Path | None, as_json: bool) -> None:
    """Do the whole job on a small real teacher, in minutes.

    Everything goes into DIRECTORY (default: demo). After an interruption the same command goes on.
    """
    from pipeline.demo import demo

    demo(directory, teacher=teacher, quiet=session.quiet, as_json=as_json)
