"""The signal propagation plot on paper: stacked panels, several models overlaid, readable without colour."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfree.common.checks import require
from normfree.common.files import write_atomically
from normfree.report.panels import (
    COLORS,
    ENTRY_X,
    Panel,
    caption_of,
    color_of,
    common_transitions,
    drawn_curve,
    edge_note,
    finite_values,
    limits_of,
    needs_log,
    non_finite_from,
    panels_of,
    shorten,
    x_label,
)
from normfree.signal.propagation import SignalPropagation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D

_DASHES: tuple[Any, ...] = (
    "-",
    (0, (7, 1.6)),
    (0, (5, 1.2, 1.2, 1.2)),
    (0, (1.4, 1)),
    (0, (3, 1)),
    (0, (9, 2, 2, 2)),
)
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INK, _FAINT = "#222222", "#666666"
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}

# The page in inches: the text width of a single-column paper.
_WIDTH, _LEFT, _RIGHT, _PANEL, _GAP, _TITLE, _LINE = 5.5, 0.66, 0.16, 1.3, 0.36, 0.26, 0.11
_DPI = 200


def plot_signals(
    signals: Sequence[SignalPropagation], path: str | Path | None = None, *, title: str | None = None
) -> Figure:
    """Draw the signal propagation plot of one or several models.

    Panels are stacked over one x axis. An axis is logarithmic where its values span more than two
    decades, and says which it is. Values that are not finite leave a gap and a cross at the top edge.

    Args:
        signals: the models, in the order of the legend.
        path: where to save it as PNG (200 dpi), or None.
        title: heading; "Signal propagation plot" by default, none if "".

    Returns:
        The matplotlib figure, unknown to pyplot: nothing to close.

    Raises:
        ValueError: if there is no model to draw.
        ImportError: if matplotlib is not installed.
    """
    matplotlib: Any = require("matplotlib", "the plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not signals:
        raise ValueError("signals: got an empty sequence; give at least one SignalPropagation to draw")
    # A user's style sheet is made for their figures; this one has its own and leaves theirs in place.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(_WIDTH, 4), dpi=_DPI)
        FigureCanvasAgg(figure)
        _compose(figure, signals, "Signal propagation plot" if title is None else title)
        if path is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=_DPI)
            write_atomically(path, buffer.getvalue())
    return figure


def _compose(figure: Figure, signals: Sequence[SignalPropagation], title: str) -> None:
    """Measure the legend, then lay out heading, legend, panels and caption from top to bottom."""
    panels = panels_of(signals)
    marks = common_transitions(signals)
    sentences = caption_of(signals)
    caption = [line for text in sentences for line in textwrap.wrap(text, 88, max_lines=4, placeholder=" …")]
    title_lines = textwrap.wrap(" ".join(title.split()), 62, max_lines=3, placeholder=" …")
    legend, legend_height = _legend(figure, signals, marks)
    head = 0.12 + 0.2 * len(title_lines)
    foot = 0.58 + _LINE * len(caption)
    height = head + legend_height + len(panels) * (_TITLE + _PANEL) + (len(panels) - 1) * (_GAP - _TITLE) + foot
    figure.set_size_inches(_WIDTH, height)
    _text(figure, _LEFT, height - 0.1, height, "\n".join(title_lines), size=9.5, weight="bold", va="top")
    legend.set_bbox_to_anchor((_LEFT / _WIDTH, 1 - head / height), transform=figure.transFigure)
    top = height - head - legend_height - _TITLE
    longest = max(len(signal.blocks) for signal in signals)
    for row, panel in enumerate(panels):
        bottom = top - _PANEL - row * (_PANEL + _GAP)
        box = (_LEFT / _WIDTH, bottom / height, 1 - (_LEFT + _RIGHT) / _WIDTH, _PANEL / height)
        axes = figure.add_axes(box, label=panel.curve)
        _draw_panel(axes, panel, signals, marks)
        _index_axis(axes, longest)
        axes.tick_params(labelbottom=row == len(panels) - 1)
    figure.axes[-1].set_xlabel(f"{x_label(signals)} (entry: input of the first)", color=_INK)
    _text(figure, _LEFT, 0.1, height, "\n".join(caption), size=6.5, color=_FAINT, va="bottom")


def _index_axis(axes: Axes, blocks: int) -> None:
    """Block indices, with the entry named; index 0 gives way where the two would touch."""
    from matplotlib.ticker import MaxNLocator

    last = max(blocks - 1, 1)
    axes.set_xlim(ENTRY_X - 0.015 * max(blocks, 8), last + 0.015 * max(blocks, 8))
    found = MaxNLocator(10, integer=True, steps=[1, 2, 2.5, 5, 10]).tick_values(0, last)
    ticks = [int(x) for x in found if 0 <= x <= last and x - ENTRY_X > 0.05 * blocks]
    axes.set_xticks([ENTRY_X, *ticks], ["entry", *map(str, ticks)])


def _draw_panel(axes: Axes, panel: Panel, signals: Sequence[SignalPropagation], marks: tuple[int, ...] | None) -> None:
    log = needs_log(panel, signals)
    axes.set_yscale("log" if log else "linear")
    axes.set_autoscaley_on(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    for x in marks or ():
        axes.axvline(x, color="#bbbbbb", linewidth=0.6, zorder=0.5, gid="transition")
    if panel.reference is not None:
        axes.axhline(panel.reference, color=_INK, linewidth=0.7, linestyle=(0, (1, 1.5)), zorder=1, gid="reference")
    for number, signal in enumerate(signals):
        _draw_curve(axes, panel, signal, number, hollow=marks is None, log=log)
    axes.set_title(panel.title, loc="left", fontsize=8, fontweight="bold", color=_INK, pad=5)
    axes.set_title(edge_note(panel, signals, log), loc="right", fontsize=6.5, color=_FAINT, pad=5)
    axes.set_ylabel("log scale" if log else "linear scale", fontsize=7, color=_FAINT)
    axes.yaxis.set_label_coords(-0.54 / (_WIDTH - _LEFT - _RIGHT), 0.5)
    _limit(axes, panel, signals, log)


def _draw_curve(axes: Axes, panel: Panel, signal: SignalPropagation, number: int, *, hollow: bool, log: bool) -> None:
    values = drawn_curve(signal, panel.curve)
    xs = list(range(ENTRY_X, len(signal.blocks)))
    points = [_drawable(value, log) for value in values]
    turns = [i for i, block in enumerate(signal.blocks, 1) if block.transition and hollow]
    style: dict[str, Any] = {
        "color": color_of(number),
        "marker": _marker(number),
        "zorder": 2 + 0.01 * number,
    }
    style |= {"markersize": 3.2, "markeredgewidth": 0.8, "linewidth": 1.3}
    every = [i for i in _markers(points, number) if i not in set(turns)]
    axes.plot(xs, points, linestyle=_dash(number), markevery=every, gid="curve", **style)
    if turns:
        style["linewidth"] = 0
        turned = ([xs[i] for i in turns], [points[i] for i in turns])
        axes.plot(*turned, markerfacecolor="white", gid="transition", **style)
    if panel.curve == "avg_channel_var":
        expected = [_drawable(value, log) for value in signal.curve("expected_var")]
        if not all(map(math.isnan, expected)):
            dashed = {"color": "black", "linewidth": 0.8, "linestyle": (0, (3, 2)), "zorder": 4}
            axes.plot(xs, expected, gid="expected", **dashed)
    zeros = [x for x, value in zip(xs, values, strict=True) if value == 0 and log]
    if zeros:
        height = 0.05 * number  # one model's above the other's, so that none hides another
        _mark_edge(axes, zeros, height, marker="v", markersize=3, color=color_of(number), gid="zero")
    if (start := non_finite_from(values)) is not None:
        _mark_edge(axes, [start], 1.0, marker="x", markersize=5, color=color_of(number), gid="non-finite")


def _mark_edge(axes: Axes, xs: list[int], height: float, **style: Any) -> None:
    """Marks on the lower (0) or upper (1) edge of the panel, wherever the y axis may go."""
    where = axes.get_xaxis_transform()
    axes.plot(
        xs,
        [height] * len(xs),
        transform=where,
        clip_on=False,
        linestyle="",
        markeredgewidth=1.2,
        zorder=5,
        **style,
    )


def _drawable(value: float | None, log: bool) -> float:
    """The value, or a gap (not a number) where the axis has no place for it."""
    return value if value is not None and math.isfinite(value) and (value > 0 or not log) else math.nan


def _markers(points: list[float], number: int) -> list[int]:
    """Every point of a short curve, about ten of a long one; and those without a finite neighbour."""
    step = max(1, round(len(points) / 10)) if len(points) > 24 else 1
    chosen = set(range((number * step // 3) % step, len(points), step))
    padded = [math.nan, *points, math.nan]
    return sorted(chosen | {x for x in range(len(points)) if math.isnan(padded[x]) and math.isnan(padded[x + 2])})


def _limit(axes: Axes, panel: Panel, signals: Sequence[SignalPropagation], log: bool) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    values = [value for value in finite_values(panel, signals) if value > 0 or not log]
    if not values:
        middle = {"ha": "center", "va": "center", "transform": axes.transAxes}
        axes.set(yticks=[], ylim=(0, 1))
        given = [value for signal in signals for value in signal.curve(panel.curve) if value is not None]
        axes.text(0.5, 0.5, "no finite value" if given else "not measured", color=_FAINT, **middle)
        return
    low, high = limits_of(values, log)
    if log:
        ticks = _decades(low, min(max(max(values), low), high), high)
        axes.set_ylim(low, max(high, 1.05 * ticks[-1]))
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
        return
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    # The usual formatter writes a common factor above the axis, where the panel's title is.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _decades(low: float, largest: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis, about six, the last at the top: one, two or five times a power of ten.

    Args:
        low: the axis' lower limit.
        largest: of the values.
        high: the axis' upper limit.
    """
    exponent = math.floor(math.log10(largest))
    top = next(
        (k * 10.0**exponent for k in (1, 2, 5) if k * 10.0**exponent >= largest * (1 - 1e-9)), 10.0 ** (exponent + 1)
    )
    span = math.log10(max(high, top)) - math.log10(low)
    step = max(1, math.ceil(span / 6))
    first = math.floor(math.log10(top) + 1e-9)
    ticks = [10.0**e for e in range(first, math.floor(math.log10(low)), -step)]
    return sorted({top, *(tick for tick in ticks if low <= tick and math.log10(top) - math.log10(tick) > 0.08 * span)})


def _power(value: float) -> str:
    """A tick's number: a power of ten, times two or five."""
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = round(value / 10.0**exponent)
    if exponent == 0 and factor > 1:
        return str(factor)
    before = "" if factor == 1 else rf"{factor}\cdot "
    return rf"${before}10^{{{exponent}}}$"


def _legend(
    figure: Figure, signals: Sequence[SignalPropagation], marks: tuple[int, ...] | None
) -> tuple[Legend, float]:
    """The legend in as many columns as fit, names shortened where one column does not; and its height."""
    from matplotlib.lines import Line2D

    def line(**style: Any) -> Line2D:
        return Line2D([], [], **style)

    handles = [
        line(color=color_of(i), linestyle=_dash(i), marker=_marker(i), markersize=3.2, linewidth=1.3)
        for i in range(len(signals))
    ]
    extra = []
    if any(value is not None for signal in signals for value in signal.curve("expected_var")):
        extra.append(("expected variance", line(color="black", linewidth=0.8, linestyle=(0, (3, 2)))))
    if any(panel.reference is not None for panel in panels_of(signals)):
        extra.append(("variance preserving", line(color=_INK, linewidth=0.7, linestyle=(0, (1, 1.5)))))
    if marks:
        extra.append(("transition block", line(color="#bbbbbb", linestyle="", marker="|", markersize=8)))
    elif marks is None:
        hollow = line(color=_FAINT, linestyle="", marker="o", markersize=3.2, markerfacecolor="white")
        extra.append(("transition block (hollow)", hollow))
    handles += [handle for _, handle in extra]
    trials = [(80, 4), (80, 3), (80, 2), *((width, 1) for width in range(80, 20, -6))]
    while True:
        width, columns = trials.pop(0)
        names = [shorten(signal.model, width) or "(no name)" for signal in signals]
        legend = _place_legend(figure, handles, names + [label for label, _ in extra], columns)
        box = legend.get_window_extent()
        if not trials or box.width <= (_WIDTH - _LEFT - _RIGHT) * figure.dpi:
            return legend, box.height / figure.dpi


def _place_legend(figure: Figure, handles: list[Line2D], names: list[str], columns: int) -> Legend:
    """Put the figure's one legend, in place of an earlier trial."""
    for trial in list(figure.legends):
        trial.remove()
    # Placeholder labels first: matplotlib drops names with a leading "_" and reads "$" as mathematics.
    legend = figure.legend(
        handles, [str(i) for i in range(len(names))], ncols=min(columns, len(names)), loc="upper left",
        frameon=False, fontsize=7.5, borderpad=0, borderaxespad=0, handlelength=3.2, columnspacing=1.6,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
    return legend


def _text(figure: Figure, left: float, bottom: float, height: float, text: str, **style: Any) -> None:
    figure.text(left / _WIDTH, bottom / height, text, parse_math=False, **style)


def _dash(number: int) -> Any:
    return _DASHES[(number + number // len(COLORS)) % len(_DASHES)]


def _marker(number: int) -> str:
    return _MARKERS[(number + number // len(COLORS)) % len(_MARKERS)]
