"""What is done with a whole store: `pipeline status`, `verify`, `repair`, `gc`, `diff` and `convert`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.options import json_option, store_argument
from pipeline.terminal.application import Session, common_options
from pipeline.terminal.text import (
    Styled,
    bytes_text,
    counted,
    duration_text,
    print_facts,
    print_json,
    size_line,
    to_json,
    write,
)
from storage.errors import UsageError

if TYPE_CHECKING:
    from storage.tools.columns import ColumnFile
    from storage.tools.diff import Difference, SplitDifference
    from storage.tools.gc import Garbage
    from storage.tools.repair import Action
    from storage.tools.status import Status
    from storage.tools.verify import Report
    from storage.values import Json


@click.command()
@store_argument
@json_option
@common_options
def status(store: Path, as_json: bool) -> None:
    """Show what a store holds and what is missing."""
    from storage.tools.status import status

    show_status(status(store), as_json=as_json)


@click.command()
@store_argument
@click.option("--quick", is_flag=True, help="Records and sizes only.")
@json_option
@common_options
def verify(store: Path, quick: bool, as_json: bool) -> int:
    """Check every byte of a store. Changes nothing; exit code 0 or 4."""
    from storage.tools.verify import verify

    report = verify(store, quick=quick)
    show_verification(report, store, as_json=as_json)
    return report.exit_code


@click.command()
@store_argument
@click.option("--yes", is_flag=True, help="Do it; without it, only say what would be done.")
@json_option
@common_options
def repair(store: Path, yes: bool, as_json: bool) -> None:
    """Move damaged shards out of a store, to be computed anew.

    No worker may run meanwhile. Nothing is deleted: everything goes to STORE/quarantine.
    What an interrupted gc has left out of its place goes back there.
    """
    from storage.tools.repair import command_after, repair

    actions = repair(store, apply=yes)
    show_repair(actions, store, command=command_after(store), applied=yes, as_json=as_json)


@click.command()
@store_argument
@click.option("--yes", is_flag=True, help="Do it; without it, only say what would be done.")
@json_option
@common_options
def gc(store: Path, yes: bool, as_json: bool) -> None:
    """Remove what interrupted runs and repairs left in a store.

    No worker may run meanwhile. What a commit record names is never touched; a damaged store is refused.
    """
    from storage.tools.gc import collect_garbage

    show_garbage(collect_garbage(store, apply=yes), store, applied=yes, as_json=as_json)


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@json_option
@common_options
def diff(first: Path, second: Path, as_json: bool) -> int:
    """Compare two stores: plans, then rows. Exit code 0: equal, 1: different.

    Of a store that is not finished, the shards committed so far are compared.
    """
    from storage.tools.diff import diff

    found = diff(first, second)
    show_difference(found, as_json=as_json)
    return 0 if found.equal else 1


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--codec", metavar="ID[,NAME=VALUE...]", help="Codec of log-probabilities and its parameters.")
@click.option("--k", type=click.IntRange(min=1), metavar="N", help="A smaller exact head.")
@click.option("--documents-per-shard", type=click.IntRange(min=1), metavar="N", help="Another sharding.")
@click.option("--add-column", "columns", metavar="NAME=FILE", multiple=True, help="Values from a Parquet file.")
@json_option
@common_options
@click.pass_obj
def convert(
    session: Session,
    source: Path,
    target: Path,
    codec: str | None,
    k: int | None,
    documents_per_shard: int | None,
    columns: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a changed copy of a finished store. SOURCE is only read.

    After an interruption the same command goes on.
    """
    from pipeline.terminal.progress import show_convert
    from storage.tools.convert import Conversion, convert

    changes = Conversion(
        codec=None if codec is None else codec_parameters(codec),
        k=k,
        documents_per_shard=documents_per_shard,
        columns=tuple(column_file(text) for text in columns),
    )
    show_convert(convert(source, target, changes), quiet=session.quiet, as_json=as_json)


def show_status(status: Status, *, as_json: bool) -> None:
    """Write what a store holds."""
    if as_json:
        print_json(status)
        return
    sealed = f"sealed, digest {status.digest}" if status.digest else "not sealed"
    held_out = f" ({status.heldout_rows:,} held out)" if status.heldout_rows else ""
    corpus = [(status.documents, "document"), (status.sequences, "sequence"), (status.tokens, "token")]
    facts = [
        ("store", status.path),
        ("teacher", status.teacher or "unnamed"),
        ("rows", f"{status.rows:,}{held_out}, {status.contents}"),
        ("corpus", ", ".join(counted(count, noun) for count, noun in corpus)),
        ("size", size_line(status.bytes, status.bytes_per_row)),
        ("shards", f"{status.committed} of {status.shards} committed, {sealed}"),
    ]
    if status.head_mass is not None:
        facts.insert(4, ("kept mass", f"{status.head_mass:.4f} of the teacher's probability is in the exact head"))
    if status.pace is not None:
        newest = f"over the newest {counted(status.pace.shards, 'shard')}, {duration_text(status.pace.seconds)}"
        facts.append(("pace", f"{status.pace.rows_per_second:,.0f} rows/s {newest}"))
    facts.append(("contents", f"not checked here: pipeline verify {status.path} does"))
    print_facts(facts)
    if status.missing:
        write(f"{counted(status.missing, 'shard')} missing: run the same `{status.written_by}` again to go on")


def show_verification(report: Report, store: Path, *, as_json: bool) -> None:
    """Write what a verification found."""
    if as_json:
        print_json({"ok": not report.problems, **to_json(report)})
        return
    for problem in report.problems:
        write(Styled(text="damaged", fg="red", bold=True), f"  {problem.name}: {problem.message}")
    for warning in report.warnings:
        write(Styled(text="warning", fg="yellow"), f"  {warning}")
    checked = "names and sizes of" if report.quick else "every byte of"
    write(f"checked {checked} {report.committed} of {report.shards} shards, {report.rows:,} rows")
    if report.problems:
        write(f"{counted(len(report.problems), 'problem')}; run: pipeline repair {store}")
    else:
        write(Styled(text="no damage", fg="green"))


def show_repair(actions: Sequence[Action], store: Path, *, command: str, applied: bool, as_json: bool) -> None:
    """Write what a repair did or would do, and in the end the command that computes what is missing."""
    if as_json:
        print_json({"applied": applied, "actions": actions})
        return
    for action in actions:
        moved = f"moved to {action.moved_to}" if action.moved_to else f"would be moved to {action.goes_to}"
        moved = "missing, nothing to move" if action.missing else moved
        write(f"{action.name}: {action.reason}; {moved}")
    if not actions:
        write("nothing to repair")
    elif applied:
        write(f"run the same `{command}` again: it computes exactly what is missing now")
    else:
        write(f"no worker may run meanwhile; to do it: pipeline repair {store} --yes")


def show_garbage(found: Sequence[Garbage], store: Path, *, applied: bool, as_json: bool) -> None:
    """Write what a garbage collection removed or would remove."""
    if as_json:
        print_json({"applied": applied, "garbage": found})
        return
    for item in found:
        write(f"{item.name}: {item.reason}; {bytes_text(item.bytes)}{' removed' if applied else ''}")
    if not found:
        write("nothing to remove")
    elif not applied:
        total = bytes_text(sum(item.bytes for item in found))
        write(f"{total} in all; no worker may run meanwhile; to do it: pipeline gc {store} --yes")


def show_difference(found: Difference, *, as_json: bool) -> None:
    """Write how two stores differ."""
    if as_json:
        print_json({"equal": found.equal, **to_json(found)})
        return
    for line in found.plan:
        write(f"plan  {line}")
    for split, part in found.splits.items():
        if part.sequences or not part.equal:
            _show_split_difference(split, part)
    digests = " and ".join(dict.fromkeys(found.digests))
    write(f"{'equal' if found.equal else 'different'}, digest {digests}")


def _show_split_difference(split: str, part: SplitDifference) -> None:
    for count, which in ((part.only_first, "first"), (part.only_second, "second")):
        if count:
            write(f"{split}  {counted(count, 'sequence')} only in the {which} store")
    compared = f"{part.sequences_different:,} of {counted(part.sequences, 'sequence')}"
    write(f"{split}  {compared} and {part.rows_different:,} of {counted(part.rows, 'row')} differ")
    if part.equal:
        return
    if part.other_tokens:
        write(f"{split}  {counted(part.other_tokens, 'sequence')} with other tokens or positions")
    for name, count in part.other_parts.items():
        write(f"{split}  {counted(count, 'sequence')} with other values of {name}")
    write(
        f"{split}  {part.rows_other_head:,} other heads, {part.rows_other_samples:,} other samples;"
        f" log-probabilities differ by up to {part.largest_logprob:.3g} nats, mean KL {part.mean_kl:.2e} nats"
    )
    for item in part.examples:
        rows = (
            "other tokens"
            if item.rows is None
            else f"{counted(item.rows, 'row')}, up to {item.largest_logprob:.3g} nats"
        )
        what = ", ".join((rows, *item.parts))
        write(f"  shard {item.shard}, document {item.document}, window at {item.window_start}: {what}")


def column_file(text: str) -> ColumnFile:
    """Read `NAME=FILE`. Raises UsageError if it is not of that form."""
    from storage.tools.columns import ColumnFile

    name, separator, path = text.partition("=")
    if not separator or not path:
        raise UsageError(
            f"{text!r} is not NAME=FILE", where="--add-column", fix="write for example score=scores.parquet"
        )
    return ColumnFile(name, path)


def codec_parameters(text: str) -> dict[str, Json]:
    """Read `id,name=value,...`. Raises UsageError for an unknown id or a value that is not a number."""
    from storage.codecs import CODECS

    name, *settings = text.split(",")
    if name not in CODECS:
        raise UsageError(f"unknown codec {name!r}; there are {', '.join(sorted(CODECS))}", where="--codec")
    parameters: dict[str, Json] = {"id": name}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            parameters[key] = float(value)
        except ValueError:
            raise UsageError(
                f"{setting!r} is not NAME=NUMBER", where="--codec", fix="write for example sqrt-delta,root_step=0.01"
            ) from None
    return parameters
