"""Which points of a measurement compare with which: stretches of the signal without a normalizer in between.

Every point follows the one that its signal came through last: an addition the one on its shortcut, a layer the one on
its input. That makes chains, one for each end of the network (a head, an output) and each of its streams. A chain is
cut where its numbers begin anew: at an entry, behind a normalizer, which brings any signal to unit variance, behind a
table that numbers are looked up in, and behind a global pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from normfree.signal.propagation import BlockSignal, Entry, SignalPropagation

# Of unit variance are images standardized, or of half and twice the contrast.
USUAL = 4.0

BESIDE = -1
"""The index of a point that is not on the plot's axis: a layer beside the blocks."""


@dataclass(frozen=True)
class Stretch:
    """Points one behind the other, whose variances compare.

    Attributes:
        start: the variance the stretch begins with.
        at: where that is, in words.
        points: those of the plot with their index, layers beside the blocks with the index BESIDE.
        ends: no normalizer is behind it, but outputs, a global pool or what cannot be followed.
        pooled: its points have one position each, and follow maps.
        entry: where its stream begins, if that is known.
    """

    start: float
    at: str
    points: tuple[BlockSignal, ...]
    ends: bool
    pooled: bool
    entry: Entry | None


def stretches(signal: SignalPropagation) -> list[Stretch]:
    """All stretches of a measurement, those of its first chain first."""
    found = list[Stretch]()
    for chain in chains(signal):
        for stretch in _cut(signal, chain):
            if stretch not in found:
                found.append(stretch)
    return found


def chains(signal: SignalPropagation) -> list[tuple[BlockSignal, ...]]:
    """The points of every path from an entry to an end; what only gates are made of is left out."""
    points = [*signal.blocks, *(replace(layer, index=BESIDE) for layer in signal.layers)]
    if any(point.number is None for point in points):  # written by hand, or by an earlier version
        return [tuple(signal.blocks)]
    points.sort(key=_number)
    by_number = {point.number: point for point in points}
    followed = {point.after for point in points if not point.gate}
    ends = [point for point in points if point.number not in followed and not point.gate]
    found = []
    for point in ends:
        chain = [point]
        while (after := chain[-1].after) is not None and after in by_number:
            chain.append(by_number[after])
        found.append(tuple(reversed(chain)))
    return found


def _number(point: BlockSignal) -> int:
    assert point.number is not None, "points without a number make one chain"
    return point.number


def _cut(signal: SignalPropagation, chain: Sequence[BlockSignal]) -> list[Stretch]:
    """A chain cut where its numbers begin anew."""
    found = list[Stretch]()
    entry: Entry | None = None
    start, at = 0.0, ""
    points = list[BlockSignal]()
    has_positions = pooled = False

    def close(ends: bool) -> None:
        if points:
            goes_on = points[-1].renewed or points[-1].joined
            found.append(Stretch(start, at, tuple(points), ends and not goes_on, pooled, entry))
            points.clear()

    before: BlockSignal | None = None
    for point in chain:
        known = point.entry is not None and point.entry < len(signal.entries)
        began = known or before is None
        if began:
            entry = signal.entries[point.entry or 0] if known else signal.entry
            has_positions = has_positions or positions(entry) > 1
        anew: tuple[float, str] | None = None
        if positions(point) == 1 and has_positions and not pooled:
            anew = point.avg_channel_var, f"at {where(point)}"
        elif point.normalized and not (began and point.kind == "residual"):
            anew = 1.0, "behind a normalizer"
        elif began and entry is not None:
            anew = beginning(entry.avg_channel_var, point)
        elif before is not None and before.looked_up:
            anew = beginning(before.avg_channel_var, point)
        if anew is not None:
            close(ends=not point.normalized)
            start, at = anew
        pooled = has_positions and positions(point) == 1
        has_positions = has_positions or positions(point) > 1
        if not point.looked_up:
            points.append(point)
        before = point
    close(ends=True)
    return found


def beginning(variance: float, first: BlockSignal) -> tuple[float, str]:
    """The variance that a stream begins with, and where that is.

    What comes first brings an input in units of its own (pixels of 0 to 255, numbers of tokens) to one, or nearer to
    it; that is no change of the signal. So it is the entry's, the first point's or one, whichever lies between.
    """
    start = sorted((variance, first.avg_channel_var, 1.0))[1] if variance > 0 else 0.0
    if start == variance or 1 / USUAL <= variance <= USUAL:
        return variance, "at the entry"
    if start == first.avg_channel_var:
        return start, f"at {where(first)}"
    return start, f"(the entry, {variance:.3g}, has units of its own)"


def comparable(signal: SignalPropagation) -> list[BlockSignal]:
    """The points of the plot whose numbers compare with the entry's: not those behind a global pool or of class tokens.

    A mean over all positions cuts the variance by their number, and tells nothing of how the signal fares.
    """
    found, pooled = list[BlockSignal](), positions(signal.entry) > 1
    for block in signal.blocks:
        is_map = positions(block) > 1
        pooled = pooled or is_map  # from here on, what has one position
        if is_map or not pooled:
            found.append(block)
    return found


def positions(point: Entry | BlockSignal) -> int:
    """How many positions an activation has per example."""
    return prod(point.shape) // (point.shape[0] * point.shape[point.channel_axis])


def where(point: BlockSignal) -> str:
    """How a message names a point."""
    name = point.name or "the model itself"
    if point.kind == "output":
        return point.name
    return f"layer {name}" if point.index == BESIDE else f"block {point.index} ({name})"


def index_of(point: BlockSignal) -> int | None:
    """The index of a point on the plot's axis, None beside it."""
    return None if point.index == BESIDE or point.kind == "output" else point.index
