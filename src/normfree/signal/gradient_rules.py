"""The rules on gradients: whether the early layers can be trained through the later ones.

Legend: at a point with activation x and gradient g of a random projection of the output, G = ‖g‖² per example, V the
average channel variance of x, and S = G·V, the *sensitivity*: how much the output moves (squared) if every value of x
moves by its own standard deviation, each in a direction of its own.

Why S. Per value, the gradient changes with every change of shape, and with every scale that a normalizer takes out
again: a weight twice as large halves the gradient behind it. G is the same on both sides of a layer that keeps the
variance, whatever its fan-out and stride, and S on both sides of any linear one. Were x Gaussian noise, the variance
of the output would be S at most, by the Gaussian Poincaré inequality, and S exactly if the output were linear in x. So

- S / (variance of the output) says how far the output is from linear in x: √ of it is how many times x would have to
  be divided for the linear approximation, which is all that a gradient knows, to hold. A chain of linear layer,
  BatchNorm and ReLU multiplies S by π/(π − 1) = 1.467 a layer (Yang et al., 2019): 2·10⁸ in 50 layers.
- S far below the variance of the output says that what varies in the output does not come from x.

Between two points their ratio says the same of what lies between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf, isfinite, log10, prod
from statistics import median

from normfree.signal.propagation import BlockSignal, Finding, SignalPropagation
from normfree.signal.remedies import CONVERT, TRACE


@dataclass(frozen=True)
class _Rated:
    """A point, and the decimal logarithms of its S and G."""

    block: BlockSignal
    sensitivity: float
    power: float


# Layers that are to move by their own size take √S steps if none may leave the range of the linear approximation:
# 300 steps for 10⁵, 3000 for 10⁷, which only long training pays for. See docs/signal.md for the nets measured.
ROUGH, TOO_ROUGH = 1e5, 1e6

# The output is the largest of the last points: there may be several heads, or a gate behind the last layer.
OUTPUTS = 3


def gradient_explosion(signal: SignalPropagation) -> Iterator[Finding]:
    """S and G grow from the output to the input: the output is too rough in what the early layers compute.

    Scales alone move one of the two: a signal that grows has gradients that grow, and S stays. What counts is the
    largest ratio to the output, or the steady growth over all points if that is more: between a map and its mean over
    all positions S jumps, for the positions of a map are correlated.
    """
    broken = next((b for b in signal.blocks if b.avg_sq_gradient is not None and not isfinite(b.avg_sq_gradient)), None)
    if broken is not None and all(isfinite(b.avg_channel_var) for b in signal.blocks):
        yield Finding(
            kind="gradient_explosion",
            severity="error",
            block=broken.index,
            message=f"the gradient is not finite at {broken.place}, though the signal is.",
            remedy="Look for the derivative of a root, norm or logarithm at zero, and for half precision's range.",
            code=TRACE,
        )
        return
    points = [point for point in _rate(signal) if isfinite(point.power)]
    if len(points) < 2:
        return
    end = points[-OUTPUTS:]
    sensitivity, power = max(p.sensitivity for p in end), max(p.power for p in end)
    growth, first = max((min(p.sensitivity - sensitivity, p.power - power), -i) for i, p in enumerate(points))
    steady = min(_steady_growth([p.sensitivity for p in points]), _steady_growth([p.power for p in points]))
    if steady > growth:
        growth, first = steady, 0
    if growth < log10(ROUGH):
        return
    early, late = points[-first].block, end[-1].block
    steps = len(points) - 1 + first
    yield Finding(
        kind="gradient_explosion",
        severity="error" if growth >= log10(TOO_ROUGH) else "warning",
        block=early.index,
        message=(
            f"gradients explode towards the input: from {late.place} back to {early.place} their power, relative to "
            f"the signal, grows {_times(growth)} times, {_times(growth / steps)} times a point."
        ),
        remedy=(
            "Add residual connections (x + α·f(x) with α below 1); or keep the chain without normalizers, gains of "
            "saturating activations at 1, and biases at which the others are nearly linear, as conversion does."
        ),
        code=CONVERT,
    )


# What varies in the output comes from the layer to that part at most, but for correlations between the values of x.
FAINT, TOO_FAINT = 1e-4, 1e-6

# Where the signal fades with the gradient S stays, and what is left is G: the share of a step that reaches the layer.
WEAK, TOO_WEAK = 1e-6, 1e-9


def gradient_vanishing(signal: SignalPropagation) -> Iterator[Finding]:
    """S or G falls from the output to the input: the early layers do not learn.

    The calls of one module share its weights, which receive the sum: the largest counts.
    """
    points = _largest_of_each_module(_rate(signal))
    for values, faint, too_faint, relative in (
        ([p.sensitivity for p in points], FAINT, TOO_FAINT, ", relative to the signal,"),
        ([p.power for p in points], WEAK, TOO_WEAK, ""),
    ):
        first, last, loss = _loss(values)
        if loss < -log10(faint):
            continue
        early, late = points[first].block, points[last].block
        factor = f"{_times(-loss)} times" if isfinite(loss) else "nothing at all (0 in this precision)"
        pace = f", {_times(-loss / (last - first))} times a point" if isfinite(loss) else ""
        yield Finding(
            kind="gradient_vanishing",
            severity="error" if loss >= -log10(too_faint) else "warning",
            block=early.index,
            message=(
                f"gradients vanish towards the input: from {late.place} back to {early.place} their power{relative} "
                f"falls to {factor}{pace}."
            ),
            remedy=(
                "Use activations that do not saturate (ReLU, SiLU or GELU for sigmoid or tanh), weights of the gain "
                "that fits them (He initialisation), and residual connections."
            ),
            code=CONVERT,
        )
        return


def _rate(signal: SignalPropagation) -> list[_Rated]:
    """The points that have a gradient and a signal.

    One whose gradient is 0 counts only if one behind it has one, and no weight behind it is 0 throughout: that lets
    nothing through until the first step has moved it.
    """
    rated = []
    zeros = [point.number for point in (*signal.blocks, *signal.layers) if point.weight_gain == 0]
    last_zero = max((number for number in zeros if number is not None), default=-1)
    for block in signal.blocks:
        gradient, variance = block.avg_sq_gradient, block.avg_channel_var
        if gradient is None or not isfinite(gradient) or not isfinite(variance) or variance <= 0:
            continue
        if gradient == 0 and block.number is not None and block.number < last_zero:
            continue
        power = _log(gradient * prod(block.shape) / block.shape[0])
        rated.append(_Rated(block, power + log10(variance), power))
    return rated if any(isfinite(p.power) for p in rated) else []


def _largest_of_each_module(points: Sequence[_Rated]) -> list[_Rated]:
    largest: dict[str, _Rated] = {}
    for point in points:
        module = point.block.name.split("#")[0]
        if module not in largest or point.power > largest[module].power:
            largest[module] = point
    return sorted(largest.values(), key=lambda p: p.block.index)


def _steady_growth(values: Sequence[float]) -> float:
    """From the last value to the first at the typical slope; no more than what there is between any two."""
    return min(-_slope(values) * (len(values) - 1), max(values) - min(values))


def _slope(values: Sequence[float]) -> float:
    """Change from one value to the next: the median over all pairs (Theil and Sen), of 200 values at most."""
    every = max(1, len(values) // 200)
    chosen = list(enumerate(values))[::every]
    return median((b - a) / (j - i) for (i, a), (j, b) in combinations(chosen, 2)) if len(chosen) > 1 else 0.0


def _loss(values: Sequence[float]) -> tuple[int, int, float]:
    """Where all points before have far less than one behind: the last of those before, the one behind, the difference.

    Those before are more than a quarter of all: a network may begin with a side branch. The largest of each side
    counts, for side branches (queries and keys, gates) receive less than the way past them.
    """
    best = (0, len(values) - 1, 0.0)
    for split in range(len(values) // 4 + 1, len(values)):
        behind = max(range(split, len(values)), key=lambda i: values[i])
        before = max(values[:split])
        if values[behind] > before and values[behind] - before > best[2]:
            best = split - 1, behind, values[behind] - before
    return best


def _times(exponent: float) -> str:
    """A power of ten in three digits, also where it is beyond a float's range."""
    return f"{10**exponent:.3g}" if abs(exponent) < 300 else f"1e{exponent:+.0f}"


def _log(value: float) -> float:
    return log10(value) if value > 0 else -inf
