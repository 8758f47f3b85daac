"""Events of a long step -> a live bar on a terminal, plain lines elsewhere, JSON lines for machines.

The phases are generators of events and decide nothing about output; this module runs them. Only rank 0 of a
distributed run speaks. Every line of progress shows a rate and the time left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from pipeline.extraction import events as extract_events
from pipeline.runtime import is_main_process, printable
from pipeline.terminal.text import bytes_text, counted, duration_text, print_json, quoted, to_json, write

if TYPE_CHECKING:
    import storage.tools.convert
    from pipeline.training import events as train_events

PLAIN_INTERVAL = 10.0  # seconds between lines of progress where there is no terminal


class Display(Protocol):
    """Where the events of a step are told."""

    def line(self, text: str) -> None:
        """Tell something that stays."""
        ...

    def advance(self, done: float, total: float, text: str) -> None:
        """Tell how far the step is; a later call replaces or follows it."""
        ...


class Silence:
    """Tells nothing: --quiet, --json and ranks other than 0."""

    def line(self, text: str) -> None:
        """Drop it."""

    def advance(self, done: float, total: float, text: str) -> None:
        """Drop it."""


class Lines:
    """Plain lines on stderr, progress at most every `PLAIN_INTERVAL` seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def line(self, text: str) -> None:
        """Write it."""
        write(text, err=True, lines=True)

    def advance(self, done: float, total: float, text: str) -> None:
        """Write it if the last one is old enough."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + PLAIN_INTERVAL
            write(f"{done / max(total, 1.0):4.0%}  {text}", err=True)


class Live:
    """A bar at the bottom of a terminal, lines above it. It appears with the first progress, not while models load."""

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%  {task.description}", markup=False))
        self._console = console
        self._bar = Bar(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # the terminal is gone
            self._bar.stop()

    def line(self, text: str) -> None:
        """Write it above the bar."""
        self._console.print(printable(text, lines=True), highlight=False, markup=False, soft_wrap=True)

    def advance(self, done: float, total: float, text: str) -> None:
        """Move the bar."""
        self._bar.start()
        self._bar.update(self._task, completed=done, total=max(total, 1.0), description=printable(text))


@contextmanager
def display(*, quiet: bool) -> Iterator[Display]:
    """Choose how to tell: nothing, plain lines, or a live bar."""
    console = Console(stderr=True)
    if quiet or not is_main_process():
        yield Silence()
    elif console.is_terminal:
        with Live(console) as live:
            yield live
    else:
        yield Lines()


def show_extract(events: Iterable[extract_events.Event], *, quiet: bool, as_json: bool) -> None:
    """Run phase 1 and tell its events. The summary goes to stdout."""
    last = _run(events, tell_extract, quiet=quiet, as_json=as_json)
    if not as_json and is_main_process():
        write(extract_summary(last), lines=True)


def show_train(events: Iterable[train_events.Event], *, quiet: bool, as_json: bool) -> None:
    """Run phase 2 and tell its events. The summary goes to stdout."""
    last = _run(events, tell_train, quiet=quiet, as_json=as_json)
    if not as_json and is_main_process():
        write(train_summary(last), lines=True)


def show_convert(
    events: Iterable[storage.tools.convert.ValuesFound | storage.tools.convert.Converted], *, quiet: bool, as_json: bool
) -> None:
    """Run a conversion and tell how far it is. The summary goes to stdout."""
    last = _run(events, tell_convert, quiet=quiet, as_json=as_json)
    if not as_json:
        work = f"{counted(last.rows, 'row')} written in {duration_text(last.seconds)}"
        write(f"{last.store}: complete, {counted(last.shards, 'shard')}; {work}")
        write(f"digest {last.digest}")


def _run(events: Iterable[Any], tell: Callable[[Any, Display], None], *, quiet: bool, as_json: bool) -> Any:
    last = None
    with display(quiet=quiet or as_json) as screen:
        for last in events:
            try:
                tell(last, screen)
            except OSError:  # the terminal is gone, the work is not
                screen = Silence()
            if as_json and is_main_process():
                print_json({"event": type(last).__name__, **to_json(last)}, indent=None)
    return last


def tell_convert(event: storage.tools.convert.ValuesFound | storage.tools.convert.Converted, screen: Display) -> None:
    """Tell how far a conversion is."""
    from storage.tools.convert import ValuesFound

    rate = f"{event.rows / max(event.seconds, 1e-9):,.0f} rows/s  {duration_text(event.seconds_left)} left"
    if isinstance(event, ValuesFound):
        found = f"values of {event.checked} of {event.shards} shards looked up"
        screen.advance(event.checked, event.shards, f"{found}  {rate}")
    elif event.digest is None:
        screen.advance(event.committed, event.shards, f"{event.committed} of {event.shards} shards  {rate}")


def tell_extract(event: extract_events.Event, screen: Display) -> None:
    """Tell one event of phase 1."""
    if isinstance(event, extract_events.Started):
        screen.line(f"store {event.store}: {event.missing} of {event.shards} shards to do, about {event.rows:,} rows")
        for note in event.notes:
            screen.line(note)
    elif isinstance(event, extract_events.FirstRow):
        screen.line(first_row_text(event))
    elif isinstance(event, extract_events.Progress):
        rate = f"{event.tokens_per_second:,.0f} tokens/s  {duration_text(event.seconds_left)} left"
        screen.advance(event.rows, event.rows_total, f"{event.rows:,} rows  {rate}")
    elif isinstance(event, extract_events.ShardDone):
        held_out = ", held out" if event.split == "heldout" else ""
        kept = "" if event.head_mass is None else f", kept mass {event.head_mass:.3f}"
        size = f"{event.rows:,} rows, {bytes_text(event.bytes)}{kept}"
        screen.line(f"shard {event.shard} committed ({event.committed} of {event.shards}{held_out}): {size}")


def first_row_text(event: extract_events.FirstRow) -> str:
    """Write the first thing that the teacher said: real text, its five candidates, kept mass, bytes per row."""
    candidates = "  ".join(f"{quoted(text)} {probability:.1%}" for text, probability in event.candidates)
    context = printable(" ".join(event.context.split()))
    kept = "samples keep it" if event.head_mass is None else f"the head keeps {event.head_mass:.1%} of the probability"
    return (
        f"the teacher reads …{context[-70:]} and expects\n"
        f"    {candidates}\n"
        f"    it is {quoted(event.following)}; {kept}"
        f" in {'at most' if event.at_most else 'about'} {event.bytes_per_row:.0f} bytes per row"
        f" ({duration_text(event.seconds)} after the start)"
    )


def extract_summary(event: extract_events.ExtractSummary) -> str:
    """Write how a run of phase 1 ended."""
    rate = "" if event.tokens_per_second is None else f" at {event.tokens_per_second:,.0f} tokens/s"
    work = f"{counted(event.new_shards, 'new shard')}, {counted(event.new_rows, 'row')}"
    new = f"{work} in {duration_text(event.seconds)}{rate}"
    if event.digest is None:
        return f"{event.store}: {event.committed} of {event.shards} shards; {new}; the same command again goes on"
    return f"{event.store}: complete, {counted(event.shards, 'shard')}; {new}\ndigest {event.digest}"


def tell_train(event: train_events.Event, screen: Display) -> None:
    """Tell one event of phase 2."""
    from pipeline.training import events as train_events
    from stages.batches.corpus import Tokenized

    if isinstance(event, Tokenized):
        rate = f"{event.tokens / max(event.seconds, 1e-9):,.0f} tokens/s  {duration_text(event.seconds_left)} left"
        done = f"{event.documents:,} of {event.total:,} documents tokenised"
        screen.advance(event.documents, event.total, f"{done}  {rate}")
        for note in event.notes:
            screen.line(note)
    elif isinstance(event, train_events.Started):
        size = f"{event.parameters / 1e6:,.1f}M parameters, {event.dtype} on {event.device}"
        resumed = f", resuming after step {event.step}" if event.step else ""
        screen.line(f"run {event.run}: {size}; {event.steps:,} steps, about {event.tokens:,} tokens{resumed}")
    elif isinstance(event, train_events.StepDone):
        left = "" if event.seconds_left is None else f"  {duration_text(event.seconds_left)} left"
        rate = f"{event.tokens_per_second:,.0f} tokens/s{left}"
        losses = f"loss {event.loss:.4f}{_parts(event.kd, event.ce)}"
        screen.advance(event.step, event.steps, f"step {event.step:,} of {event.steps:,}  {rate}  {losses}")
    elif isinstance(event, train_events.Validated):
        losses = f"loss {event.loss:.4f}{_parts(event.kd, event.ce)}"
        screen.line(f"step {event.step:,}: held-out {losses} over {event.rows:,} rows")
    elif isinstance(event, train_events.Saved):
        screen.line(f"step {event.step:,}: checkpoint {event.path}")


def _parts(kd: float | None, ce: float | None) -> str:
    parts = [f"{name} {value:.4f}" for name, value in (("kd", kd), ("ce", ce)) if value is not None]
    return f" ({', '.join(parts)})" if parts else ""


def train_summary(event: train_events.Finished) -> str:
    """Write how a run of phase 2 ended."""
    if event.already:
        return f"finished already at step {event.step:,}: {event.model}"
    rate = f"{event.tokens / max(event.seconds, 1e-9):,.0f} tokens/s"
    return (
        f"{event.step:,} steps, {event.tokens:,} tokens in {duration_text(event.seconds)}, {rate}\nmodel {event.model}"
    )
