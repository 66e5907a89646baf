"""Line and bar charts as inline SVG that takes its colours and its font from the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastxkd._extras import require
from fastxkd.pages.numbers import finite

# matplotlib writes fixed colours; these stand for CSS variables until the SVG is done. They differ
# from every colour matplotlib uses by itself.
_VARIABLES = ("ink", "muted", "line", "card", "teacher", "base", "student")
_SENTINELS = {name: f"#0a1b{index:02x}" for index, name in enumerate(_VARIABLES, start=0x21)}
_MARKERS = {"teacher": ("s", (0, (4, 2))), "base": ("o", (0, (1, 1.4))), "student": ("D", "-")}
_WIDTH, _HEIGHT, _FONT = 360, 240, 12


@dataclass
class Series:
    """One line, or one group of bars: its name in the legend, its role's colour, its values."""

    name: str
    role: str
    values: Sequence[float | None]
    hollow: bool = False


def lines(key: str, at: Sequence[float], series: Sequence[Series], **axes: Any) -> str:
    """Values over layers or epochs; a missing value leaves a gap. Empty text if all are missing."""

    def draw(ax: Any) -> None:
        for one in series:
            marker, dashes = _MARKERS[one.role]
            color = _SENTINELS[one.role]
            ax.plot(
                *(at, [_number(value) for value in one.values]),
                label=one.name,
                color=color,
                linestyle=(0, (1, 1.4)) if one.hollow else dashes,
                linewidth=1.8,
                clip_on=False,
                marker=marker,
                markersize=5.5 if len(at) <= 24 else 0,
                markerfacecolor=_SENTINELS["card"] if one.hollow else color,
            )
        if len(at) == 1:
            ax.set_xlim(at[0] - 1, at[0] + 1)

    return _chart(key, series, draw, **axes)


def bars(key: str, at: Sequence[float], series: Sequence[Series], **axes: Any) -> str:
    """Bars side by side, up or down from zero."""

    def draw(ax: Any) -> None:
        width = 0.8 / len(series)
        for index, one in enumerate(series):
            color = _SENTINELS[one.role]
            ax.bar(
                [x + (index - (len(series) - 1) / 2) * width for x in at],
                [_number(value) for value in one.values],
                width=width * 0.88,
                label=one.name,
                facecolor="none" if one.hollow else color,
                edgecolor=color,
                linewidth=1.4,
            )
        ax.axhline(0, color=_SENTINELS["muted"], linewidth=0.8)
        margin = 1.0 if len(at) == 1 else 0.6
        ax.set_xlim(at[0] - margin, at[-1] + margin)

    return _chart(key, series, draw, **axes)


def _chart(
    key: str,
    series: Sequence[Series],
    draw: Callable[[Any], None],
    *,
    xlabel: str,
    ticks: tuple[Sequence[float], Sequence[str]] | None = None,
    ylim: tuple[float, float] | None = None,
    percent: bool = False,
) -> str:
    if not any(math.isfinite(_number(value)) for one in series for value in one.values):
        return ""
    matplotlib = require("matplotlib", extra="report")
    figure_module = require("matplotlib.figure", extra="report")
    ticker = require("matplotlib.ticker", extra="report")
    backend = require("matplotlib.backends.backend_svg", extra="report")
    # Without hashsalt the ids are random; with one salt for all, two charts on a page would share
    # them. DejaVu is matplotlib's own font: it is there on every machine and only sets the layout.
    settings = {"svg.fonttype": "none", "svg.hashsalt": key, "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(settings):
        figure = figure_module.Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), layout="constrained")
        backend.FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        ax = figure.add_subplot()
        ax.patch.set_alpha(0)
        draw(ax)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
        ax.spines["bottom"].set_color(_SENTINELS["line"])
        ax.grid(axis="y", color=_SENTINELS["line"], linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(length=0, labelsize=_FONT, labelcolor=_SENTINELS["muted"], pad=5)
        ax.set_xlabel(xlabel, fontsize=_FONT, color=_SENTINELS["muted"])
        if ticks:
            ax.set_xticks(ticks[0])
            ax.set_xticklabels(ticks[1], parse_math=False)
        else:
            ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        if ylim:
            ax.set_ylim(*ylim)
        ax.yaxis.set_major_locator(ticker.MaxNLocator(nbins=5))
        if percent:
            ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
        figure.legend(
            loc="outside upper left",
            ncols=len(series),
            frameon=False,
            fontsize=_FONT,
            labelcolor=_SENTINELS["ink"],
            handlelength=1.8,
            columnspacing=1.4,
            borderpad=0,
        )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue())


def _number(value: float | None) -> float:
    known = finite(value)
    return math.nan if known is None else known


def _inline(svg: str) -> str:
    """What an HTML page needs of an SVG file: no prolog, no style for `*`, no ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(
        r"<svg[^>]*>",
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true" focusable="false">',
        svg,
        count=1,
    )
    # Only attributes: a layer may be called like a colour.
    names = {color: name for name, color in _SENTINELS.items()}
    painted = re.compile("|".join(names))

    def paint(match: re.Match[str]) -> str:
        return painted.sub(lambda found: f"var(--{names[found.group()]})", match.group())

    return re.sub(r"<[a-zA-Z][^>]*>", paint, svg).strip()
