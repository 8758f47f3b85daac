"""Looking into a store: `pipeline inspect` and `export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.options import store_argument
from pipeline.terminal.application import common_options
from pipeline.terminal.text import Styled, counted, quoted, write
from storage.errors import UsageError

if TYPE_CHECKING:
    from pipeline.export import FileFormat, Format
    from pipeline.inspect import RowText, SequenceText
    from storage.plan import Split
    from storage.reader import StoreReader

FILE_FORMS = ["parquet", "arrow", "jsonl", "row-jsonl"]


@click.command()
@store_argument
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(FILE_FORMS), help="Default: what OUTPUT ends in.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N sequences.")
@click.option("--split", type=click.Choice(["train", "heldout"]), default="train", show_default=True)
@common_options
def export(store: Path, output: Path, form: FileFormat | None, limit: int | None, split: Split) -> None:
    """Write rows into one file for other tools.

    parquet, arrow and row-jsonl have one line per target row, jsonl one per sequence.
    """
    from pipeline.export import export_store, form_of
    from pipeline.inspect import open_store

    reader = open_store(store, split)
    sequences = range(len(reader) if limit is None else min(limit, len(reader)))
    rows = export_store(reader, form or form_of(output), output, sequences=sequences)
    write(f"{rows:,} rows in {output}{_without(reader)}", err=True)


@click.command()
@store_argument
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Sequences (text: 3; other forms: all).")
@click.option("--rows", type=click.IntRange(min=1), default=8, help="Rows shown per sequence, text only.")
@click.option("--seed", type=int, default=0, help="Chooses the sample.")
@click.option("--split", type=click.Choice(["train", "heldout"]), default="train")
@click.option("--format", "form", type=click.Choice(["text", *FILE_FORMS]), default="text")
@click.option(
    "--output", type=click.Path(path_type=Path), help="File to write; jsonl and row-jsonl go to stdout without it."
)
@common_options
def inspect(
    store: Path, sample: int | None, rows: int, seed: int, split: Split, form: Format, output: Path | None
) -> None:
    """Show what the teacher believed, or write rows for other tools.

    The shards committed so far suffice.
    """
    from pipeline import export, inspect

    reader = inspect.open_store(store, split)
    if form != "text":
        chosen = None if sample is None else inspect.choose(reader, sample, seed)
        written = export.export_store(reader, form, output, sequences=chosen)
        write(f"{written:,} rows" + (f" in {output}" if output else "") + _without(reader), err=True)
    elif output is not None:
        forms = " or ".join(FILE_FORMS)
        raise UsageError("text goes to the terminal only", where="--output", fix=f"add --format {forms}")
    else:
        show_sequences(inspect.sample_sequences(reader, count=sample or 3, seed=seed, rows=rows), len(reader))


def _without(reader: StoreReader) -> str:
    """Say what a file of training rows leaves out."""
    leaves_out = reader.split == "train" and reader.plan.heldout.fraction > 0.0
    return "; held-out rows are left out: --split heldout writes them" if leaves_out else ""


def show_sequences(sequences: Sequence[SequenceText], total: int) -> None:
    """Write sampled sequences: each row with its context, the token that followed, and the teacher's candidates."""
    for item in sequences:
        start = f" from token {item.window_start}" if item.window_start else ""
        write(Styled(text=f"sequence {item.number} of {total:,}: document {item.document}{start}", bold=True))
        kept = "" if item.head_mass is None else f"kept mass {item.head_mass:.3f}, "
        mean = f"{kept}entropy {item.entropy:.2f} nats (means)"
        write(f"{counted(item.tokens, 'token')}, {counted(item.rows, 'row')}, {mean}")
        write()
        for row in item.shown:
            show_row(row)
        write()


def show_row(row: RowText) -> None:
    """Write one target row in two lines."""
    context, following = (quoted(text)[1:-1].replace('\\"', '"') for text in (row.context, row.next_text))
    write(f"{row.position:>5}  {context}", Styled(text=following, fg="cyan", underline=True))
    shown = [
        Styled(text=f"  {quoted(item.text)} {item.probability:.1%}", fg="cyan" if item.follows else None)
        for item in row.candidates
    ]
    kept = "" if row.head_mass is None else f"kept {row.head_mass:.3f}  "
    facts = f"{kept}entropy {row.entropy:.2f}  p(next) {row.next_probability:.3g}"
    drawn = " ".join(quoted(text) + (f"×{count}" if count > 1 else "") for text, count in row.tail)
    if shown:
        write(f"{'':5}", *shown)
    samples = "samples" if row.head_mass is None else "tail"
    write(Styled(text=f"{'':7}{facts}" + (f"  {samples} {drawn}" if drawn else ""), dim=True))
