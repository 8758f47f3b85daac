"""Plots as SVG text that takes its colours from the page, so that one report is right in light and in dark.

matplotlib lays out; its colours are stand-ins that are replaced by CSS variables afterwards. Text stays text and uses
the font of the page. Nothing depends on time or on the order of calls: the same data give the same bytes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

PALETTE = 6
"""Number of series colours: CSS variables --series-0 to --series-5."""

_INK, _GRID, _RULE = "#010203", "#040506", "#070809"
_SERIES = [f"#0a0b{index:02d}" for index in range(PALETTE)]
_SETTINGS: Any = {  # keys are literals in matplotlib's stubs
    "svg.fonttype": "none",
    "svg.hashsalt": "topk-distill",
    "font.size": 10.0,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "text.color": _INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve.

    Attributes:
        x, y: points; as many of one as of the other.
        color: index into the page's palette.
        faint: drawn thin and pale.
        marked: points are drawn as dots too.
    """

    x: Sequence[float]
    y: Sequence[float]
    color: int
    faint: bool = False
    marked: bool = False


def line_plot(
    series: Sequence[Series], *, x_label: str, y_label: str, diagonal: bool = False, from_zero: bool = False
) -> str:
    """Draw curves over a common axis.

    Args:
        series: the curves. They have no legend: the page says which colour is what.
        x_label: with unit.
        y_label: with unit.
        from_zero: let the y axis begin at 0.
        diagonal: draw the line y = x, for calibration, with both axes from 0 to 1.

    Returns:
        An `<svg>` element.
    """
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.3, 2.6), layout="constrained")
        axes = figure.add_subplot()
        if diagonal:
            axes.plot([0, 1], [0, 1], color=_INK, alpha=0.6, linestyle=(0, (3, 3)), linewidth=1.0)
            axes.set(xlim=(0, 1), ylim=(0, 1))
        for item in series:
            _draw(axes, item)
        if from_zero:
            axes.set_ylim(bottom=0.0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_formatter(_short_number)
        return _svg(figure, f"{y_label} over {x_label}")


def _draw(axes: Any, item: Series) -> None:
    color = _SERIES[item.color % PALETTE]
    if item.faint:
        axes.plot(item.x, item.y, color=color, linewidth=1.0, alpha=0.45)
    else:
        marker = "o" if item.marked else None
        axes.plot(item.x, item.y, color=color, marker=marker, markersize=3.5)


def _short_number(value: float, position: object = None) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids must be unique in the page that holds several plots
    label = f'role="img" aria-label="{html.escape(title)}"'
    text = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", lambda found: f"<svg {found[1]} {label}>", text, count=1)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for stand_in, variable in [(_INK, "--ink"), (_GRID, "--grid"), (_RULE, "--line")]:
        text = text.replace(stand_in, f"var({variable})")
    for index, stand_in in enumerate(_SERIES):
        text = text.replace(stand_in, f"var(--series-{index})")
    return text
