"""The process around a command: signals, environment of the libraries, log messages, caches, and which rank speaks.

Nothing here imports a model library: it runs before any of them is loaded, because they read their settings then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

LOGGER = "topk_distill"
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # control, format, lone surrogates, separators of lines, paragraphs
_JOINERS = "\u200c\u200d"  # format characters that scripts and emoji are written with, and that do nothing else


def printable(text: str, *, lines: bool = False) -> str:
    """Write what a terminal would obey instead of show as escapes: the one rule for all text that is not ours.

    Without it, a token, a file's name or a plan could clear the screen, set the window's title, forge a line of ours
    or turn the direction of writing. In JSON the escapes mean the same characters.

    Args:
        lines: line ends and tabs stay: it is a text of several lines.
    """
    if text.isprintable():
        return text
    kept = _JOINERS + ("\n\t" if lines else "")
    return "".join(
        char if char in kept or unicodedata.category(char) not in _UNSEEN else _escape(char) for char in text
    )


def _escape(char: str) -> str:
    return "\\u007f" if char == "\x7f" else json.dumps(char)[1:-1]


def message_text(text: str) -> str:
    """Write a message: further lines are indented, so that none passes for a line of ours."""
    first, *others = printable(text, lines=True).split("\n")
    return "\n".join([first, *(line if line.startswith(" ") else f"  {line}" for line in others)])


# Ctrl-C, what schedulers and torchrun send, a terminal that is closed, and what Slurm is told to send ahead of an end.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def prepare_libraries() -> None:
    """Set what the model libraries read when they are imported; what the user has set stays.

    No telemetry. Their own progress bars only on a terminal, where a download of gigabytes should be seen.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextlib.contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Show warnings, logged or raised by Python's own mechanism, as one line each, on the main process only.

    Whoever logs meanwhile, a library with words from a file of a model too, does it in printable characters.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.addFilter(lambda record: is_main_process())
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    previous, factory = warnings.showwarning, logging.getLogRecordFactory()
    warnings.showwarning = _show_warning
    logging.setLogRecordFactory(lambda *arguments, **extra: _printable_record(factory, *arguments, **extra))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        warnings.showwarning = previous
        logging.setLogRecordFactory(factory)


def _printable_record(factory: Callable[..., logging.LogRecord], *arguments: Any, **extra: Any) -> logging.LogRecord:
    record = factory(*arguments, **extra)
    try:
        text = record.getMessage()
    except Exception:  # an argument fails to write itself, or fits no place: logging tells that when it writes
        return record
    record.msg, record.args = message_text(text), ()
    return record


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if is_main_process():
        print(f"WARNING: {message_text(str(message))}", file=sys.stderr)


def is_main_process() -> bool:
    """Tell whether this is the process that speaks: rank 0 of a distributed run, or the only one, whatever its rank."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Handle these signals, but for those that are ignored, as nohup ignores SIGHUP. Only a main thread can."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in numbers}
        previous = {number: old for number, old in found.items() if old is not None and old != signal.SIG_IGN}
    for number in previous:
        signal.signal(number, handler)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # a forgotten generator may end in any
            for number, old in previous.items():
                signal.signal(number, old)


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Treat all of STOP_SIGNALS as Ctrl-C: all end tidily."""
    with _handled(_interrupt, *(number for number in STOP_SIGNALS if number != signal.SIGINT)):
        yield


@dataclass(kw_only=True)
class StopRequest:
    """Whether this process was asked to stop: the first signal that did."""

    signal: signal.Signals | None = None


@contextlib.contextmanager
def stop_signals_noted() -> Iterator[StopRequest]:
    """Note the first of STOP_SIGNALS, for work that saves itself at its next step; a second one interrupts it."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal is not None:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)
        if is_main_process():
            with contextlib.suppress(OSError):  # the terminal may be what is gone
                # Past Python's own buffers, in whose midst this may be called.
                os.write(2, f"\n{request.signal.name}: saving the step in work; a second one ends at once\n".encode())

    with _handled(note, *STOP_SIGNALS):
        yield request


@contextlib.contextmanager
def signals_end_process() -> Iterator[None]:
    """Let SIGTERM, SIGHUP and Ctrl-C end the process at once, around a call that waits outside Python.

    A handler written in Python runs only when such a call has returned. What is ignored stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    replaced = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in replaced:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def cache_directory() -> Path:
    """Return the user's cache directory of this product (below XDG_CACHE_HOME or ~/.cache); it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "topk_distill"
