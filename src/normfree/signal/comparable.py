"""Which points of a measurement compare with its beginning, and what that is."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from normfree.signal.propagation import BlockSignal, Entry, SignalPropagation

# Of unit variance are images standardized, or of half and twice the contrast.
USUAL = 4.0


def beginning(signal: SignalPropagation, blocks: Sequence[BlockSignal]) -> tuple[float, str]:
    """The variance that the signal begins with, and where that is.

    What comes first brings an input in units of its own (pixels of 0 to 255, numbers of tokens) to one, or nearer to
    it; that is no change of the signal. So it is the entry's, the first point's or one, whichever lies between.
    """
    entry = signal.entry.avg_channel_var
    first = blocks[0].avg_channel_var if blocks else entry
    start = sorted((entry, first, 1.0))[1] if entry > 0 else 0.0
    if start == entry or 1 / USUAL <= entry <= USUAL:
        return entry, "at the entry"
    return start, f"at {where(blocks[0])}" if start == first else f"(the entry, {entry:.3g}, has units of its own)"


def comparable(signal: SignalPropagation) -> list[BlockSignal]:
    """The points whose numbers compare with the entry's: not those behind a global pool or of class tokens.

    A mean over all positions cuts the variance by their number, and tells nothing of how the signal fares.
    """
    found, pooled = list[BlockSignal](), _positions(signal.entry) > 1
    for block in signal.blocks:
        is_map = _positions(block) > 1
        pooled = pooled or is_map  # from here on, what has one position
        if is_map or not pooled:
            found.append(block)
    return found


def _positions(point: Entry | BlockSignal) -> int:
    return prod(point.shape) // (point.shape[0] * point.shape[point.channel_axis])


def where(block: BlockSignal) -> str:
    """How a message names a block."""
    return f"block {block.index} ({block.name or 'the model itself'})"
