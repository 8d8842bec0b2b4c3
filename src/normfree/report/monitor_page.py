"""The plots of a training run as one figure: a slider over the steps, and the first plot behind it.

:func:`slider_figure` is plotly's own, with the slider that plotly draws, for pages of others. Our pages have the same
panels with controls of HTML, which keys reach and which change the scale: ``records.html`` and ``records.js``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from normfree.common.checks import require
from normfree.report.page import (
    SCALE_SWITCH,
    chart_label,
    figures_script,
    fill,
    finding_item,
    findings_list,
    heading_of,
    numbers_tables,
    page_file,
    signal_settings,
    write_page,
)
from normfree.report.panels import (
    COLORS,
    ENTRY_X,
    ROUNDING,
    Panel,
    caption_of,
    drawn_curve,
    finite_values,
    limits_of,
    needs_log,
    panels_of,
    x_label,
)
from normfree.signal.monitor import SignalHistory
from normfree.signal.propagation import SignalPropagation

MOST_FRAMES = 200
"""More steps than that are thinned out: a slider has no more positions, and the page stays small."""

FEW_BLOCKS = 10
"""Up to so many, each has its tick; plotly would put more than one to a block."""

_FAINT, _GRID = "rgba(128,128,128,0.75)", "rgba(128,128,128,0.22)"
_PANEL_HEIGHT, _TITLES, _SLIDER, _LABELS = 185, 34, 130, 48  # pixels

ROUNDED = f"A squared mean of less than {ROUNDING:g} times the variance is rounding alone, and drawn as zero."


def slider_figure(history: SignalHistory) -> Any:
    """Draw a history as a ``plotly.graph_objects.Figure``, of :func:`slider_spec`.

    Raises:
        ValueError: for a history without records.
        ImportError: if plotly is not installed.
    """
    spec = slider_spec(history)
    return require("plotly.graph_objects", "the figure").Figure(**spec)


def slider_spec(history: SignalHistory) -> dict[str, Any]:
    """Return a history's figure as plotly's JSON has it: ``data``, ``layout`` and ``frames``.

    One panel for each curve, with axes that hold for all steps, so that what moves is the signal. The plot of the
    first record stays behind as a grey line; the slider and the play button go through the records.

    Args:
        history: at least one record; more than 200 are thinned out evenly, the first and last kept.

    Raises:
        ValueError: for a history without records.
    """
    if not history:
        raise ValueError("history: it has no records; start the monitor first")
    history = history.thinned(MOST_FRAMES)
    signals, panels = history.signals, panels_of(history.signals)
    logs = [needs_log(panel, signals) for panel in panels]
    still, moving = _still_traces(signals, panels, logs), _moving_traces(signals[-1], panels, logs)
    numbers = list(range(len(still), len(still) + len(moving)))
    frames = []
    for step, signal in history:
        data = [{"type": "scatter", "x": _xs(y), "y": y} for y in _moving_values(signal, panels, logs)]
        frames.append({"name": str(step), "data": data, "traces": numbers})
    layout = _layout(signals, panels, below=_SLIDER)
    layout |= {"sliders": [_slider(history)], "updatemenus": [_buttons()]}
    # The slider starts at the last record, which is what one asks about first.
    return {"data": [*still, *moving], "layout": layout, "frames": frames}


def records_spec(history: SignalHistory) -> dict[str, Any]:
    """Return what ``records.js`` draws: the same figure without plotly's slider, its records and axes beside it.

    ``records`` are the steps with the curves of each, zeros kept; ``scales`` the vertical axis of each panel for each
    button of the scale; ``zeros`` whether a panel has values that no logarithmic axis shows; ``moving`` how many of
    ``data`` come before those that move.

    Args:
        history: at least one record; more than 200 are thinned out evenly, the first and last kept.

    Raises:
        ValueError: for a history without records.
    """
    if not history:
        raise ValueError("history: it has no records; start the monitor first")
    history = history.thinned(MOST_FRAMES)
    signals, panels = history.signals, panels_of(history.signals)
    linear = [False] * len(panels)
    still = _still_traces(signals, panels, linear)
    scales = []
    for panel in panels:
        drawn = {"auto": needs_log(panel, signals), "log": not panel.signed, "linear": False}
        scales.append({name: _scale(panel, signals, log) for name, log in drawn.items()})
    zeros = [any(0 in drawn_curve(signal, panel.curve) for signal in signals) for panel in panels]
    records = [{"step": step, "y": _moving_values(signal, panels, linear)} for step, signal in history]
    return {
        "data": [*still, *_moving_traces(signals[-1], panels, linear)],
        "layout": _layout(signals, panels, below=_LABELS),
        "moving": len(still),
        "records": records,
        "scales": scales,
        "zeros": zeros,
    }


def records_figure(history: SignalHistory, name: str) -> str:
    """The HTML of :func:`records_spec`: scale, slider and play as controls, and the place of the figure.

    Args:
        history: at least one record.
        name: of the figure among the page's data.
    """
    shown = history.thinned(MOST_FRAMES)
    parts = {
        "name": name,
        "scale": SCALE_SWITCH,
        "step": str(shown.steps[-1]),
        "last": str(len(shown) - 1),
        "disabled": " disabled" if len(shown) == 1 else "",
        "charted": escape(chart_label(panels_of(shown.signals), [shown.signals[-1]])),
    }
    return fill(page_file("records.html"), parts)


def _still_traces(
    signals: Sequence[SignalPropagation], panels: Sequence[Panel], logs: Sequence[bool]
) -> list[dict[str, Any]]:
    """What does not move: the first record, the expected variance, the reference line."""
    traces = []
    for row, panel in enumerate(panels):
        common = {"type": "scatter", "mode": "lines", "yaxis": f"y{_axis(row)}", "hoverinfo": "skip"}
        y = _shown(drawn_curve(signals[0], panel.curve), logs[row])
        first = {"name": "first record", "legendgroup": "first", "showlegend": row == 0}
        traces.append({**common, **first, "x": _xs(y), "y": y, "line": {"color": _FAINT, "width": 2}})
        expected = _shown(signals[0].curve("expected_var"), log=False)
        if panel.curve == "avg_channel_var" and any(value is not None for value in expected):
            line = {"color": _FAINT, "dash": "5px,4px", "width": 1.3}
            named = {"name": "expected at initialisation", "showlegend": True}
            traces.append({**common, **named, "x": _xs(expected), "y": expected, "line": line})
        if panel.reference is not None:
            line = {"color": _FAINT, "dash": "1.5px,3px", "width": 1.2}
            ends, level = [ENTRY_X, len(y) + ENTRY_X - 1], [panel.reference] * 2
            traces.append({**common, "showlegend": False, "x": ends, "y": level, "line": line})
    return traces


def _moving_values(
    signal: SignalPropagation, panels: Sequence[Panel], logs: Sequence[bool]
) -> list[list[float | None]]:
    """What moves from record to record: a curve for each panel."""
    return [_shown(drawn_curve(signal, panel.curve), log) for panel, log in zip(panels, logs, strict=True)]


def _moving_traces(signal: SignalPropagation, panels: Sequence[Panel], logs: Sequence[bool]) -> list[dict[str, Any]]:
    """The curves of one record."""
    traces: list[dict[str, Any]] = []
    names = [signal.entry.title, *(block.title for block in signal.blocks)]
    for row, y in enumerate(_moving_values(signal, panels, logs)):
        color = COLORS[0]
        trace: dict[str, Any] = {"type": "scatter", "x": _xs(y), "y": y}
        trace |= {"mode": "lines+markers", "yaxis": f"y{_axis(row)}", "name": "this step", "showlegend": row == 0}
        trace |= {"line": {"color": color, "width": 2}, "marker": {"color": color, "size": 5}}
        trace |= {"legendgroup": "now", "text": [_safe(name) for name in names]}
        trace["hovertemplate"] = "%{text}<br>%{y:.4g}<extra></extra>"
        traces.append(trace)
    return traces


def _layout(signals: Sequence[SignalPropagation], panels: Sequence[Panel], below: int) -> dict[str, Any]:
    """The panels with their axes, and so many pixels below them."""
    rows, last = len(panels), max(len(signal.blocks) for signal in signals)
    inner = rows * (_PANEL_HEIGHT + _TITLES)
    few = last <= FEW_BLOCKS
    entry = {"text": "entry", "xref": "x", "yref": "paper", "x": ENTRY_X, "y": 0, "showarrow": False, "yanchor": "top"}
    entry |= {"xanchor": "right", "xshift": 6 if last <= 60 else -6, "yshift": -4}
    layout: dict[str, Any] = {
        "height": inner + below + 40,
        "margin": {"l": 64, "r": 16, "t": 40, "b": below},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 12, "color": "#808080"},
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "yref": "paper", "font": {"size": 12}},
        "annotations": [],
        "xaxis": {
            "anchor": f"y{_axis(rows - 1)}",
            "title": {"text": x_label(signals), "standoff": 6},
            "range": [ENTRY_X - 0.3, last - 0.7],
            "labelalias": dict.fromkeys(("-1", "\u22121"), "entry" if few else " "),
            "tickformat": "d",
            "dtick": 1 if few else None,
            "zeroline": False,
            "gridcolor": _GRID,
        },
    }
    for row, panel in enumerate(panels):
        top = 1 - (row * (_PANEL_HEIGHT + _TITLES) + _TITLES) / inner
        axis = {"domain": [max(0.0, top - _PANEL_HEIGHT / inner), top], "gridcolor": _GRID, "nticks": 6}
        axis |= {"zerolinecolor": _GRID, "exponentformat": "power"}
        layout[f"yaxis{_axis(row)}"] = axis | _scale(panel, signals, needs_log(panel, signals))
        heading = {"text": f"<b>{panel.title}</b>", "x": 0, "y": top, "xref": "paper", "yref": "paper"}
        heading |= {"xanchor": "left", "yanchor": "bottom", "yshift": 3, "showarrow": False, "font": {"size": 13}}
        layout["annotations"].append(heading)
    layout["annotations"] += [] if few else [entry]  # ticks that plotly chooses need not have one there
    return layout


def _scale(panel: Panel, signals: Sequence[SignalPropagation], log: bool) -> dict[str, Any]:
    """A vertical axis that holds for all records."""
    values = [value for value in finite_values(panel, signals) if value > 0 or not log]
    axis: dict[str, Any] = {"type": "log" if log else "linear", "tickfont": {"size": 10 if log else 12}, "dtick": None}
    if values:
        low, high = limits_of(values, log)
        axis["range"] = [math.log10(low), math.log10(high)] if log else [low, high]
        if log:  # whole decades: plotly would label 2 and 5 in between
            axis["dtick"] = max(1, round(math.log10(high / low) / 5))
    return axis


def _slider(history: SignalHistory) -> dict[str, Any]:
    now = {"mode": "immediate", "frame": {"duration": 0, "redraw": False}, "transition": {"duration": 0}}
    return {
        "active": len(history) - 1,
        "currentvalue": {"prefix": "step ", "xanchor": "left", "font": {"size": 15}},
        "pad": {"t": 62, "l": 0},
        "x": 0,
        "len": 1,
        "ticklen": 0,
        "minorticklen": 0,
        "font": {"color": "rgba(0,0,0,0)"},  # a label for each position would overlap; the value is told above
        "steps": [{"label": str(step), "method": "animate", "args": [[str(step)], now]} for step in history.steps],
    }


def _buttons() -> dict[str, Any]:
    play = {"mode": "immediate", "fromcurrent": True, "frame": {"duration": 120, "redraw": False}}
    play["transition"] = {"duration": 0}
    pause = {"mode": "immediate", "frame": {"duration": 0, "redraw": False}, "transition": {"duration": 0}}
    buttons = [
        {"label": "Play", "method": "animate", "args": [None, play]},
        {"label": "Pause", "method": "animate", "args": [[None], pause]},
    ]
    place = {"x": 1, "y": 0, "xanchor": "right", "yanchor": "top", "pad": {"t": 48}}
    return {"type": "buttons", "direction": "left", "showactive": False, "buttons": buttons, **place}


def _shown(values: Sequence[float | None], log: bool) -> list[float | None]:
    """A curve without what its axis cannot show."""
    finite = [value if value is not None and math.isfinite(value) else None for value in values]
    return [None if log and value is not None and value <= 0 else value for value in finite]


def _xs(values: Sequence[Any]) -> list[int]:
    return [x + ENTRY_X for x in range(len(values))]


def _axis(row: int) -> str:
    return "" if row == 0 else str(row + 1)


def _safe(text: str) -> str:
    """Text as plotly's small HTML shows it."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def write_monitor_report(history: SignalHistory, path: str | Path, *, title: str | None = None) -> Path:
    """Write the page of a history as one HTML file of about 1.6 MB that opens without a network.

    Args:
        history: at least one record.
        path: where to write it; an earlier page is replaced as a whole or not at all.
        title: heading of the page; by default it names the model.

    Returns:
        The path.

    Raises:
        ValueError: for a history without records.
    """
    spec = records_spec(history)
    last = history.signals[-1]
    title = f"{heading_of('Signal', [last])} through training" if title is None else title
    parts = {
        "title": escape(title),
        "measured": "\n  ".join(f'<p class="measured">{escape(line)}</p>' for line in caption_of([last])),
        "records": escape(_records(history)),
        "records_figure": records_figure(history, "chart"),
        "rounding": ROUNDED,
        "findings": episodes_list(history),
        "tables": numbers_tables(last),
        "step": str(history.steps[-1]),
        "configuration": signal_settings([last]),
    }
    body = fill(page_file("monitor_page.html"), parts)
    return write_page(path, title=title, body=body, data={"chart": spec}, script=figures_script())


def _records(history: SignalHistory) -> str:
    told = f"{history.signals[-1].model}: {history.extent}"
    return told if len(history) <= MOST_FRAMES else f"{told}; {MOST_FRAMES} of them, evenly spread, are on the slider"


def episodes_list(history: SignalHistory) -> str:
    """The findings of a history, each with the steps it was there."""
    return findings_list([finding_item(one.finding, escape(one.span)) for one in history.episodes()])
