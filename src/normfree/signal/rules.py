"""The rules behind the findings.

Each rule is a function of the whole measurement. The thresholds stand above it with their reason; they
separate the networks that train from those that do not in the plots of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, takewhile
from math import isfinite, prod
from statistics import median

from normfree.signal.comparable import beginning, comparable, where
from normfree.signal.propagation import BlockSignal, Entry, Finding, SignalPropagation

# BatchNorm before the branch grows the variance linearly, by less than 40 over the 50 blocks of a stage;
# a signal without normalisation doubles per block. A factor of 100 at 1.2 a block is neither luck nor linear.
EXPLODED, GROWTH_PER_BLOCK = 100.0, 1.2

# A few layers can do the same at once. A signal that comes back (a normalizer follows) has not exploded; one that
# ends at ten thousand times the variance has outputs a hundred times as large, at a million times, a thousand.
BURST, FAR_BURST = 1e4, 1e6


def _explosion(signal: SignalPropagation) -> Iterator[Finding]:
    blocks = [b for b in comparable(signal) if isfinite(b.avg_channel_var)]
    start, at = beginning(signal, blocks)
    asleep = all(block.woken for block in signal.blocks)  # it starts as its shortcuts, which do not explode
    over = next((b for b in blocks if start > 0 and b.avg_channel_var > EXPLODED * start), None)
    growth = _growth_per_block(blocks)
    burst = list(takewhile(lambda b: b.avg_channel_var > BURST * start > 0, reversed(blocks)))
    if over is not None and growth >= GROWTH_PER_BLOCK:
        how, severe = f"grows {growth:.2f} times per block", True
    elif burst:
        over, how = burst[-1], "grows in a few steps"
        severe = any(b.avg_channel_var > FAR_BURST * start for b in burst)
    else:
        return
    peak = max(blocks, key=lambda b: b.avg_channel_var)
    yield Finding(
        kind="explosion",
        severity="error" if severe and not asleep else "warning",
        block=over.index,
        message=(
            f"the variance {how}: from {start:.3g} {at} past {over.avg_channel_var:.3g} at {where(over)}"
            + ("." if peak is over else f" to {peak.avg_channel_var:.3g} at {where(peak)}.")
        ),
        remedy=(
            "Make each branch variance preserving and scale it before the addition: x + α·f(x/β) with scaled weight "
            "standardization and β from the variance plan"
            + ("; the zero gains hide it only until they have been trained." if asleep else ", or start them at zero.")
        ),
    )


# The gradient fades with the signal: at a thousandth of the variance an update of the early layers is noise.
# A signal that comes back (a normalizer follows) has not faded.
FADED, WEAK = 1e-3, 1e-2


def _attenuation(signal: SignalPropagation) -> Iterator[Finding]:
    blocks = [b for b in comparable(signal) if isfinite(b.avg_channel_var)]
    start, at = beginning(signal, blocks)
    weak = list(takewhile(lambda b: b.avg_channel_var < WEAK * start, reversed(blocks)))
    if not weak:
        return
    under, low = weak[-1], min(weak, key=lambda b: b.avg_channel_var)
    faded = low.avg_channel_var < FADED * start
    yield Finding(
        kind="attenuation",
        severity="error" if faded else "warning",
        block=under.index,
        message=(
            f"the variance falls from {start:.3g} {at} below {under.avg_channel_var:.3g} at {where(under)}"
            + ("." if low is under else f", down to {low.avg_channel_var:.3g} at {where(low)}.")
        ),
        remedy=(
            "Raise the gain of the weights to 1/sqrt(E[act(z)²]) (He initialisation for ReLU), or use scaled weight "
            "standardization with the γ of the activation; average pools in shortcuts cut white noise but not images."
        ),
    )


# Pre-activation BatchNorm networks hold a squared mean of about half the variance (1/π against 1 − 1/π); above
# the variance itself the network mostly tells that there is an input. At 99 times, inputs have a similarity of
# 0.99 (see COLLAPSED). FixUp starts at up to six, and trains, for its branches are silent; where they are not, an
# offset feeds itself through them: with plain weights in place of standardized ones their variance grows
# eightfold over 16 blocks, so that the median of the later half is 2.5 times that of the first, and it stays
# within a quarter of it in NF-ResNets. Between layers an offset is only worth a note: the normalizer that
# follows may remove it.
SHIFTED, LOST, FED = 1.0, 99.0, 2.0


def _mean_shift(signal: SignalPropagation) -> Iterator[Finding]:
    inherited = _ratio(signal.entry)  # identity shortcuts carry on the offset a max-pool or the image has
    rated: list[tuple[float, BlockSignal]] = []
    over: BlockSignal | None = None
    for block in comparable(signal):
        if block.transition:
            inherited = 0.0
        if not _positive(block):
            continue
        rated.append((_ratio(block), block))
        if over is None and _ratio(block) > max(SHIFTED, 1.5 * inherited):
            over = block
    if over is None:
        return
    ratio, worst = max(rated, key=lambda pair: pair[0])
    severity = "error" if ratio > LOST or _branch_growth(signal) > FED else "warning"
    yield Finding(
        kind="mean_shift",
        severity=severity if worst.kind == "residual" else "info",
        block=over.index,
        message=(
            f"the squared channel mean overtakes the variance at {where(over)} and reaches {ratio:.3g} times it at "
            f"{where(worst)}: channels carry an offset that is the same for all inputs."
        ),
        remedy=(
            "Standardize the weights, so that each filter sums to zero and the positive mean of the activation cannot "
            "turn into an offset (convolutions: ScaledWSConv2d), or normalize after the activation."
        ),
    )


# Zero padding alone takes a 3×3 convolution on a 4×4 map to 0.69, on 2×2 to 0.44; a factor of four is no padding.
BRANCH_FACTOR = 4.0


def _branch_variance(signal: SignalPropagation) -> Iterator[Finding]:
    rated = [(b.residual_avg_channel_var, b) for b in signal.blocks if b.residual_avg_channel_var]
    off = [(v, b) for v, b in rated if isfinite(v) and not 1 / BRANCH_FACTOR <= v <= BRANCH_FACTOR]
    if not off:
        return
    value, worst = max(off, key=lambda pair: max(pair[0], 1 / pair[0]))
    first = off[0][1]
    yield Finding(
        kind="branch_variance",
        severity="warning" if any(v > 1 for v, _ in off) else "info",
        block=first.index,
        message=(
            f"{len(off)} of {len(rated)} branches are not variance preserving (outside 1/{BRANCH_FACTOR:g} to "
            f"{BRANCH_FACTOR:g}), first {where(first)}; furthest is {where(worst)} at {value:.3g}."
        ),
        remedy=(
            "Feed the branch a signal of unit variance (divide by β) and use the gain γ of its activations; a branch "
            "that is small on purpose (small initialisation, layer scale) may stay."
        ),
    )


def _silenced_branch(signal: SignalPropagation) -> Iterator[Finding]:
    woken = [b for b in signal.blocks if b.woken]
    if woken:
        names = sorted({name for b in woken for name in b.woken})
        yield Finding(
            kind="silenced_branch",
            severity="info",
            block=woken[0].index,
            message=(
                f"{len(woken)} of {len(signal.blocks)} branches are silenced at initialisation by a zero gain "
                f"({_some(names)}); they were measured with the gain at one."
            ),
            remedy="Nothing, if intended: the network starts as its shortcuts. wake=False draws it as it is.",
        )
    silent = [b for b in signal.blocks if b.kind == "residual" and b.residual_avg_channel_var in (0.0, None)]
    if silent:
        yield Finding(
            kind="silenced_branch",
            severity="warning",
            block=silent[0].index,
            message=(
                f"{len(silent)} of {len(signal.blocks)} branches give nothing, first {where(silent[0])}: "
                "a zero weight or gain leaves only the shortcut, and the plot says nothing about the branch."
            ),
            remedy="Give the last layer of the branch its training initialisation, unless a zero start is meant.",
        )


# One dead channel in a hundred costs nothing; a tenth is capacity gone from the start.
DEAD, MANY_DEAD = 0.01, 0.1


def _dead_channels(signal: SignalPropagation) -> Iterator[Finding]:
    dead = [b for b in comparable(signal) if b.dead_channels > DEAD]  # a class token starts the same for all
    if not dead:
        return
    worst = max(dead, key=lambda b: b.dead_channels)
    yield Finding(
        kind="dead_channels",
        severity="error" if worst.dead_channels == 1 else "warning" if worst.dead_channels > MANY_DEAD else "info",
        block=dead[0].index,
        message=(
            f"channels are constant whatever the input at {len(dead)} of {len(signal.blocks)} points, first "
            f"{where(dead[0])}; {worst.dead_channels:.0%} of them at {where(worst)}."
        ),
        remedy="Look for zero filters, saturated or clipped activations, biases far below zero, and padded channels.",
    )


# Different examples that have become one direction cannot be told apart by what follows; what was alike to
# begin with is not the network's doing.
COLLAPSED, STILL_APART = 0.99, 0.9

# Of one feature the cosine is the sign.
FEW_FEATURES = 4


def _correlation_collapse(signal: SignalPropagation) -> Iterator[Finding]:
    start = signal.entry.input_correlation
    many = [b for b in comparable(signal) if prod(b.shape[1:]) >= FEW_FEATURES]
    rated = [(b.input_correlation, b) for b in many if b.input_correlation is not None]
    over = next((b for c, b in rated if c > COLLAPSED), None)
    if start is None or over is None or start > STILL_APART:
        return
    value, _ = max(rated, key=lambda pair: pair[0])
    yield Finding(
        kind="correlation_collapse",
        severity="error",
        block=over.index,
        message=(
            f"different inputs become alike: the mean cosine similarity of their features rises from {start:.3f} at "
            f"the entry past {COLLAPSED} at {where(over)} (highest {value:.4f})."
        ),
        remedy=(
            "Remove the mean shift (standardize the weights), strengthen the shortcut against the branch (α), or use "
            "an activation closer to linear."
        ),
    )


RULES: Sequence[Callable[[SignalPropagation], Iterator[Finding]]] = (
    _explosion,
    _attenuation,
    _mean_shift,
    _branch_variance,
    _silenced_branch,
    _dead_channels,
    _correlation_collapse,
)


def _growth_per_block(blocks: Sequence[BlockSignal]) -> float:
    """Median ratio of the variance from one block to the next, where the shortcut is the identity."""
    ratios = [
        after.avg_channel_var / before.avg_channel_var
        for before, after in pairwise(blocks)
        if before.avg_channel_var > 0 and not after.transition
    ]
    return median(ratios) if ratios else 1.0


def _branch_growth(signal: SignalPropagation) -> float:
    """Median branch variance of the later half of the blocks over that of the first."""
    branches = [b.residual_avg_channel_var for b in signal.blocks if b.residual_avg_channel_var]
    half = len(branches) // 2
    return median(branches[half:]) / median(branches[:half]) if half else 1.0


def _ratio(point: Entry | BlockSignal) -> float:
    """Squared channel mean over variance."""
    return point.avg_channel_sq_mean / point.avg_channel_var if point.avg_channel_var > 0 else 0.0


def _positive(block: BlockSignal) -> bool:
    return isfinite(block.avg_channel_var) and isfinite(block.avg_channel_sq_mean) and block.avg_channel_var > 0


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:2])
    return shown if len(names) <= 2 else f"{shown} and {len(names) - 2} more"
