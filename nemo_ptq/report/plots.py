# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The report's charts, drawn by matplotlib: SVG for the page, whose style sheet colours them, and a PNG summary.

All charts of layers are small multiples: a column for each kind of linear layer, a row for each figure. One kind stands
out in its column, the others lie behind it in grey, so none needs a legend.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from nemo_ptq.console.stopwatch import Step
from nemo_ptq.report.records import ExpertTokens, Layer, MixedPrecision, Report
from nemo_ptq.report.words import human_bytes, kind_name, seconds, verdict

# Colours as they are on white. In a page the variables of its style sheet take their place.
INK, MUTED, FAINT, ACCENT, ALERT = "#1c2430", "#667080", "#d5d9e0", "#20639b", "#b4331f"
_VARIABLES = {INK: "ink", MUTED: "muted", FAINT: "faint", ACCENT: "accent", ALERT: "alert"}

_STYLE: Any = {
    "svg.fonttype": "none",
    # Names inside the file come from its content: the same report gives the same bytes.
    "svg.hashsalt": "nemo_ptq",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_WIDTH = 9.2  # inches; the page scales the drawing
_MARGIN = 0.85  # inches to the left of the first panel: a label of two lines, and numbers such as 10,000
# What an axis shows at least: decibels that are a factor of two in the error, or a factor.
_LEAST_DECIBELS = 6.0
_LEAST_FACTOR = 10.0


_GAP = (0, math.nan)  # ends a line: the next point begins another


@dataclass(frozen=True)
class Row:
    """A figure of layers that is drawn.

    Attributes:
        figure: Field of :class:`~nemo_ptq.report.records.Layer`.
        label: What it is, and its unit.
        logarithmic: Whether factors count rather than differences.
    """

    figure: str
    label: str
    logarithmic: bool = False


ERRORS = (
    Row("weight_sqnr_db", "weights, dB"),
    Row("input_sqnr_db", "inputs, dB"),
    Row("output_sqnr_db", "outputs, dB"),
)
AMAXES = (
    Row("weight_outlier_ratio", "weights:\namax / RMS", True),
    Row("input_outlier_ratio", "inputs:\namax / RMS", True),
    Row("input_amax", "inputs:\ncalibrated amax", True),
)


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE):
        yield


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page whose style sheet has the variables ink, muted, faint, accent, alert.

    The page's font and width apply.

    Args:
        figure: The drawing.
        name: Unique on the page: ids begin with it, so that drawings can share a page.
    """
    with _style(), io.StringIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ((?:\d+ )?[\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()


def _plain(value: float, _: int = 0) -> str:
    """A tick's label: no exponents."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _prepare_values(axes: Axes, logarithmic: bool) -> None:
    """Sets up the vertical axis, and what leads from it to the points."""
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=4))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)


class _Columns:
    """Where the layers of each kind stand on an axis that all kinds share, side by side.

    One axis a row, in place of one for each kind: most of matplotlib's time goes into axes and their ticks.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.kinds = list(dict.fromkeys(layer.kind for layer in layers))
        self.first = min(layer.layer for layer in layers)
        self.last = max(layer.layer for layer in layers)
        self.width = 1.2 * max(self.last - self.first, 1)

    def place(self, kind: str, layer: int) -> float:
        """The horizontal place of a layer in the column of a kind."""
        return self.kinds.index(kind) * self.width + layer - self.first

    def prepare(self, axes: Axes, logarithmic: bool) -> None:
        """Sets up the axes of a row."""
        _prepare_values(axes, logarithmic)
        margin = 0.05 * self.width
        axes.set_xlim(-margin, self.place(self.kinds[-1], self.last) + margin)

    def number(self, axes: Axes) -> None:
        """Numbers the layers below each column."""
        numbers = [
            int(number)
            for number in MaxNLocator(4, integer=True).tick_values(self.first, self.last)
            if self.first <= number <= self.last
        ]
        places = [self.place(kind, number) for kind in self.kinds for number in numbers]
        axes.set_xticks(places, [str(number) for number in numbers] * len(self.kinds))
        axes.set_xlabel("layer")

    def title(self, axes: Axes, size: float) -> None:
        """Writes the name of each kind above its column."""
        for kind in self.kinds:
            axes.annotate(
                kind_name(kind),
                (self.place(kind, self.first), 1),
                (0, 6),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=size,
                fontweight="bold",
            )

    def draw(self, axes: Axes, layers: Sequence[Layer], figure: str) -> None:
        """Draws a figure: each kind's line in its own column, those of the others behind it in grey."""
        lines = {kind: _points(layers, kind, figure) for kind in self.kinds}
        behind = [
            (self.place(column, index), value)
            for column in self.kinds
            for kind in self.kinds
            if kind != column
            for index, value in [*lines[kind], _GAP]
        ]
        own = [(self.place(kind, index), value) for kind in self.kinds for index, value in [*lines[kind], _GAP]]
        few = max(map(len, lines.values())) <= 12
        if behind:
            axes.plot(*zip(*behind, strict=True), color=FAINT, linewidth=1.0, zorder=2)
        axes.plot(
            *zip(*own, strict=True), color=ACCENT, linewidth=1.6, marker="o" if few else None, markersize=3.5, zorder=3
        )

    def mark(self, axes: Axes, layers: Sequence[Layer], figure: str, size: float) -> None:
        """Marks layers with a dot."""
        places = [self.place(layer.kind, layer.layer) for layer in layers]
        values = [getattr(layer, figure) for layer in layers]
        axes.plot(places, values, "o", markersize=size, color=ALERT, zorder=4)


def _points(layers: Sequence[Layer], kind: str, figure: str) -> list[tuple[int, float]]:
    found = [(layer.layer, getattr(layer, figure)) for layer in layers if layer.kind == kind]
    return [(index, value) for index, value in found if value is not None]


def _rows(number: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    """A drawing of rows of some inches in height, with room for what stands beside them.

    matplotlib's own layouts measure every text twice, which takes longer than the drawing.
    """
    size = (_WIDTH, 0.65 + height * number)
    edges = {
        "left": _MARGIN / size[0],
        "right": 1 - 0.1 / size[0],
        "bottom": 0.42 / size[1],
        "top": 1 - 0.25 / size[1],
    }
    figure = Figure(figsize=size)
    figure.subplots_adjust(**edges, hspace=0.16)
    return figure, list(figure.subplots(number, 1, sharex=True, squeeze=False)[:, 0])


def layer_chart(layers: Sequence[Layer], rows: Sequence[Row], bad: Callable[[Layer, str], bool]) -> Figure | None:
    """Small multiples of figures by layer.

    Args:
        layers: All layers.
        rows: The figures, from top to bottom; those that no layer has are left out.
        bad: Whether a layer stands out in a figure: it is marked with its number.

    Returns:
        The drawing, or None where no layer has any of the figures.
    """
    rows = [row for row in rows if any(getattr(layer, row.figure) is not None for layer in layers)]
    if not rows:
        return None
    columns = _Columns(layers)
    with _style():
        figure, grid = _rows(len(rows), 1.45)
        for row, axes in zip(rows, grid, strict=True):
            columns.prepare(axes, row.logarithmic)
            columns.draw(axes, layers, row.figure)
            marked = [layer for layer in layers if bad(layer, row.figure)]
            columns.mark(axes, marked, row.figure, size=5)
            for layer in _worst_of_each_kind(marked, row.figure):
                axes.annotate(
                    str(layer.layer),
                    (columns.place(layer.kind, layer.layer), getattr(layer, row.figure)),
                    (5, -2),
                    textcoords="offset points",
                    color=ALERT,
                    fontsize=8,
                    va="top",
                )
            axes.set_ylabel(row.label)
            _show_at_least(axes, row)
        columns.title(grid[0], size=9)
        columns.number(grid[-1])
    return figure


def _worst_of_each_kind(layers: Sequence[Layer], figure: str) -> list[Layer]:
    """The three layers of each kind that have least of a figure."""
    ordered = sorted(layers, key=lambda layer: getattr(layer, figure))
    return [
        layer
        for kind in dict.fromkeys(layer.kind for layer in ordered)
        for layer in [layer for layer in ordered if layer.kind == kind][:3]
    ]


def _show_at_least(axes: Axes, row: Row) -> None:
    """Keeps a vertical axis from blowing up differences that mean nothing."""
    low, high = axes.get_ylim()
    if row.logarithmic and high / low < _LEAST_FACTOR:
        middle, half = (low * high) ** 0.5, _LEAST_FACTOR**0.5
        axes.set_ylim(middle / half, middle * half)
    elif not row.logarithmic and high - low < _LEAST_DECIBELS:
        middle = (low + high) / 2
        axes.set_ylim(middle - _LEAST_DECIBELS / 2, middle + _LEAST_DECIBELS / 2)


def scale_chart(layers: Sequence[Layer]) -> Figure | None:
    """The distribution of the input channels' pre-quantization scales, layer by layer.

    Bands hold 50 and 90 % of the channels, lines are the median and the extremes.

    Returns:
        The drawing, or None where there are no such scales.
    """
    scaled = [layer for layer in layers if layer.pre_quant_scale is not None]
    if not scaled:
        return None
    columns = _Columns(scaled)
    with _style():
        figure, (axes,) = _rows(1, 1.7)
        columns.prepare(axes, logarithmic=True)
        for kind in columns.kinds:
            mine = [layer for layer in scaled if layer.kind == kind]
            x = [columns.place(kind, layer.layer) for layer in mine]
            least, p5, p25, median, p75, p95, most = zip(*(layer.pre_quant_scale or () for layer in mine), strict=True)
            axes.fill_between(x, p5, p95, color=ACCENT, alpha=0.18, linewidth=0)
            axes.fill_between(x, p25, p75, color=ACCENT, alpha=0.30, linewidth=0)
            axes.plot(x, median, color=ACCENT, linewidth=1.6)
            for extreme in (least, most):
                axes.plot(x, extreme, color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)))
        columns.title(axes, size=9)
        columns.number(axes)
        axes.set_ylabel("factor")
    return figure


def expert_chart(experts: Sequence[ExpertTokens]) -> Figure | None:
    """A dot for each expert of each layer, its area the share of the layer's tokens; idle experts are crosses.

    Returns:
        The drawing, or None for dense models.
    """
    if not experts:
        return None
    number = len(experts[0].tokens)
    with _style():
        figure = Figure(figsize=(_WIDTH, 0.9 + 0.19 * len(experts)), layout="constrained")
        axes = figure.subplots()
        places = [
            (expert, row.layer, count / max(sum(row.tokens), 1))
            for row in experts
            for expert, count in enumerate(row.tokens)
        ]
        busy = [(x, y, share * number) for x, y, share in places if share]
        idle = [(x, y) for x, y, share in places if not share]
        # The mean has a dot of 40 square points.
        axes.scatter(
            [x for x, _, _ in busy],
            [y for _, y, _ in busy],
            [40 * s for _, _, s in busy],
            color=ACCENT,
            alpha=0.75,
            linewidth=0,
        )
        axes.scatter([x for x, _ in idle], [y for _, y in idle], 30, color=ALERT, marker="x", linewidth=1.4)
        axes.invert_yaxis()
        axes.margins(x=0.03, y=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(min(number, 16), integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(min(len(experts), 16), integer=True))
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
    return figure


def bits_chart(mixed: MixedPrecision | None) -> Figure | None:
    """The predicted error of the best choice for each number of bits, with the one that was made.

    Returns:
        The drawing, or None where nothing was chosen.
    """
    curve = [] if mixed is None else [(bits, error) for bits, error in mixed.curve if error > 0]
    if mixed is None or not curve:
        return None
    with _style():
        figure = Figure(figsize=(_WIDTH, 2.2), layout="constrained")
        axes = figure.subplots()
        _prepare_values(axes, logarithmic=True)
        axes.plot(*zip(*curve, strict=True), color=MUTED, linewidth=1.2, marker="o", markersize=2.5)
        if mixed.error > 0:
            axes.plot(mixed.effective_bits, mixed.error, "o", color=ACCENT, markersize=8, zorder=4)
        axes.axvline(mixed.effective_bits, color=ACCENT, linewidth=1, linestyle=(0, (4, 3)))
        # Over several powers of ten, and of numbers too small to be written out.
        axes.yaxis.set_major_locator(LogLocator(10, numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
        axes.set_xlabel("bits of a weight on average")
        axes.set_ylabel("predicted error")
    return figure


def step_chart(steps: Sequence[Step]) -> Figure | None:
    """Time and peak memory of the steps, as bars with their values.

    Returns:
        The drawing, or None where no step was measured.
    """
    if not steps:
        return None
    names = [step.name for step in steps]
    with _style():
        figure = Figure(figsize=(_WIDTH, 0.5 + 0.27 * len(steps)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _bars(left, names, [step.seconds for step in steps], seconds, "time")
        _bars(right, names, [float(step.peak_memory_bytes) for step in steps], human_bytes, "peak memory of a rank")
        left.invert_yaxis()
    return figure


def comparison_chart(
    names: Sequence[str], panels: Mapping[str, tuple[Sequence[float], Callable[[float], str]]]
) -> Figure:
    """Figures of several runs, as bars with their values.

    Args:
        names: Of the runs.
        panels: By title, the figure of each run, and how it is written.
    """
    with _style():
        figure = Figure(figsize=(_WIDTH, 0.5 + 0.3 * len(names)), layout="constrained")
        drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, (values, show)) in zip(drawn, panels.items(), strict=True):
            _bars(axes, names, values, show, title)
        drawn[0].invert_yaxis()
    return figure


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float], show: Callable[[float], str], title: str) -> None:
    bars = axes.barh(names, values, height=0.55, color=ACCENT, alpha=0.85)
    axes.bar_label(bars, [show(value) for value in values], padding=4, fontsize=8.5, color=INK)
    axes.set_xlim(0, max([*values, 1e-9]) * 1.25)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", labelsize=9, labelcolor=INK)
    axes.set_title(title, color=MUTED)


def recovery_chart(report: Report) -> Figure | None:
    """The recovery with its interval, against what is required.

    Returns:
        The drawing, or None where it was not measured.
    """
    recovery = None if report.quality is None else report.quality.recovery
    if recovery is None:
        return None
    required = report.summary.required_recovery
    colour = ALERT if report.summary.passed is False else ACCENT
    with _style():
        figure = Figure(figsize=(_WIDTH, 0.95), layout="constrained")
        axes = figure.subplots()
        axes.axvline(1, color=MUTED, linewidth=1)
        axes.annotate(
            "lossless",
            (1, 1),
            (4, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=MUTED,
            fontsize=8,
            va="top",
        )
        if required is not None:
            axes.axvline(required, color=ALERT, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"required {required:.2f}",
                (required, 1),
                (-4, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                color=ALERT,
                fontsize=8,
                va="top",
                ha="right",
            )
        axes.plot([recovery.low, recovery.high], [0, 0], color=colour, linewidth=4, alpha=0.35, solid_capstyle="butt")
        axes.plot(recovery.value, 0, "o", color=colour, markersize=7)
        ends = [value for value in (recovery.low, recovery.high, required, 1.0) if value is not None]
        room = max(max(ends) - min(ends), 1e-3)
        axes.set_xlim(min(ends) - 0.15 * room, max(ends) + 0.15 * room)
        axes.set_ylim(-0.6, 1.0)
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure


def summary_png(report: Report, bad: Callable[[Layer, str], bool]) -> bytes:
    """The summary as a picture of 1200 x 630 pixels, for places that show no pages."""
    summary = report.summary
    with _style():
        figure = Figure(figsize=(12, 6.3), dpi=100, facecolor="white")
        text = figure.text
        text(0.05, 0.88, f"{summary.model}, {summary.algorithm}", fontsize=26, fontweight="bold")
        word, fails = verdict(summary)
        text(0.95, 0.89, word, fontsize=16, fontweight="bold", ha="right", color=ALERT if fails else ACCENT)
        tiles = [
            (
                f"{summary.compression:.2f}x",
                f"smaller: {human_bytes(summary.checkpoint_bytes)} to {human_bytes(summary.export_bytes)}",
            )
        ]
        if summary.recovery is not None and summary.perplexity is not None:
            tiles.append(
                (
                    f"{100 * summary.recovery:.2f} %",
                    f"recovery: perplexity {summary.baseline_perplexity:.2f} to {summary.perplexity:.2f}",
                )
            )
        if summary.top1_agreement is not None and summary.kl_divergence is not None:
            tiles.append(
                (f"{100 * summary.top1_agreement:.1f} %", f"top-1 agreement; KL {summary.kl_divergence:.4f} nats")
            )
        for index, (value, label) in enumerate(tiles):
            x = 0.05 + 0.31 * index
            text(x, 0.68, value, fontsize=34, color=ACCENT)
            text(x, 0.615, label, fontsize=11.5, color=MUTED)
        _png_lines(figure, report.layers, bad)
        with io.BytesIO() as file:
            figure.savefig(file, format="png", metadata={"Software": None}, facecolor="white")
            return file.getvalue()


def _png_lines(figure: Figure, layers: Sequence[Layer], bad: Callable[[Layer, str], bool]) -> None:
    """The first row of errors that there is, outputs before weights."""
    for row in reversed(ERRORS):
        if any(getattr(layer, row.figure) is not None for layer in layers):
            break
    else:
        return
    columns = _Columns(layers)
    axes = figure.subplots(gridspec_kw={"left": 0.09, "right": 0.95, "bottom": 0.12, "top": 0.47})
    columns.prepare(axes, row.logarithmic)
    columns.draw(axes, layers, row.figure)
    columns.mark(axes, [layer for layer in layers if bad(layer, row.figure)], row.figure, size=6)
    columns.title(axes, size=12)
    columns.number(axes)
    _show_at_least(axes, row)
    axes.set_ylabel(f"signal to noise of\n{row.label}", fontsize=10)
