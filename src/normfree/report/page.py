"""The frame of all pages: files that open offline with plotly's source inside, and the tables and findings they share.

``page.html``, ``page.css`` and ``page.js`` are the frame; ``figures.js`` draws figures that are given as plotly takes
them. ``plotly-cartesian.min.js`` is plotly.js 4.1.1 as npm's ``plotly.js-cartesian-dist-min`` has it: what draws lines
and heatmaps, a third of the whole. It is MIT-licensed, as its first lines say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from normfree.common.files import write_atomically
from normfree.report.panels import Panel, is_layerwise, panels_of, shape_text, shorten, x_label
from normfree.signal.propagation import SEVERITIES, BlockSignal, Curve, Entry, Finding, Kind, SignalPropagation


def write_page(path: str | Path, *, title: str, body: str, data: Any, script: str, style: str = "") -> Path:
    """Write a page that requests nothing, as a whole or not at all.

    Args:
        path: where to write it.
        title: of the window, as text.
        body: the page's own HTML.
        data: what ``script`` draws, as JSON.
        script: JavaScript that reads ``data`` and draws with plotly and ``page.js``.
        style: CSS of the page's own, beside that of all pages.

    Returns:
        The path.
    """
    parts = {
        "title": escape(title),
        "style": page_file("page.css") + ("\n" + style if style else ""),
        "body": body,
        "data": script_json(data),
        "plotly": page_file("plotly-cartesian.min.js").replace("</script", "<\\/script"),
        "script": page_file("page.js") + "\n" + script,
    }
    return write_atomically(path, fill(page_file("page.html"), parts))


def figures_script() -> str:
    """The script of pages whose data are figures, by the names of their elements."""
    return page_file("records.js") + "\n" + page_file("figures.js")


def fill(template: str, parts: Mapping[str, str]) -> str:
    """A template with its ``{{placeholders}}`` filled in.

    In one pass over the template alone: what looks like a placeholder inside a part stays as it is.
    """
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def page_file(name: str) -> str:
    """The text of a template, style sheet or script of this folder."""
    return resources.files("normfree.report").joinpath(name).read_text(encoding="utf-8").rstrip()


def script_json(value: Any) -> str:
    """JSON that no HTML parser can mistake for markup, inside a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


SCALE_SWITCH = """<div class="switch" role="group" aria-label="Scale of the vertical axes">
        <span>Scale</span>
        <button type="button" id="scale-auto" data-scale="auto" aria-pressed="true">per panel</button>
        <button type="button" id="scale-log" data-scale="log" aria-pressed="false">log</button>
        <button type="button" id="scale-linear" data-scale="linear" aria-pressed="false">linear</button>
      </div>"""
"""The buttons of a chart with panels; its script reads ``data-scale``."""


def chart_label(panels: Sequence[Panel], signals: Sequence[SignalPropagation]) -> str:
    """The label of a chart with these panels: what is drawn over what, of which models, and where the numbers are."""
    titles = ", ".join(panel.title.lower() for panel in panels)
    names = ", ".join(dict.fromkeys(shorten(signal.model, 48) for signal in signals))
    return f"Curves over the {x_label(signals)}, of {names}: {titles}. The numbers are in the tables below."


def finding_item(finding: Finding, place: str) -> str:
    """One finding as an item of a list.

    Args:
        finding: what was found.
        place: where, or when, as HTML.
    """
    severity = finding.severity if finding.severity in SEVERITIES else "info"
    kind = escape(finding.kind.replace("_", " "))
    return (
        f'<li class="finding {severity}"><div class="finding-head">'
        f'<span class="severity">{escape(finding.severity)}: {kind}</span><span>{place}</span></div>'
        f'<p>{escape(finding.message)}</p><p class="remedy">{escape(finding.remedy)}'
        + "</p>"
        + _meaning(finding)
        + (code_details(finding.code) if finding.code else "")
        + "</li>"
    )


MEANINGS: dict[Kind, str] = {
    "explosion": "Each block adds a multiple of what it reads, or each layer gives more than it gets: in a network of "
    "fifty blocks a factor of two a block is 10¹⁵, and neither outputs nor gradients have a usable size.",
    "attenuation": "Each layer gives less than it gets (PyTorch's default initialisation behind a ReLU a sixth). The "
    "gradient fades with the signal, and the early layers hardly learn.",
    "mean_shift": "The mean of a ReLU is positive, and filters that do not sum to zero turn it into an offset of the "
    "channel, the same for every input and larger with every block.",
    "branch_variance": "A branch that gives more than four times the variance it should, or less than a quarter. Small "
    "ones are a note, for they may be meant (layer scale, transformers). Or all of them together are nothing beside "
    "the stream they are added to.",
    "silenced_branch": "A zero gain, weight or gate leaves the shortcut alone: the start of SkipInit, FixUp and "
    "adaLN-zero.",
    "dead_channels": "What is constant whatever the input carries nothing: filters of zero, biases far below zero "
    "behind a ReLU, saturated or clipped activations.",
    "correlation_collapse": "What different inputs have in common grows until nothing else is left, and what follows "
    "cannot tell them apart: a long chain with a mean shift does it.",
    "gradient_explosion": "The output is so rough in what the early layers compute that a step of the usual size "
    "leaves the range in which the gradient holds: a saturating activation with too large a gain, or a long chain of "
    "layers and normalizers without shortcuts.",
    "gradient_vanishing": "What varies in the output does not come from the early layers, or the share of a step that "
    "reaches them is lost: saturating activations at too small a gain, or a signal that fades.",
    "zero_layer": "A layer that starts at zero gives the same for every input: a choice of flows, value heads and box "
    "regressions, and otherwise a mistake.",
    "single_value": "A variance is over examples and positions. Of one vector there is none: every number of the plot "
    "is zero, and tells nothing.",
    "variance_plan": "The plan says what variance each block's sum has if each branch keeps the variance and is scaled "
    "by alpha. A factor that is forgotten, or another alpha than the plan's, takes the measured variance off it.",
    "softmax_output": "A loss that takes logits applies its own softmax: of a softmax once more the gradient is small, "
    "and training slow.",
    "uneven_inputs": "A step has one size for all weights: where one feature is a hundred times the others, what is "
    "right for its weights leaves theirs as they were.",
    "non_finite": "From one operation on there are infinities, or what is not a number: after large magnitudes by "
    "overflow, after usual ones by a logarithm or root of what is negative, or a division by zero.",
}
"""What each kind of finding says, for a reader without the documentation at hand."""


def _meaning(finding: Finding) -> str:
    """What a kind of finding says, folded away until it is asked for; "" of a kind of somebody else's."""
    if finding.kind not in MEANINGS:
        return ""
    name = escape(finding.kind.replace("_", " "))
    return f"<details><summary>what {name} means</summary><p>{escape(MEANINGS[finding.kind])}</p></details>"


def code_details(code: str) -> str:
    """Lines of Python to be pasted, folded away until they are asked for."""
    return f'<details><summary>the remedy in Python</summary><pre tabindex="0">{escape(code)}</pre></details>'


def findings_list(items: Sequence[str]) -> str:
    """The items of :func:`finding_item` as a list, or that there are none."""
    listed = f'<ol class="findings-list">{"".join(items)}</ol>'
    return listed if items else '<p class="no-finding">Nothing to report.</p>'


CURVES: dict[Curve, str] = {
    "avg_channel_sq_mean": "squared mean",
    "avg_channel_var": "variance",
    "expected_var": "expected variance",
    "residual_avg_channel_var": "residual variance",
    "input_correlation": "input correlation",
    "avg_sq_gradient": "squared gradient",
}
"""Numbers of a point, and the heads of their columns."""


def numbers_tables(signal: SignalPropagation) -> str:
    """Every number of one model, folded away until it is asked for: a row a block, then a row a layer beside them."""
    present: set[Curve] = {panel.curve for panel in panels_of([signal])}
    present |= {name for name in CURVES if any(value is not None for value in signal.curve(name))}
    unit = "weighted layer" if is_layerwise(signal) else "block"
    points = [("entry", signal.entry), *((str(block.index), block) for block in signal.blocks)]
    columns: list[Curve] = [name for name in CURVES if name in present]
    tables = _table(f"{signal.model}: numbers of each {unit}", unit, points, columns)
    beside = [(_place(layer, signal), layer) for layer in signal.layers]
    beside += [("output", output) for output in signal.outputs]
    columns = [name for name in CURVES if any(getattr(point, name) is not None for _, point in beside)]
    if beside:
        tables += _table(f"{signal.model}: weighted layers in no block, and outputs", "where", beside, columns)
    return tables


def _table(
    summary: str, first: str, points: Sequence[tuple[str, Entry | BlockSignal]], columns: Sequence[Curve]
) -> str:
    heads = [first.removeprefix("weighted "), "module", "shape", "channel axis", *(CURVES[name] for name in columns)]
    heads += ["dead channels", "remarks"]
    text = {"where", "module", "shape", "remarks"}
    cells = "".join(f"<th scope=col{' class=text' if head in text else ''}>{head}</th>" for head in heads)
    rows = ""
    for place, point in points:
        dead = f"{100 * dead_fraction(point):.3g} %" if isinstance(point, BlockSignal) else ""
        values = [getattr(point, name, None) for name in columns]
        numbers = "".join(f"<td{' class=bad' if json_number(v) == str(v) else ''}>{_number(v)}</td>" for v in values)
        rows += (
            f"<tr><td{' class=text' if first == 'where' else ''}>{escape(place)}</td>"
            f"<td class=text>{escape(point.title)}</td>"
            f"<td class=text>{shape_text(point.shape)}</td><td>{point.channel_axis}</td>{numbers}"
            f"<td>{dead}</td><td class=text>{escape(remarks(point))}</td></tr>"
        )
    table = f"<table class=numbers><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>"
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(summary)}">{table}</div>'
    return f"<details><summary>{escape(summary)}</summary>{scroll}</details>"


def _place(layer: BlockSignal, signal: SignalPropagation) -> str:
    """Where a layer that is in no block lies among the blocks, in the order of the forward pass."""
    before = [block.index for block in signal.blocks if (block.number or 0) < (layer.number or 0)]
    return f"after block {max(before)}" if before else "before block 0"


def remarks(point: Entry | BlockSignal, transition: bool = True) -> str:
    """What is special about a point, in words; the transition only where nothing else shows it."""
    if isinstance(point, Entry):
        return "input of the first" if transition else ""
    words = ["transition"] if point.transition and transition else []
    if point.encloses:
        words.append(f"encloses {point.encloses} residual addition{'s' if point.encloses > 1 else ''}")
    if point.woken:
        words.append(f"woken: {', '.join(point.woken)}")
    if point.kind == "layer" and point.last:
        words.append("last layer")
    if point.gate:
        words.append("gate")
    if point.smaller_term:
        words.append("smaller term of a sum")
    return "; ".join(words)


def signal_settings(signals: Sequence[SignalPropagation]) -> str:
    """How models were measured, side by side, folded away: mode, input, entry, configuration."""
    columns = []
    for signal in signals:
        entry = f"{signal.entry.title}, shape {shape_text(signal.entry.shape)}"
        measured = {"mode": signal.mode, **flat_settings(signal.input, "input"), "entry": entry}
        rows = measured | {"blocks": str(len(signal.blocks))} | flat_settings(signal.configuration)
        rows |= {"not measured": shorten(", ".join(signal.unmeasured), 240)} if signal.unmeasured else {}
        columns.append((shorten(signal.model, 48), rows))
    return settings_table(columns)


def settings_table(columns: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Settings side by side, folded away.

    Args:
        columns: of each the head, and values by name.
    """
    names = list(dict.fromkeys(name for _, column in columns for name in column))
    heads = "".join(f"<th scope=col>{escape(head)}</th>" for head, _ in columns)
    head = f"<thead><tr><td></td>{heads}</tr></thead>"
    body = ""
    for name in names:
        cells = "".join(f"<td>{escape(shorten(column.get(name, ''), 400))}</td>" for _, column in columns)
        body += f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>"
    table = f"<table class=numbers>{head}<tbody>{body}</tbody></table>"
    scroll = f'<div class="scroll settings" tabindex="0" role="region" aria-label="Configuration">{table}</div>'
    return f"<details><summary>{len(names)} settings</summary>{scroll}</details>"


def flat_settings(value: Any, name: str = "") -> dict[str, str]:
    """Nested settings as rows: ``{"a": {"b": 1}}`` becomes ``{"a b": "1"}``."""
    if isinstance(value, Mapping) and value:
        rows: dict[str, str] = {}
        for key, item in value.items():
            rows |= flat_settings(item, f"{name} {key}".strip())
        return rows
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
        return {name: shape_text(value)} if "shape" in name else {name: ", ".join(map(str, value))}
    if isinstance(value, (list, tuple)):
        return {name: json.dumps(value, ensure_ascii=False, default=str)}
    return {} if isinstance(value, Mapping) and not name else {name: str(value)}


def json_number(value: float | None) -> float | str | None:
    """The number, or its name where JSON has none."""
    return value if value is None or math.isfinite(value) else str(value)


def _number(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.4g}"


def dead_fraction(point: Entry | BlockSignal) -> float:
    """The fraction of dead channels; 0 where it was not measured."""
    fraction = point.dead_channels if isinstance(point, BlockSignal) else 0.0
    return fraction if math.isfinite(fraction) else 0.0


def heading_of(what: str, signals: Sequence[SignalPropagation], most: int = 3) -> str:
    """A page's title that names the models: "``what`` of a, b and 2 more"."""
    names = [shorten(signal.model, 48) for signal in signals]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what} of {', '.join(names[:most])}{more}"
