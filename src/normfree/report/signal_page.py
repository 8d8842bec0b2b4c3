"""The interactive report of a signal propagation plot: one HTML file that opens offline.

``signal_page.html`` and ``.js`` beside this file are the page's body and script; this module fills it. Findings,
numbers and configuration are plain HTML; the curves are drawn by plotly.js, which is part of the file.
The page's content security policy forbids it to request anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from normfree.report.page import (
    CURVES,
    SCALE_SWITCH,
    chart_label,
    dead_fraction,
    fill,
    finding_item,
    findings_list,
    heading_of,
    json_number,
    numbers_tables,
    page_file,
    remarks,
    signal_settings,
    write_page,
)
from normfree.report.panels import (
    COLORS,
    ENTRY_X,
    ROUNDING,
    caption_of,
    color_of,
    is_layerwise,
    needs_log,
    non_finite_from,
    panels_of,
    place_of,
    shape_text,
    shorten,
    x_label,
)
from normfree.signal.propagation import SEVERITIES, BlockSignal, Curve, Finding, SignalPropagation

# For plotly and for the swatches in the legend (an SVG line), in pixels.
_DASHES = ("solid", "9px,3px", "7px,2px,2px,2px", "2px,2px", "4px,3px", "12px,3px,3px,3px")


def write_report(
    signals: Sequence[SignalPropagation],
    path: str | Path,
    *,
    title: str | None = None,
    appendix: str = "",
) -> Path:
    """Write the interactive report of one or several models as one HTML file of about 1.6 MB.

    Stacked, linked curves with a logarithmic or linear scale; findings with remedies; every number; and
    the configuration of the measurement. The file opens without a network.

    Args:
        signals: the models, in the order of the legend.
        path: where to write it; an earlier report is replaced as a whole or not at all.
        title: heading of the page; by default it names the models.
        appendix: HTML of one's own (escaped by whoever gives it), put before the numbers.

    Returns:
        The path.

    Raises:
        ValueError: if there is no model to report.
    """
    if not signals:
        raise ValueError("signals: got an empty sequence; give at least one SignalPropagation to report")
    title = heading_of("Signal propagation", signals) if title is None else title
    layers = "Where a model has no residual additions, a point is the output of a weighted layer."
    transition = (
        "A <em>transition block</em> (hollow marker) has a shortcut that is not the identity: it changes the number of "
        "channels or the size. "
    )
    turns = any(block.transition for signal in signals for block in signal.blocks)
    parts = {
        "title": escape(title),
        "measured": "\n  ".join(f'<p class="measured">{escape(line)}</p>' for line in caption_of(signals)),
        "summary": "".join(_verdict(signal, number) for number, signal in enumerate(signals)),
        "legend": "".join(_legend_item(signal, number) for number, signal in enumerate(signals)),
        "scale": SCALE_SWITCH,
        "key": _key(signals),
        "charted": escape(chart_label(panels_of(signals), signals)),
        "gaps": _gaps(signals),
        "findings": "".join(_findings(signal, number) for number, signal in enumerate(signals)),
        "layerwise": layers if any(is_layerwise(signal) for signal in signals) else "",
        "definitions": _definitions(signals, _planned(signals)),
        "transition": transition if turns else "",
        "appendix": appendix,
        "tables": "".join(numbers_tables(signal) for signal in signals),
        "configuration": signal_settings(signals),
    }
    body = fill(page_file("signal_page.html"), parts)
    return write_page(path, title=title, body=body, data=_page_data(signals), script=page_file("signal_page.js"))


_DEFINITIONS: dict[Curve, tuple[str, str]] = {
    "avg_channel_sq_mean": (
        "mean<sub>c</sub> ( mean<sub>n,h,w</sub> <i>x</i> )<sup>2</sup>",
        "Near zero while no channel drifts. If it grows with depth and overtakes the variance, that is the "
        "<em>mean shift</em>: channels carry an offset that is the same for every input.",
    ),
    "avg_channel_var": (
        "mean<sub>c</sub> ( var<sub>n,h,w</sub> <i>x</i> )",
        "The size of the signal. Exponential growth is an explosion, exponential decay an attenuation{saw}.",
    ),
    "residual_avg_channel_var": (
        "mean<sub>c</sub> ( var<sub>n,h,w</sub> <i>f</i>(<i>x</i>) )",
        "The variance of the branch's output before it is scaled and added. It is 1, the dotted line, when the branch "
        "preserves variance.",
    ),
    "input_correlation": (
        "mean<sub>i≠j</sub> cos( <i>x</i><sub>i</sub>, <i>x</i><sub>j</sub> )",
        "How alike the features of different examples are. Towards 1, the network can no longer tell its inputs apart.",
    ),
    "avg_sq_gradient": (
        "mean ( ∂ Σ <i>r y</i> / ∂<i>x</i> )<sup>2</sup>, <i>r</i> ~ N(0, 1)",
        "How much a change of each {unit} changes the output <i>y</i>. It should neither vanish nor explode towards "
        "the entry.",
    ),
}


def _definitions(signals: Sequence[SignalPropagation], planned: str) -> str:
    """What is drawn, of the panels there are."""
    layerwise = all(is_layerwise(signal) for signal in signals)
    saw = "" if layerwise else "; a saw-tooth that resets at each transition block is healthy"
    items = []
    for panel in panels_of(signals):
        formula, told = _DEFINITIONS[panel.curve]
        told = told.format(saw=saw, unit="layer" if layerwise else "block")
        more = f" {planned}" if planned and panel.curve == "avg_channel_var" else ""
        formula = f'<dd class="formula">{formula}</dd>'
        items.append(f"<div><dt>{panel.title}</dt>\n      {formula}\n      <dd>{told}{more}</dd></div>")
    return "\n    ".join(items)


def _page_data(signals: Sequence[SignalPropagation]) -> dict[str, Any]:
    panels = panels_of(signals)
    described = [
        {
            "curve": panel.curve,
            "title": panel.title,
            "reference": panel.reference,
            "signed": panel.signed,
            "log": needs_log(panel, signals),
        }
        for panel in panels
    ]
    models = [_model_data(signal, number) for number, signal in enumerate(signals)]
    return {"x_label": x_label(signals), "rounding": ROUNDING, "panels": described, "models": models}


def _model_data(signal: SignalPropagation, number: int) -> dict[str, Any]:
    points = [signal.entry, *signal.blocks]
    known = {name: signal.curve(name) for name in CURVES if name != "expected_var"}
    return {
        "name": signal.model,
        "unit": "weighted layer" if is_layerwise(signal) else "block",
        "color": color_of(number),
        "dash": _dash(number),
        "names": [point.title for point in points],
        "shapes": [shape_text(point.shape) for point in points],
        "axes": [point.channel_axis for point in points],
        "transitions": [isinstance(point, BlockSignal) and point.transition for point in points],
        "dead": [dead_fraction(point) for point in points],
        "notes": [remarks(point, transition=False) for point in points],
        "curves": {name: [json_number(value) for value in values] for name, values in known.items()},
        "gaps": {name: non_finite_from(values) for name, values in known.items()},
        "expected": [json_number(value) for value in signal.curve("expected_var")],
    }


def _verdict(signal: SignalPropagation, number: int) -> str:
    found = {finding.severity for finding in signal.findings}
    worst = next((severity for severity in ("error", "warning") if severity in found), "healthy")
    verdict = f'<span class="verdict {worst}">{signal.verdict}</span>'
    return f'<li data-model="{number}">{escape(shorten(signal.model, 64))}: {signal.size}, {verdict}</li>'


def _legend_item(signal: SignalPropagation, number: int) -> str:
    name = escape(shorten(signal.model, 56))
    return (
        f'<button type="button" data-model="{number}" aria-pressed="true" title="{escape(signal.model)} '
        f'(click: hide or show; double-click or Shift: show alone)">{_swatch(number)}<span>{name}</span></button>'
    )


def _swatch(number: int) -> str:
    dash = "" if _dash(number) == "solid" else f' stroke-dasharray="{_dash(number).replace("px", "")}"'
    return _line(f'stroke="{color_of(number)}" stroke-width="3"{dash}')


def _line(style: str) -> str:
    line = f'<line x1="0" y1="5" x2="34" y2="5" {style}/>'
    return f'<svg class="swatch" width="34" height="10" aria-hidden="true">{line}</svg>'


def _key(signals: Sequence[SignalPropagation]) -> str:
    """The marks that are not models: only those that occur."""
    marks = []
    if _has_plan(signals):
        marks.append((_line('stroke="currentColor" stroke-width="1.3" stroke-dasharray="5,4"'), "expected variance"))
    if any(panel.reference is not None for panel in panels_of(signals)):
        dotted = _line('stroke="currentColor" stroke-width="1.2" stroke-dasharray="1.5,3"')
        marks.append((dotted, "variance preserving"))
    if any(block.transition for signal in signals for block in signal.blocks):
        circle = '<circle cx="6" cy="5" r="3.6" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        svg = f'<svg class="swatch" width="12" height="10" aria-hidden="true">{circle}</svg>'
        marks.append((svg, "transition block"))
    return "".join(f"<span>{picture}{name}</span>" for picture, name in marks)


def _planned(signals: Sequence[SignalPropagation]) -> str:
    """What the line of the expected variance is, and of which models there is none, and why."""
    told = []
    if _has_plan(signals):
        told.append("The thin dashed line is the variance that the model's plan expects; the curve should lie on it.")
    without: dict[str, list[str]] = {}
    for signal in signals:
        if isinstance(why := signal.configuration.get("expected_var"), str):
            without.setdefault(why, []).append(shorten(signal.model, 56))
    told += [f"No expectation of {escape(', '.join(names))}: {escape(why)}." for why, names in without.items()]
    return " ".join(told)


def _has_plan(signals: Sequence[SignalPropagation]) -> bool:
    return any(value is not None for signal in signals for value in signal.curve("expected_var"))


def _gaps(signals: Sequence[SignalPropagation]) -> str:
    """Where curves stop because values are not finite, one line for each model and block."""
    lines = []
    for signal in signals:
        starts: dict[int, list[str]] = {}
        for panel in panels_of([signal]):
            if (start := non_finite_from(signal.curve(panel.curve))) is not None:
                starts.setdefault(start, []).append(panel.title.lower())
        for start, titles in sorted(starts.items()):
            place = f"{place_of(start, [signal])} ({[signal.entry, *signal.blocks][start - ENTRY_X].title})"
            lines.append(f"{signal.model}: {', '.join(titles)} non-finite from {place}; the curve has a gap there.")
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="gaps" id="gaps">{items}</ul>' if lines else ""


def _findings(signal: SignalPropagation, number: int) -> str:
    order = {severity: rank for rank, severity in enumerate(SEVERITIES)}
    found = sorted(signal.findings, key=lambda finding: order.get(finding.severity, len(order)))
    listed = findings_list([_finding(finding, signal, number) for finding in found])
    heading = f'<div class="model-heading">{_swatch(number)}<h3>{escape(shorten(signal.model, 64))}</h3></div>'
    return f'<div class="model-findings" data-model="{number}">{heading}{listed}</div>'


def _finding(finding: Finding, signal: SignalPropagation, number: int) -> str:
    place = "whole model"
    if finding.block is not None:
        name = next((f": {escape(b.title)}" for b in signal.blocks if b.index == finding.block), "")
        place = (
            f'<button type="button" class="locate" data-model="{number}" data-block="{finding.block:d}" '
            f'title="show in the curves">{place_of(finding.block, [signal])}{name}</button>'
        )
    return finding_item(finding, place)


def _dash(number: int) -> str:
    return _DASHES[(number + number // len(COLORS)) % len(_DASHES)]
