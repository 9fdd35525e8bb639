"""The charts of a page, as SVG that takes its colours from the page: one drawing for light and dark, screen and paper.

Matplotlib draws with the stand-ins of COLORS, and the page's style says what each is. No text of a user is drawn:
names stand in the page, in a legend beside the chart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import numpy as np

from leap_dist.monitoring.comparison import Series

SIZE = (5.0, 2.9)  # inches of a chart, 72 units each in the SVG
MARGINS = {"left": 0.145, "right": 0.985, "bottom": 0.165, "top": 0.965}
BUCKETS = 300  # a curve keeps the least and the most of each: no peak is lost
# Stand-ins that occur nowhere else -> variables of the page's style. The eight colours of lines are told apart by every
# eye (Okabe and Ito), on white and, a little lighter, on black.
COLORS = {f"#ab00{index:02x}": f"var(--line-{index})" for index in range(8)} | {
    "#ab0010": "var(--ink)", "#ab0011": "var(--quiet)", "#ab0012": "var(--rule)", "#ab0013": "var(--saved)",
}  # fmt: skip
LINES = list(COLORS)[:8]
INK, QUIET, RULE, SAVED = list(COLORS)[8:]
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))  # where the colours do not go round
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "leap_dist", "text.parse_math": False, "font.size": 9.0,
    "text.color": INK, "axes.labelcolor": QUIET, "axes.edgecolor": RULE, "xtick.color": RULE, "ytick.color": RULE,
    "xtick.labelcolor": QUIET, "ytick.labelcolor": QUIET, "grid.color": RULE, "grid.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "figure.facecolor": "none",
    "lines.linewidth": 1.6, "axes.unicode_minus": False,
}  # fmt: skip


class Key(NamedTuple):
    """An entry of a chart's legend. color: a variable of the page's style; dash: how the line is broken, 0 to 2."""

    label: str
    color: str
    dash: int = 0
    area: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart of a page. caption: a sentence that says what to see."""

    title: str
    caption: str
    svg: str
    keys: list[Key]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a chart. steps: it keeps its value until the next point. color: its number among the line colours;
    beyond them the lines are broken.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0
    steps: bool = False
    marker: bool = False


@dataclass(frozen=True, kw_only=True)
class Axes:
    """How a chart is scaled, and what stands on its axes besides curves.

    percent: y is a share; whole: a whole number; zero: its axis begins there at the latest; limit: where it begins and
    ends. marks: x of thin vertical lines. levels: (y, until which x, label) of dashed lines. above: (label, ceiling) of
    an area that is filled between the first curve and the ceiling.
    """

    x: str = "optimizer step"
    y: str = ""
    log: bool = False
    percent: bool = False
    whole: bool = False
    zero: bool = False
    marks: Sequence[float] = ()
    levels: Sequence[tuple[float, float, str]] = ()
    above: Optional[tuple[str, float]] = None
    limit: Optional[tuple[float, float]] = None


def chart(title: str, caption: str, curves: Sequence[Curve], axes: Axes) -> Optional[Chart]:
    """Draw; None where no curve has a point."""
    curves = [curve for curve in curves if len(curve.x)]
    if not curves:
        return None
    keys: list[Key] = []

    def draw(panel: Any) -> None:
        if axes.above is not None:
            label, ceiling = axes.above
            panel.fill_between(curves[0].x, curves[0].y, ceiling, color=SAVED, linewidth=0, step="post")
            keys.append(Key(label, COLORS[SAVED], area=True))
        for at in axes.marks:
            panel.axvline(at, color=RULE, linewidth=0.8, zorder=0.5)
        for curve in curves:
            keys.append(_draw_curve(panel, curve))
        for height, until, label in axes.levels:
            panel.hlines(height, 0, until, linestyles=[(0, (4, 3))], color=QUIET, linewidth=1)
            keys.append(Key(label, COLORS[QUIET], 1))
        _scale(panel, axes)

    return Chart(title, caption, _svg(draw, title), keys)


def thinned(series: Series, buckets: int = BUCKETS) -> Series:
    """At most twice as many points as buckets: the least and the most of each, in order; the first and the last."""
    count = len(series.steps)
    if count <= 2 * buckets:
        return series
    edges = np.linspace(0, count, buckets, endpoint=False).astype(int)
    least = [first + int(np.argmin(part)) for first, part in _parts(series.values, edges)]
    most = [first + int(np.argmax(part)) for first, part in _parts(series.values, edges)]
    kept = np.unique([0, *least, *most, count - 1])
    return Series(series.steps[kept], series.values[kept])


def corners(series: Series) -> Series:
    """Of stairs: the points where the value changes, the first and the last; nothing of them is lost."""
    changes = np.flatnonzero(np.diff(series.values)) + 1
    kept = np.unique([0, *changes, len(series.steps) - 1])
    return Series(series.steps[kept], series.values[kept])


def _parts(values: np.ndarray, edges: np.ndarray) -> list[tuple[int, np.ndarray]]:
    return list(zip(edges.tolist(), np.split(values, edges[1:]), strict=True))


def _draw_curve(panel: Any, curve: Curve) -> Key:
    color, dash = curve.color % len(LINES), curve.color // len(LINES) % len(DASHES)
    marker = {"marker": "o", "markersize": 3.5} if curve.marker or len(curve.x) == 1 else {}
    panel.plot(
        curve.x, curve.y, color=LINES[color], linestyle=DASHES[dash],
        drawstyle="steps-post" if curve.steps else "default", **marker,
    )  # fmt: skip
    return Key(curve.label, COLORS[LINES[color]], dash)


def _scale(panel: Any, axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

    panel.set_xlabel(axes.x)
    panel.set_ylabel(axes.y)
    panel.yaxis.set_label_coords(-0.135, 0.5)
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=axes.x == "optimizer step"))
    panel.xaxis.set_major_formatter(FuncFormatter(_short))
    panel.grid(axis="y")
    panel.set_axisbelow(True)
    panel.tick_params(length=0)
    panel.margins(x=0.01)
    if axes.log:
        low, high = panel.get_ylim()
        panel.set_yscale("log")
        if low > 0 and high / low < 30:  # within a decade or so powers of ten are too few marks
            panel.yaxis.set_major_locator(MaxNLocator(5))
            panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(_short))
        return
    if axes.zero:
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
    if axes.limit:
        panel.set_ylim(*axes.limit)
    panel.yaxis.set_major_locator(MaxNLocator(5, integer=axes.whole, steps=[1, 2, 2.5, 5, 10]))
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=None) if axes.percent else FuncFormatter(_short))


def _short(value: float, _place: Any = None) -> str:
    """A number as it is read on an axis: 20k, 1.5e+18, 0.05."""
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3g}"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def _svg(draw: Callable[[Any], None], title: str) -> str:
    """The SVG element of a figure: without ids that another chart of the page has, at a tenth of a unit."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=SIZE)  # fixed margins: they line charts up, and cost half of a fitted layout
        FigureCanvasSVG(figure)
        draw(figure.subplots(gridspec_kw=MARGINS))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d+\.\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")  # HTML knows these
    for stand_in, variable in COLORS.items():
        svg = svg.replace(stand_in, variable)
    return re.sub(r"\n\s*", "\n", svg).replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
