"""How long steps are told: on a terminal, in a log, and by one process only."""

from __future__ import annotations

import io
import logging
import warnings
from types import SimpleNamespace

import pytest
from rich.console import Console

from pipeline.runtime import LOGGER, warnings_in_one_line
from pipeline.terminal import progress
from pipeline.terminal.progress import Lines, Live, Silence, display
from pipeline.terminal.text import bytes_text, counted, duration_text, quoted


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (42.4, "42 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (18720, "5 h 12 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (7.7e6, "7.7 MB"), (2e9, "2.0 GB"), (3e12, "3.00 TB")],
)
def test_sizes(size: float, text: str) -> None:
    assert bytes_text(size) == text


def test_words() -> None:
    assert [counted(count, "shard") for count in (0, 1, 1200)] == ["0 shards", "1 shard", "1,200 shards"]
    assert quoted(' a\n"ü') == '" a\\n\\"ü"'


def test_a_log_gets_progress_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 1.0, 9.0, 10.0, 11.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    lines = Lines()
    lines.line("a fact")
    for done in range(5):
        lines.advance(done, 4, f"step {done}")
    assert capsys.readouterr().err.splitlines() == ["a fact", "  0%  step 0", " 75%  step 3"]


def test_a_terminal_gets_a_bar_below_the_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Live(console) as live:
        live.line("before [any] progress")
        assert "%" not in console.file.getvalue()  # type: ignore[attr-defined]
        live.advance(1, 4, "step [1]")
        live.line("between")
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "before [any] progress" in out
    assert "25%  step [1]" in out
    assert "between" in out


def test_only_the_main_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    with display(quiet=False) as place:
        assert isinstance(place, Lines)
    with display(quiet=True) as place:
        assert isinstance(place, Silence)
    for rank, processes, kind in (("1", None, Lines), ("1", "1", Lines), ("0", "2", Lines), ("1", "2", Silence)):
        monkeypatch.setenv("RANK", rank)
        if processes is not None:
            monkeypatch.setenv("WORLD_SIZE", processes)
        with display(quiet=False) as place:
            assert isinstance(place, kind)


def test_warnings_are_one_line_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(), warnings_in_one_line():
        warnings.simplefilter("always")
        warnings.warn("mind this", UserWarning, stacklevel=1)
        logging.getLogger(f"{LOGGER}.part").warning("and that")
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        warnings.warn("not twice", UserWarning, stacklevel=1)
        logging.getLogger(LOGGER).warning("not this either")
    assert capsys.readouterr().err.splitlines() == ["WARNING: mind this", "WARNING: and that"]
