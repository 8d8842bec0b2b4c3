"""Stretches of the signal along which variances compare: without a normalizer in between.

Every point follows the one that its signal came through last: an addition the one on its shortcut, a layer the one on
its input. That makes chains, one for each end of the network (a head, an output) and each of its streams. A chain is
cut where its numbers begin anew: at an entry, after a normalizer, which brings any signal to unit variance, after a
table that numbers are looked up in, and after a global pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from normfree.signal.propagation import BESIDE, BlockSignal, Entry, SignalPropagation

STILL_APART = 0.9
"""Mean cosine similarity below which different examples are far apart."""

# Of unit variance are images standardized, or of half and twice the contrast.
USUAL = 4.0


@dataclass(frozen=True)
class Stretch:
    """Points one after the other, whose variances compare.

    Attributes:
        start: the variance the stretch begins with.
        at: where that is, in words.
        points: those of the plot with their index, layers beside the blocks with the index BESIDE.
        ends: no normalizer follows, but outputs, a global pool or what cannot be followed.
        pooled: its points have one position each, and follow maps.
        entry: where its stream begins, if that is known.
        apart_again: different examples are far apart further along, where nothing has been put beside the signal yet.
    """

    start: float
    at: str
    points: tuple[BlockSignal, ...]
    ends: bool
    pooled: bool
    entry: Entry | None
    apart_again: bool


def stretches(signal: SignalPropagation) -> list[Stretch]:
    """All stretches of a measurement, those of its first chain first; what several chains share is one."""
    found = dict[tuple[Any, ...], Stretch]()
    for chain in chains(signal):
        for stretch in _cut(signal, chain):
            key = (*map(id, stretch.points), stretch.start, stretch.at, stretch.ends, stretch.pooled)
            found.setdefault(key, stretch)
    return list(found.values())


def chains(signal: SignalPropagation) -> list[tuple[BlockSignal, ...]]:
    """The points of every path from an entry to an end, without smaller terms and what only gates are made of."""
    points = all_points(signal)
    if any(point.number is None for point in points):  # written by hand, or by an earlier version
        return [tuple(signal.blocks)]
    points.sort(key=_number)
    by_number = {point.number: point for point in points}
    judged = [point for point in points if not (point.gate or point.smaller_term)]
    followed = {point.after for point in judged}
    ends = [point for point in judged if point.number not in followed]
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
    apart_again = _apart_further_along(chain)

    def close(ends: bool) -> None:
        if points:
            goes_on = points[-1].renewed or points[-1].joined
            again = id(points[-1]) in apart_again
            found.append(Stretch(start, at, tuple(points), ends and not goes_on, pooled, entry, again))
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
            anew = point.avg_channel_var, f"at {point.place}"
        elif point.normalized and not (began and point.kind == "residual"):
            anew = 1.0, "after a normalizer"
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


def _apart_further_along(chain: Sequence[BlockSignal]) -> set[int]:
    """The points after which different examples are far apart, where nothing has been put beside the signal yet."""
    found, apart = set[int](), False
    for point in reversed(chain):
        if apart:
            found.add(id(point))
        alike = None if point.last else likeness(point)
        apart = (apart or (alike is not None and alike < STILL_APART)) and not point.mixed
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
        return start, f"at {first.place}"
    return start, f"(the entry, {variance:.3g}, has units of its own)"


def comparable(signal: SignalPropagation) -> list[BlockSignal]:
    """The points of the plot whose numbers compare with the entry's: not those after a global pool or of class tokens.

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
    return point.values // point.shape[0]


def likeness(point: BlockSignal) -> float | None:
    """The mean cosine similarity at a point, with or without a layer's bias; None where nothing is left without it."""
    if point.kind != "layer" or point.input_correlation is None:
        return point.input_correlation
    return None if point.own_correlation is None else min(point.input_correlation, point.own_correlation)


def all_points(signal: SignalPropagation) -> list[BlockSignal]:
    """The points of the plot, and the layers beside them, whose index is BESIDE."""
    return [*signal.blocks, *(replace(layer, index=BESIDE) for layer in signal.layers)]
