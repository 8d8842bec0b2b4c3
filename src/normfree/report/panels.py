"""What the plot and the report of a signal propagation plot agree on.

Which panels there are, which of them need a logarithmic axis, where a curve stops being finite, and how
a measurement is told in one line. The x axis is the block index, as in findings and ``spp.json``; the
entry, point 0 of the plot, stands one before block 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from normfree.signal.propagation import Curve, SignalPropagation

# Okabe and Ito's palette without yellow (too faint on paper) and black (taken by the expected variance).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


TIMES = "\u00d7"
ENTRY_X = -1
# A squared mean this much smaller than the variance is a zero with rounding on it: sampling alone would
# leave more than that in any input of fewer than 1e12 positions.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Panel:
    """One of the stacked axes.

    Attributes:
        curve: attribute of a block that is drawn.
        title: its name in the paper's words.
        reference: value of a healthy signal, drawn as a thin line, or None.
        signed: the values may be negative, so the axis is always linear.
    """

    curve: Curve
    title: str
    reference: float | None = None
    signed: bool = False


_PANELS = (
    Panel("avg_channel_sq_mean", "Average channel squared mean"),
    Panel("avg_channel_var", "Average channel variance"),
    Panel("residual_avg_channel_var", "Residual average channel variance", reference=1.0),
    Panel("input_correlation", "Input correlation", signed=True),
    Panel("avg_sq_gradient", "Average squared gradient"),
)


def panels_of(signals: Sequence[SignalPropagation]) -> tuple[Panel, ...]:
    """The panels these models need.

    Squared mean and variance are always there; the residual variance unless no model has a residual
    block; input correlation and gradient where some model has a curve of them, of two points at least.
    """

    def needed(panel: Panel) -> bool:
        if panel.curve in ("avg_channel_sq_mean", "avg_channel_var"):
            return True
        if panel.curve == "residual_avg_channel_var":
            return not all(is_layerwise(signal) for signal in signals)
        return any(sum(value is not None for value in signal.curve(panel.curve)) > 1 for signal in signals)

    return tuple(panel for panel in _PANELS if needed(panel))


def is_layerwise(signal: SignalPropagation) -> bool:
    """Whether the points are weighted layers, as in a model without residual additions."""
    return bool(signal.blocks) and all(block.kind == "layer" for block in signal.blocks)


def x_label(signals: Sequence[SignalPropagation]) -> str:
    """What the x axis counts."""
    layerwise = [is_layerwise(signal) for signal in signals]
    unit = "weighted layer" if all(layerwise) else "block" if not any(layerwise) else "block or weighted layer"
    return f"{unit} index"


def needs_log(panel: Panel, signals: Sequence[SignalPropagation]) -> bool:
    """Whether the panel's positive values, reference included, span more than two decades."""
    positive = [value for value in finite_values(panel, signals) if value > 0]
    return not panel.signed and len(positive) > 1 and max(positive) / 100 > min(positive)


def drawn_curve(signal: SignalPropagation, name: Curve) -> list[float | None]:
    """The curve as it is drawn: a squared mean that is rounding noise is zero, not 15 decades down."""
    values = signal.curve(name)
    if name != "avg_channel_sq_mean":
        return values
    floors = [ROUNDING * (var or 0) for var in signal.curve("avg_channel_var")]
    pairs = zip(values, floors, strict=True)
    return [0.0 if value is not None and value < floor < math.inf else value for value, floor in pairs]


def non_finite_from(values: Iterable[float | None]) -> int | None:
    """The x of a curve's first value that is infinite or not a number; None (not measured) does not count."""
    bad = (x for x, value in enumerate(values, ENTRY_X) if value is not None and not math.isfinite(value))
    return next(bad, None)


def place_of(x: int, signals: Sequence[SignalPropagation]) -> str:
    """What stands at an x: "the entry", or by its index a block, or a layer where no model has blocks."""
    unit = "layer" if all(map(is_layerwise, signals)) else "block"
    return "the entry" if x == ENTRY_X else f"{unit} {x}"


def describe_measurement(signal: SignalPropagation) -> str:
    """Mode, input, number of examples, channel axis, and zero gains that were measured as one, in one line."""
    axes = sorted({block.channel_axis for block in signal.blocks} | {signal.entry.channel_axis})
    channels = f"channels on ax{'i' if len(axes) == 1 else 'e'}s {' and '.join(map(str, axes))}"
    woken = sum(bool(block.woken) for block in signal.blocks)
    gains = f"; {woken} of {len(signal.blocks)} branches with their zero gain at one" if woken else ""
    return f"mode {signal.mode}; input {describe_input(signal.input)}; {channels}{gains}"


def caption_of(signals: Sequence[SignalPropagation]) -> list[str]:
    """One sentence for each way of measuring, after the names of its models where there are several."""
    told: dict[str, list[str]] = {}
    for signal in signals:
        told.setdefault(describe_measurement(signal), []).append(shorten(signal.model, 32))
    if len(told) == 1:
        return [text[:1].upper() + text[1:] + "." for text in told]
    return [f"{', '.join(names)}: {text}." for text, names in told.items()]


def describe_input(given: dict[str, Any]) -> str:
    """The input's kind and number of examples first, then whatever else is known about it."""
    rest = {key: value for key, value in given.items() if (key, value) != ("batches", 1)}
    kind = next((str(rest.pop(key)) for key in ("kind", "source", "name") if key in rest), "")
    count = next((rest.pop(key) for key in ("examples", "num_examples", "batch_size") if key in rest), None)
    words = [kind] if kind else []
    if count is not None:
        words.append(f"{count} example{'' if count == 1 else 's'}")
    words += [f"{key.replace('_', ' ')} {_plain(value)}" for key, value in rest.items() if value is not None]
    return ", ".join(words) or "not recorded"


def shorten(text: str, width: int) -> str:
    """The text on one line of at most ``width`` characters, its middle left out where it is longer."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    head = (width - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def finite_values(panel: Panel, signals: Sequence[SignalPropagation]) -> list[float]:
    """Every finite value of the panel, expected variance and reference included."""
    curves: list[Curve] = [panel.curve, "expected_var"] if panel.curve == "avg_channel_var" else [panel.curve]
    values = [value for signal in signals for curve in curves for value in drawn_curve(signal, curve)]
    finite = [float(value) for value in values if value is not None and math.isfinite(value)]
    return [*finite, panel.reference] if panel.reference is not None and finite else finite


def common_transitions(signals: Sequence[SignalPropagation]) -> tuple[int, ...] | None:
    """The indices of the transition blocks if all models agree on them, else None."""
    found = {tuple(block.index for block in signal.blocks if block.transition) for signal in signals}
    return found.pop() if len(found) == 1 else None


def limits_of(values: Sequence[float], log: bool) -> tuple[float, float]:
    """Axis limits with room around the values; never a zoom into rounding noise.

    A linear axis starts at (or just below) zero where that costs less than half of it. A logarithmic one
    stays within 1e-150 and 1e150, for the ticks beyond its ends must still be numbers (float32 ends at 3e38).
    """
    low, high = min(values), max(values)
    if log:
        low = min(max(low, 1e-150), 1e149)
        high = min(max(high, 10 * low), 1e150)
        room = 0.06 * math.log10(high / low)
        return low / 10**room, high * 10**room
    low, high = max(low, -1e300), min(high, 1e300)
    middle, reach = (high + low) / 2, max((high - low) / 2, 0.1 * abs(high), 1e-30)
    # A value on the edge would lose half its marker.
    ground = 0.0 if low > 0.05 * high else -0.06 * high
    return ground if 0 <= low < 0.5 * high else middle - 1.14 * reach, middle + 1.14 * reach


def color_of(number: int) -> str:
    """The colour of the model at this place in the legend."""
    return COLORS[number % len(COLORS)]


def edge_note(panel: Panel, signals: Sequence[SignalPropagation], log: bool) -> str:
    """What the marks on a panel's upper and lower edge mean."""
    curves = [drawn_curve(signal, panel.curve) for signal in signals]
    starts = sorted({start for curve in curves if (start := non_finite_from(curve)) is not None})
    notes = []
    if starts:
        more = "".join(f", {x}" for x in starts[1:3]) + (", …" if len(starts) > 3 else "")
        notes.append(f"{TIMES} non-finite from {place_of(starts[0], signals)}{more}")
    if log and any(value == 0 for curve in curves for value in curve):
        notes.append("▾ zero")
    return "   ".join(notes)


def shape_text(shape: Sequence[int]) -> str:
    """A shape with multiplication signs."""
    return f" {TIMES} ".join(map(str, shape))


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
        return TIMES.join(map(str, value))
    return shorten(str(value), 60)
