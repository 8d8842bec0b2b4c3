"""The tables of the report: every number of every block, and the settings of the measurement, as HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from normfree.signal.panels import ENTRY_X, TIMES, panels_of, shorten
from normfree.signal.propagation import BlockSignal, Entry, SignalPropagation

CURVES = (
    "avg_channel_sq_mean",
    "avg_channel_var",
    "residual_avg_channel_var",
    "input_correlation",
    "avg_sq_gradient",
)


def points_of(signal: SignalPropagation) -> list[Entry | BlockSignal]:
    """The entry, then the blocks."""
    return [signal.entry, *signal.blocks]


def numbers_table(signal: SignalPropagation) -> str:
    """Every number of one model, a row for each block, folded away until it is asked for."""
    present = {panel.curve for panel in panels_of([signal])}
    heads = ["block", "module", "shape", "channel axis", "squared mean", "variance", "expected variance"]
    names = ["avg_channel_sq_mean", "avg_channel_var", "expected_var"]
    for curve, head in zip(CURVES[2:], ("residual variance", "input correlation", "squared gradient"), strict=True):
        if curve in present:
            names.append(curve)
            heads.append(head)
    heads += ["dead channels", "remarks"]
    text = {"module", "shape", "remarks"}
    cells = "".join(f"<th{' class=text' if head in text else ''}>{head}</th>" for head in heads)
    curves = [signal.curve(name) for name in names]
    rows = "".join(
        _row(x, point, [curve[x - ENTRY_X] for curve in curves]) for x, point in enumerate(points_of(signal), ENTRY_X)
    )
    table = f"<table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>"
    summary = f"<summary>{escape(signal.model)}: numbers of each block</summary>"
    return f'<details>{summary}<div class="scroll">{table}</div></details>'


def _row(x: int, point: Entry | BlockSignal, values: list[float | None]) -> str:
    dead = f"{100 * dead_fraction(point):.3g} %" if isinstance(point, BlockSignal) else ""
    numbers = "".join(f"<td{' class=bad' if json_number(v) == str(v) else ''}>{_number(v)}</td>" for v in values)
    return (
        f"<tr><td>{'entry' if x == ENTRY_X else x}</td>"
        f"<td class=text>{escape(point.name) or '(the model)'}</td>"
        f"<td class=text>{shape_text(point.shape)}</td><td>{point.channel_axis}</td>{numbers}"
        f"<td>{dead}</td><td class=text>{escape(remarks(point))}</td></tr>"
    )


def remarks(point: Entry | BlockSignal, transition: bool = True) -> str:
    """What is special about a point, in words; the transition only where nothing else shows it."""
    if isinstance(point, Entry):
        return "input of the first block" if transition else ""
    words = ["transition"] if point.transition and transition else []
    if point.encloses:
        words.append(f"encloses {point.encloses} residual addition{'s' if point.encloses > 1 else ''}")
    if point.woken:
        words.append(f"woken: {', '.join(point.woken)}")
    return "; ".join(words)


def settings_table(signals: Sequence[SignalPropagation]) -> str:
    """How the models were measured, side by side: mode, input, entry, configuration."""
    columns = [_settings(signal) for signal in signals]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    heads = "".join(f"<th scope=col>{escape(shorten(signal.model, 48))}</th>" for signal in signals)
    body = ""
    for key in keys:
        cells = "".join(f"<td>{escape(column.get(key, ''))}</td>" for column in columns)
        body += f"<tr><th scope=row>{escape(key)}</th>{cells}</tr>"
    table = f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll settings">{table}</div>'


def _settings(signal: SignalPropagation) -> dict[str, str]:
    entry = f"{signal.entry.name or '(the model)'}, shape {shape_text(signal.entry.shape)}"
    rows = {"mode": signal.mode, **_flat(signal.input, "input"), "entry": entry}
    return rows | {"blocks": str(len(signal.blocks))} | _flat(signal.configuration, "")


def _flat(value: Any, name: str) -> dict[str, str]:
    """Nested settings as rows: ``{"a": {"b": 1}}`` becomes ``{"a b": "1"}``."""
    if isinstance(value, Mapping) and value:
        rows: dict[str, str] = {}
        for key, item in value.items():
            rows |= _flat(item, f"{name} {key}".strip())
        return rows
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
        return {name: shape_text(value)} if "shape" in name else {name: ", ".join(map(str, value))}
    return {} if isinstance(value, Mapping) and not name else {name: str(value)}


def json_number(value: float | None) -> float | str | None:
    """The number, or its name where JSON has none."""
    return value if value is None or math.isfinite(value) else str(value)


def _number(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.4g}"


def shape_text(shape: Sequence[int]) -> str:
    """A shape with multiplication signs."""
    return f" {TIMES} ".join(map(str, shape))


def dead_fraction(point: Entry | BlockSignal) -> float:
    """The fraction of dead channels; 0 where it was not measured."""
    fraction = point.dead_channels if isinstance(point, BlockSignal) else 0.0
    return fraction if math.isfinite(fraction) else 0.0
