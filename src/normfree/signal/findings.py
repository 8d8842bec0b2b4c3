"""What the numbers of a plot mean, in plain words: what is wrong, where it shows, what to do.

Each rule is a function of the whole measurement, with its thresholds above it and the reason for each: they separate
the networks that train from those that do not in the plots of the paper. The rules on gradients are in
:mod:`normfree.signal.gradients`.
Variances are compared along *stretches* of the signal (:mod:`normfree.signal.stretches`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise, takewhile
from math import isfinite, prod, sqrt
from statistics import median

from normfree.signal import remedies
from normfree.signal.architecture import Architecture
from normfree.signal.gradients import gradient_cut_off, gradient_explosion, gradient_vanishing
from normfree.signal.propagation import (
    BESIDE,
    SEVERITIES,
    BlockSignal,
    Entry,
    Finding,
    NonFinite,
    Severity,
    SignalPropagation,
    module_title,
)
from normfree.signal.remedies import DOCS, FILL, RESET
from normfree.signal.stretches import (
    STILL_APART,
    Stretch,
    all_points,
    chains,
    comparable,
    likeness,
    stretches,
)


def findings_of(
    signal: SignalPropagation, non_finite: NonFinite | None = None, made_of: Architecture | None = None
) -> tuple[Finding, ...]:
    """Everything worth saying about a measurement, the most serious first.

    Args:
        signal: the measurement.
        non_finite: the first operation that made a non-finite value, if one did.
        made_of: of what the model is made; one that conversion takes, by default.

    Returns:
        Findings, ordered by severity.
    """
    everywhere = stretches(signal)
    along = _with_variance(signal, everywhere)
    if made_of is None:
        made_of = Architecture(residual=sum(block.kind == "residual" for block in signal.blocks))
    size = [*_explosion(signal, along, made_of), *_attenuation(along, made_of)]
    found = [
        *_non_finite(signal, non_finite, made_of),
        *_uneven_inputs(made_of),  # first: all else is to be measured on data that are standardized
        *size,
        *_mean_shift(signal, along, made_of),
        *_branch_variance(signal, made_of),
        *_outweighed_branches(signal, made_of),
        *_silenced_branch(signal),
        *_dead_channels(signal, along, made_of),
        *_dead_output(signal, made_of),
        *_zero_layer(signal),
        *_single_value(signal, everywhere),
        *_variance_plan(signal),
        *_softmax_output(made_of),
        *_correlation_collapse(along, made_of),
        *gradient_explosion(signal, made_of, size),
        *gradient_vanishing(signal, made_of, size, chains(signal)),
        *gradient_cut_off(signal, chains(signal)),
    ]
    if _starts_as_shortcuts(signal):
        found = [replace(each, severity="warning") if _is_of_branches(each, signal) else each for each in found]
    found = [replace(finding, docs=f"{DOCS}#{finding.kind}") for finding in found]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def has_variance(signal: SignalPropagation, point: Entry | BlockSignal) -> bool:
    """Whether a point has a variance: over one value per channel there is none, whatever the signal does."""
    return point.values > 1 or signal.input.get("batches", 1) > 1


def _with_variance(signal: SignalPropagation, along: Sequence[Stretch]) -> list[Stretch]:
    """The stretches without the points that have no variance, which no rule on the size of the signal may read."""
    found = [replace(each, points=tuple(p for p in each.points if has_variance(signal, p))) for each in along]
    return [each for each in found if each.points]


# What only branches bring into a residual stream: a network whose branches are all silent starts without it.
OF_BRANCHES = ("explosion", "mean_shift", "correlation_collapse", "gradient_explosion")


def _starts_as_shortcuts(signal: SignalPropagation) -> bool:
    """Whether every branch has a gain of zero at initialisation, and was measured with it at one."""
    return bool(signal.blocks) and all(block.woken for block in signal.blocks)


def _is_of_branches(finding: Finding, signal: SignalPropagation) -> bool:
    """Whether an error would not be there without what the branches add."""
    if finding.severity != "error" or finding.kind not in OF_BRANCHES or finding.block is None:
        return False
    return signal.blocks[finding.block].kind == "residual"


def _non_finite(signal: SignalPropagation, found: NonFinite | None, made_of: Architecture) -> Iterator[Finding]:
    block = next((b for b in signal.blocks if not isfinite(b.avg_channel_var)), None)
    if block is None and found is None:
        return
    where = f"first seen at {block.place}" if block is not None else f"after the last {signal.blocks[-1].unit}"
    origin = ""
    if found is not None:
        where_from = f"module {found.module}" if found.module else module_title("")
        origin = (
            f" They begin in {found.operation} of {where_from}: {found.count} of "
            f"{found.total} results, from inputs of magnitude up to {found.largest:.3g}."
        )
    remedy = remedies.non_finite(made_of, found, residual=block is not None and block.kind == "residual")
    yield Finding(
        kind="non_finite",
        severity="error",
        block=None if block is None else block.index,
        message=f"values stop being finite, {where}.{origin}",
        remedy=remedy.text,
        code=remedy.code,
    )


# BatchNorm before the branch grows the variance linearly, by less than 40 over the 50 blocks of a stage;
# a signal without normalisation doubles per block. A factor of 100 at 1.2 a block is neither luck nor linear.
EXPLODED, GROWTH_PER_BLOCK = 100.0, 1.2

# Two layers may be tuned to each other (a wide one after a narrow one); three that all grow are a habit.
FEWEST_LAYERS = 3

# A few layers can do the same at once. A signal that comes back (a normalizer follows) has not exploded; one that
# ends at ten thousand times the variance has outputs a hundred times as large, at a million times, a thousand. What
# the model returns may have units of its own (boxes in pixels of a large image: 1e5), and the latter decides.
# Growth that a normalizer takes back before the signal ends leaves the early blocks a share of the last sum: 1 % of its
# deviation at ten thousand times the variance (CoaT, which trains), 0.1 % at FAR_BURST, where it is an error.
BURST, FAR_BURST = 1e4, 1e6


def _explosion(signal: SignalPropagation, along: Sequence[Stretch], made_of: Architecture) -> Iterator[Finding]:
    found = [each for stretch in along for each in (_growth(stretch), _burst(stretch)) if each]
    found += [each for output in signal.outputs if (each := _output_burst(signal, output))]
    if not found:
        return
    worst = min(found, key=lambda each: (not each.severe, -each.ratio))
    peak = "" if worst.peak is worst.over else f" to {worst.peak.avg_channel_var:.3g} at {worst.peak.place}"
    remedy = remedies.explosion(made_of, residual=worst.over.kind == "residual", silenced=_starts_as_shortcuts(signal))
    yield Finding(
        kind="explosion",
        severity="error" if worst.severe else "warning",
        block=worst.over.index_on_plot,
        message=(
            f"the variance {worst.how}: from {worst.start:.3g} {worst.at} past {worst.over.avg_channel_var:.3g} at "
            f"{worst.over.place}{peak}.{worst.cause}"
        ),
        remedy=remedy.text,
        code=remedy.code,
    )


@dataclass(frozen=True)
class _Change:
    """A change of the variance along a stretch: how, from what, where it is first too much, and where it is most."""

    how: str
    start: float
    at: str
    over: BlockSignal
    peak: BlockSignal
    severe: bool
    cause: str

    @property
    def ratio(self) -> float:
        return self.peak.avg_channel_var / self.start


def _growth(stretch: Stretch) -> _Change | None:
    """Steady growth over a whole stretch, or over its blocks or its layers alone."""
    points = [p for p in stretch.points if isfinite(p.avg_channel_var) and not p.last]
    runs = [list(run) for _, run in groupby(points, key=lambda point: point.kind)]
    starts = list(accumulate(map(len, runs), initial=0))
    whole = [(0, points)] if len(runs) > 1 else []
    for first, run in [*whole, *zip(starts, runs, strict=False)]:  # there is one start more, the end
        before = points[first - 1] if first else None
        base = max(stretch.start, before.avg_channel_var) if before else stretch.start
        over = next((p for p in run if p.avg_channel_var > EXPLODED * base > 0), None)
        rising = run if before is None or run[0].kind == "residual" else [before, *run]
        growth = _growth_per_block(rising)
        mixed = any(point.kind != run[0].kind for point in run)
        fewest = 2 * FEWEST_LAYERS if mixed else 0 if run[0].kind == "residual" else FEWEST_LAYERS
        enough = len(rising) > fewest
        if over is not None and enough and growth >= GROWTH_PER_BLOCK:
            at = stretch.at if before is None else f"at {before.place}"
            unit = "block" if over.kind == "residual" else "layer"
            peak = max(run, key=_variance)
            severe = stretch.ends or peak.avg_channel_var > FAR_BURST * base
            how = f"grows {growth:.3g} times per {unit}"
            return _Change(how, base, at, over, peak, severe, _cause(stretch, over, 1))
    return None


def _burst(stretch: Stretch) -> _Change | None:
    """A stretch that ends far above its start, however it got there."""
    if not stretch.ends or stretch.start <= 0:
        return None
    points = [p for p in stretch.points if isfinite(p.avg_channel_var) and not p.renewed]
    inner = [p for p in points if not p.last]  # a small head is no normalizer: what is before it counts
    ended_low = next((i for i in range(len(inner), 0, -1) if inner[i - 1].avg_channel_var <= BURST * stretch.start), 0)
    at_the_end = {id(p) for p in inner[ended_low:]}
    high = [p for p in points if p.avg_channel_var > BURST * stretch.start and (p.last or id(p) in at_the_end)]
    if not high:
        return None
    peak = max(high, key=_variance)
    severe = peak.avg_channel_var > FAR_BURST * stretch.start
    cause = _cause(stretch, high[0], 1, jump=True)
    return _Change("grows in a few steps", stretch.start, stretch.at, high[0], peak, severe, cause)


def _output_burst(signal: SignalPropagation, output: BlockSignal) -> _Change | None:
    start = max(signal.entry.avg_channel_var, 1.0)
    if not isfinite(output.avg_channel_var) or output.avg_channel_var <= FAR_BURST * start:
        return None
    at = "at the entry" if start == signal.entry.avg_channel_var else "(unit variance)"
    return _Change("of what the model returns is large", start, at, output, output, True, "")


# The gradient fades with the signal. At a hundredth of the variance layers learn slower than the rest, and gradient
# descent needs a rate of its own; Adam divides it out, as long as what is left stands above the biases: chains at
# PyTorch's default, which loses a factor of six per layer, learn from 10⁻⁷ (10 layers of ReLU, 5 of sigmoids) and not
# from 10⁻⁹ (6 of sigmoids, 16 of tanh); see results/verdicts/CALIBRATION.md. A signal that comes back (a normalizer
# follows) has not faded. Beside blocks there are heads that are small on purpose: the four layers of RetinaNet's, with
# weights of 0.01, end at 3.5e-4, and train.
FADED, WEAK, WEAK_LAYERS = 1e-8, 1e-2, 1e-3


def _attenuation(along: Sequence[Stretch], made_of: Architecture) -> Iterator[Finding]:
    found = _fadings(along)
    if not found:
        return
    worst = min(found, key=lambda each: (not each.severe, each.ratio))
    low = "" if worst.peak is worst.over else f", down to {worst.peak.avg_channel_var:.3g} at {worst.peak.place}"
    averaged = any(point.averaged for stretch in along for point in stretch.points if point.kind == "residual")
    remedy = remedies.attenuation(made_of, residual=worst.over.kind == "residual", averaged=averaged)
    yield Finding(
        kind="attenuation",
        severity="error" if worst.severe else "warning",
        block=worst.over.index_on_plot,
        message=(
            f"the variance falls from {worst.start:.3g} {worst.at} below {worst.over.avg_channel_var:.3g} at "
            f"{worst.over.place}{low}.{worst.cause}"
        ),
        remedy=remedy.text,
        code=remedy.code,
    )


def _fadings(along: Sequence[Stretch]) -> list[_Change]:
    return [each for stretch in along for part in _split_at_mixing(stretch) if (each := _fading(part))]


def _split_at_mixing(stretch: Stretch) -> Iterator[Stretch]:
    """A stretch cut where a layer reads it beside another signal: that one, coming back, brings nothing else back."""
    points = list[BlockSignal]()
    for point in stretch.points:
        if point.mixed and point.kind == "layer" and points:
            yield replace(stretch, points=tuple(points), ends=not points[-1].renewed)
            points = []
        points.append(point)
    yield replace(stretch, points=tuple(points))


def _fading(stretch: Stretch) -> _Change | None:
    """A stretch that ends far below its start; a head may be as small as it likes, and a zero layer is a choice."""
    points = [p for p in stretch.points if isfinite(p.avg_channel_var) and not p.last and p.weight_gain != 0]
    if not stretch.ends or not points:
        return None

    def is_weak(point: BlockSignal) -> bool:
        return point.avg_channel_var < (WEAK_LAYERS if point.index == BESIDE else WEAK) * stretch.start

    low = list(takewhile(lambda p: p.avg_channel_var < WEAK * stretch.start, reversed(points)))
    low = low[: max((i + 1 for i, p in enumerate(low) if is_weak(p)), default=0)]
    if not low:
        return None
    under, least = low[-1], min(low, key=_variance)
    severe = least.avg_channel_var < FADED * stretch.start
    return _Change("falls", stretch.start, stretch.at, under, least, severe, _cause(stretch, under, -1))


# A step smaller than this is part of no rise or fall.
STEP = 1.1

# Drawn by He's initialisation, the gain of a layer of a hundred weights per unit or more is within 5 % of it.
OFF_GAIN = 1.1


def _is_off(point: BlockSignal, sign: int) -> bool:
    """Whether a layer's weights are off He's gain in the direction of a rise (or fall)."""
    return bool(point.weight_gain) and ((point.weight_gain or 0.0) / sqrt(2)) ** sign > OFF_GAIN


def _cause(stretch: Stretch, point: BlockSignal, sign: int, *, jump: bool = False) -> str:
    """Where the rise (or fall) that leads to a point takes its first step (or its largest), and what that is."""
    points = list(stretch.points)
    at = points.index(point)

    def ratio(i: int) -> float:
        before = points[i - 1].avg_channel_var if i else stretch.start
        return (points[i].avg_channel_var / before) ** sign if before > 0 < points[i].avg_channel_var else 0.0

    if jump:
        at = max(range(at + 1), key=ratio)
    while not jump and at and points[at - 1].kind == point.kind and ratio(at - 1) >= STEP:
        at -= 1
    if not jump:  # of the steps of the rise, the first that its weights explain
        end = points.index(point) + 1
        at = next((i for i in range(at, end) if _is_off(points[i], sign)), at)
    step, before = points[at], points[at - 1].avg_channel_var if at else stretch.start
    gain = None if step.weight_gain is None else step.weight_gain / sqrt(2)
    if step.kind == "residual" and sign > 0:
        what = f"a branch that adds {max(step.avg_channel_var - before, 0):.3g} to {before:.3g}"
    elif step.averaged and sign < 0:
        what = "an average pool, which cuts what differs from position to position"
    elif gain is not None and _is_off(step, sign):
        what = f"a layer whose weights have {gain:.3g} times He's gain"
    elif step.kind == "residual":
        what = "a shortcut that is scaled down, or a branch that takes away what the shortcut carries"
    else:
        what = "a layer and what acts before it"
    rank, after = "largest" if jump else "first", step.avg_channel_var
    return f" The {rank} step is {step.place}: {what} (from {before:.3g} to {after:.3g})."


# Pre-activation BatchNorm networks hold a squared mean of about half the variance (1/π against 1 − 1/π); above
# the variance itself the network mostly tells that there is an input. At 99 times, inputs have a similarity of
# 0.99 (see COLLAPSED). FixUp starts at up to six, and trains, for its branches are silent; where they are not, an
# offset feeds itself through them: with plain weights in place of standardized ones the branch variance of 24 blocks
# of one stage triples from their first quarter to their last, and it stays within a quarter of it in NF-ResNets. Only
# like blocks compare: of one shape, after identity shortcuts, two in each quarter at least; a transition, or another
# resolution, has a variance of its own. Between layers an offset is only worth a note: the normalizer that follows may
# remove it.
SHIFTED, LOST, FED, FEWEST_ALIKE = 1.0, 99.0, 2.0, 8


def _mean_shift(signal: SignalPropagation, along: Sequence[Stretch], made_of: Architecture) -> Iterator[Finding]:
    inherited = _offset(signal, signal.entry)  # identity shortcuts carry on the offset a max-pool or the image has
    rated: list[tuple[float, BlockSignal]] = []
    over: BlockSignal | None = None
    for block in comparable(signal):
        if block.entry is not None and block.entry < len(signal.entries):
            inherited = _offset(signal, signal.entries[block.entry])
        if block.transition:
            inherited = 0.0
        if not _is_measurable(block) or not has_variance(signal, block) or block.smaller_term:
            continue
        rated.append((_offset(signal, block), block))
        if over is None and rated[-1][0] > max(SHIFTED, 1.5 * inherited):
            over = block
    if over is None:
        return
    offset, worst = max(rated, key=lambda pair: pair[0])
    ratio = worst.avg_channel_sq_mean / worst.avg_channel_var
    # A normalizer at the end takes the offset back together with the scale.
    kept = any(stretch.ends and any(p is worst for p in stretch.points) for stretch in along)
    remedy = remedies.mean_shift(made_of, residual=worst.kind == "residual", last=worst.last)
    reaches = f"there {ratio:.3g} times it" if worst is over else f"{ratio:.3g} times it at {worst.place}"
    severity = "error" if offset > LOST or (kept and _branch_growth(signal) > FED) else "warning"
    yield Finding(
        kind="mean_shift",
        severity=severity if worst.kind == "residual" else "info",
        block=over.index,
        message=(
            f"the squared channel mean overtakes the variance at {over.place} and reaches {reaches}: channels carry "
            "an offset that is the same for all inputs."
        ),
        remedy=remedy.text,
        code=remedy.code,
    )


# Zero padding alone takes a 3×3 convolution on a 4×4 map to 0.69, on 2×2 to 0.44; a factor of four is no padding.
BRANCH_FACTOR = 4.0


def _branch_variance(signal: SignalPropagation, made_of: Architecture) -> Iterator[Finding]:
    # What is added alike at all positions is a mean over them, whose variance is cut by their number.
    blocks = [b for b in signal.blocks if not b.broadcast and has_variance(signal, b)]
    rated = [(b.residual_avg_channel_var, b) for b in blocks if b.residual_avg_channel_var]
    off = [(v, b) for v, b in rated if isfinite(v) and not 1 / BRANCH_FACTOR <= v <= BRANCH_FACTOR]
    if not off:
        return
    value, worst = max(off, key=lambda pair: max(pair[0], 1 / pair[0]))
    first, large = off[0][1], any(v > 1 for v, _ in off)
    furthest = f"at {value:.3g}" if worst is first else f"furthest is {worst.place} at {value:.3g}"
    remedy = remedies.branch_variance(made_of, small_alone=not large)
    yield Finding(
        kind="branch_variance",
        severity="warning" if large else "info",
        block=first.index,
        message=(
            f"{len(off)} of {len(rated)} branches are not variance preserving (outside 1/{BRANCH_FACTOR:g} to "
            f"{BRANCH_FACTOR:g}), first {first.place}{',' if worst is first else ';'} {furthest}."
        ),
        remedy=remedy.text,
        code=remedy.code,
    )


# A stream of pixels of 0 to 255 has a variance of thousands, and keeps its branches of unit variance out: together they
# are less than a hundredth of it, a tenth of its deviation, whatever factor below one they have. In networks that train
# they are more than the stream by the last block, or a tenth of it for each block where it has grown by fifty of them.
# A stream that changes by STEP beside them is changed by a factor above one.
OUTWEIGHED = 0.01


def _outweighed_branches(signal: SignalPropagation, made_of: Architecture) -> Iterator[Finding]:
    """Branches of a usual variance, all of which together are next to nothing beside the stream they are added to."""
    rated = [(b.residual_avg_channel_var, b) for b in signal.blocks if b.kind == "residual" and not b.broadcast]
    rated = [(v, b) for v, b in rated if v and isfinite(v) and _is_measurable(b) and has_variance(signal, b)]
    if not rated or median(v for v, _ in rated) < 1 / BRANCH_FACTOR:  # of small ones the rule above tells
        return
    share = sum(v / b.avg_channel_var for v, b in rated)
    if share >= OUTWEIGHED or any(_changes(before, after) for before, after in _along_identity(signal)):
        return
    value, first = rated[0]
    remedy = remedies.outweighed_branches(made_of)
    yield Finding(
        kind="branch_variance",
        severity="warning",
        block=first.index,
        message=(
            f"branches add next to nothing to their stream: before any factor, the variances of all {len(rated)} are "
            f"{share:.2g} of it together, first {first.place}, with {value:.3g} beside {first.avg_channel_var:.3g}."
        ),
        remedy=remedy.text,
        code=remedy.code,
    )


def _along_identity(signal: SignalPropagation) -> Iterator[tuple[Entry | BlockSignal, BlockSignal]]:
    """Each point after an identity shortcut, and what comes before it."""
    before = [signal.entry, *signal.blocks]
    pairs = ((a, b) for a, b in zip(before, signal.blocks, strict=False) if not b.transition)
    return ((a, b) for a, b in pairs if has_variance(signal, a) and has_variance(signal, b))


def _changes(before: Entry | BlockSignal, after: BlockSignal) -> bool:
    return not 1 / STEP <= after.avg_channel_var / max(before.avg_channel_var, 1e-300) <= STEP


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
            remedy="Nothing, if intended: it starts as its shortcuts. wake=False (--no-wake) draws it as it is.",
            code=remedies.wake(names),
        )
    blocks = [b for b in signal.blocks if b.kind == "residual" and not b.broadcast]
    silent = [b for b in blocks if b.residual_avg_channel_var in (0.0, None) and b.avg_channel_var > 0]
    told = "the plot says nothing about the branch"
    causes: tuple[tuple[list[BlockSignal], Severity, str, str, str], ...] = (
        (
            [b for b in silent if b.zero_gate],
            "info",
            "silenced at initialisation by a gate that a layer with weights of zero computes",
            "Nothing, if intended (adaLN-zero): the network starts as its shortcuts.",
            FILL,
        ),
        (
            [b for b in silent if not b.zero_gate and b.residual_avg_channel_var is None],
            "warning",
            "multiplied by zero",
            "Measure with wake=True, which sets gains that can be trained to one meanwhile; a constant factor of zero "
            "takes the branch out for good.",
            "plot = normfree.spp(model, batch, wake=True)",
        ),
        (
            [b for b in silent if not b.zero_gate and b.residual_avg_channel_var == 0 and has_variance(signal, b)],
            "warning",
            "zero for their weights are",
            "Give the last layer of the branch its training initialisation, unless a zero start is meant.",
            FILL,
        ),
    )
    for found, severity, what, remedy, code in causes:
        if found:
            yield Finding(
                kind="silenced_branch",
                severity=severity,
                block=found[0].index,
                message=f"{len(found)} of {len(signal.blocks)} branches are {what}, first {found[0].place}; {told}.",
                remedy=remedy,
                code=code,
            )


# One dead channel in a hundred costs nothing; a tenth is capacity gone from the start.
FEW_DEAD, MANY_DEAD = 0.01, 0.1

RECTIFIERS = {"ReLU", "ReLU6", "hard tanh"}
"""Activations whose gradient is zero where their input is (torch runs ReLU6 as a hard tanh from 0 to 6): what is behind
a layer of zeros stays dead."""


def _dead_channels(signal: SignalPropagation, along: Sequence[Stretch], made_of: Architecture) -> Iterator[Finding]:
    """Channels that no input moves; of what a table gives none is, for each of its rows learns, whatever it is."""
    points = [*comparable(signal), *_inner_layers(along)]  # a class token starts the same for all
    points = [p for p in points if not p.looked_up]
    dead = [p for p in points if p.dead_channels > FEW_DEAD and p.weight_gain != 0]
    if not dead:
        return
    worst = max(dead, key=lambda b: b.dead_channels)
    fades = bool(_fadings(along))
    remedy = remedies.dead_channels(made_of, fades=fades, residual=worst.kind == "residual")
    zero = next((p for p in _giving_the_same(signal) if worst.after is not None and p.number == worst.after), None)
    severity: Severity = (
        "error" if worst.dead_channels == 1 else "warning" if worst.dead_channels > MANY_DEAD else "info"
    )
    cause = ""
    if zero is not None:
        told = "weights are all zero" if zero.weight_gain == 0 else "rows are all the same"
        cause = f" What it reads is {zero.place}, whose {told}."
        reached = worst if worst.kind == "residual" and zero.avg_sq_gradient is None else zero
        bent = made_of.activations and not RECTIFIERS.intersection(made_of.activations)
        if bent or reached.avg_sq_gradient:
            why = "no ReLU takes their gradient at zero" if bent else "a gradient reaches them"
            severity, cause = "info", f"{cause} They move with the first step: {why}."
            remedy = remedies.Remedy(
                "Nothing, if the zero start is intended.", FILL if zero.weight_gain == 0 else RESET
            )
        elif zero.looked_up and reached.avg_sq_gradient is None:
            severity = "warning"
    where = "there" if worst is dead[0] else f"at {worst.place}"
    yield Finding(
        kind="dead_channels",
        severity=severity,
        block=dead[0].index_on_plot,
        message=(
            f"channels are constant whatever the input at {len(dead)} of {len(points)} points, first "
            f"{dead[0].place}; {worst.dead_channels:.0%} of them {where}.{cause}"
        ),
        remedy=remedy.text,
        code=remedy.code,
    )


def _dead_output(signal: SignalPropagation, made_of: Architecture) -> Iterator[Finding]:
    """An output that is the same for every input, and of which no gradient arrives anywhere (a last ReLU at zero)."""
    gradients = [block.avg_sq_gradient for block in signal.blocks]
    if 0 not in gradients or any(gradients) or any(output.dead_channels < 1 for output in signal.outputs):
        return
    activation = f"its last {made_of.last_activation}" if made_of.last_activation else "what acts on it last"
    remedy = remedies.dead_output(made_of)
    yield Finding(
        kind="dead_channels",
        severity="error",
        block=None,
        message=(
            f"the model's output is the same for every input, and no gradient of it reaches any layer: {activation} is "
            "dead for the whole batch, and the loss does not move."
        ),
        remedy=remedy.text,
        code=remedy.code,
    )


def _giving_the_same(signal: SignalPropagation) -> list[BlockSignal]:
    """The layers that give the same for every input, for their weights are zero, or all rows of their table alike."""
    points = all_points(signal)
    return [p for p in points if p.weight_gain == 0 or (p.looked_up and p.dead_channels == 1)]


def _zero_layer(signal: SignalPropagation) -> Iterator[Finding]:
    """A layer that starts at zero (a flow's, a value head's, a box regression's) is a choice, and no fault."""
    layers = all_points(signal)
    zero = [p for p in layers if p.kind == "layer" and p.weight_gain == 0]
    if zero:
        yield Finding(
            kind="zero_layer",
            severity="info",
            block=zero[0].index_on_plot,
            message=(
                f"{len(zero)} weighted layer{'s start' if len(zero) > 1 else ' starts'} with weights of zero "
                f"({_some([p.title for p in zero])}) and "
                f"give{'' if len(zero) > 1 else 's'} the same for every input."
            ),
            remedy="Nothing, if intended: what is before such a layer gets its first gradient once it has moved.",
            code=FILL,
        )


def _single_value(signal: SignalPropagation, everywhere: Sequence[Stretch]) -> Iterator[Finding]:
    """Over one value per channel (one vector, or one map of one position) every variance is zero, and judges nothing.

    Of a batch of one example it is an error where the rules on growth would have had enough points to judge by, or
    nothing else is left. Where several examples are given, and one row of them came to a point (an expert, the last
    step of the longest sequence), the others are judged; a module that is judged at another of its runs is known.
    """
    if signal.input.get("batches", 1) > 1:
        return
    known = [point for stretch in everywhere for point in stretch.points]
    inner = {id(point): (point, stretch) for stretch in everywhere for point in stretch.points if not point.last}
    tables = {point.number for point in (*signal.blocks, *signal.layers) if point.looked_up}
    blind = [
        point
        for point, stretch in inner.values()
        if point.values == 1
        or (
            (stretch.start == 0 and stretch.entry is not None and stretch.entry.values == 1)
            and stretch.points[0].after not in tables
        )  # a table of one value throughout
    ]
    if not inner:
        blind = [point for point in known if point.values == 1]
    if not blind:
        return
    everything = len(blind) == len(inner or known)
    told = "each channel has one value" if everything else f"each channel has one value at {len(blind)} of {len(inner)}"
    points = "" if everything else f" {blind[0].unit}s, first {blind[0].place}"
    several = (signal.input.get("examples") or signal.entry.shape[0]) > 1 and not everything
    blind_ids = {id(point) for point in blind}
    judged = {_module_of(point) for point, _ in inner.values() if id(point) not in blind_ids}
    severity: Severity = "error" if everything or len(blind) > FEWEST_LAYERS else "warning"
    what = "one vector has no variance, and whether the signal grows or fades is not measured"
    remedy = "Give 2 or more examples; 8 or more tell the variance better."
    if several:
        severity = "info" if all(_module_of(point) in judged for point in blind) else "warning"
        what = "one vector has no variance, and nothing is said of the signal there; all others are judged"
        remedy = "Give a batch of which 2 or more rows come to each of them; 8 or more tell the variance better."
    yield Finding(
        kind="single_value",
        severity=severity,
        block=blind[0].index_on_plot,
        message=f"{told}{points}: {what}.",
        remedy=remedy,
    )


def _module_of(point: BlockSignal) -> str:
    """The module that a point is a run of."""
    return point.name.partition("#")[0]


# Of the networks of this package at initialisation, on noise and on photographs, the variance stays within 0.57 to 1.2
# times the planned; a branch's factor of two that is forgotten, or another α, is soon beyond two. The plan is of an
# input of unit variance, and what the first block is given may have another: as for stretches, the entry's variance,
# the first point's share of the plan or one stands for the start, whichever lies between. An average pool in a shortcut
# cuts white noise and hardly an image, so the comparison begins anew after one. Nor does the plan know of the padding,
# which leaves a 3×3 convolution 0.69 of its taps on a 4×4 map and 0.44 on 2×2: smaller maps than 4×4 are not compared.
PLAN_FACTOR, LEAST_PLANNED = 2.0, 4


def _variance_plan(signal: SignalPropagation) -> Iterator[Finding]:
    """Blocks whose variance is another than the model's plan expects; a branch that is silent has no part in it."""
    sums = (block for block in signal.blocks if block.kind == "residual" and has_variance(signal, block))
    if any(not block.residual_avg_channel_var for block in sums):
        return
    start = 1.0
    off, gains = list[tuple[float, BlockSignal]](), list[float]()
    before: float | None = None
    for block in signal.blocks:
        padded = block.channel_axis == 1 and min(block.shape[2:], default=LEAST_PLANNED) < LEAST_PLANNED
        if not block.expected_var or not _is_measurable(block) or not has_variance(signal, block) or padded:
            before = None
            continue
        share = block.avg_channel_var / block.expected_var
        if block.averaged:
            start = share
        elif before is None:
            entry = signal.entries[block.entry] if block.entry is not None and signal.entries else signal.entry
            start = sorted((entry.avg_channel_var, share, 1.0))[1]
        elif block.residual_avg_channel_var:
            gains.append(block.residual_avg_channel_var / before)
        before = share
        if not 1 / PLAN_FACTOR <= share / start <= PLAN_FACTOR:
            off.append((share / start, block))
    if not off:
        return
    (_, first), (_, worst) = off[0], max(off, key=lambda pair: max(pair[0], 1 / pair[0]))

    def told(block: BlockSignal) -> str:
        variance, expected = block.avg_channel_var, block.expected_var or 1.0
        return f"{variance:.3g} for {expected:.3g} at {block.place} ({variance / expected:.3g} times)"

    furthest = "" if worst is first else f", furthest {told(worst)}"
    yield Finding(
        kind="variance_plan",
        severity="warning",
        block=first.index,
        message=(
            f"the variance leaves the planned by more than a factor of {PLAN_FACTOR:g} at {len(off)} of "
            f"{len(signal.blocks)} {first.unit}s: first {told(first)}{furthest}."
        ),
        remedy=remedies.variance_plan(median(gains) if gains else None),
    )


# Three layers of ReLU on 16 features, of which one is 100 times the others: SGD at the best of five rates leaves more
# than 30 % of the loss, where it leaves less than 5 % with even features; at 10,000 times Adam leaves more than 15 %
# (tests/signal/test_uneven_inputs.py trains them).
UNEVEN, TOO_UNEVEN = 1e2, 1e4


def _uneven_inputs(made_of: Architecture) -> Iterator[Finding]:
    """One channel of an input is far larger than the others: a step that is small enough for it moves no other."""
    for layer, sizes in made_of.inputs:
        if sizes.largest < UNEVEN * sizes.typical:
            continue
        large = [
            index for index, size in sizes.all.items() if size >= UNEVEN * sizes.typical and index != sizes.channel
        ]
        also = f" (and {len(large)} more are as much larger, first {large[0]})" if large else ""
        remedy = remedies.uneven_inputs(sizes.axis)
        yield Finding(
            kind="uneven_inputs",
            severity="error" if sizes.largest >= TOO_UNEVEN * sizes.typical else "warning",
            block=None,
            message=(
                f"layer {module_title(layer)} reads channels of very different sizes: the root mean square of channel "
                f"{sizes.channel} is {sizes.largest:.3g}, the median of {len(sizes.all) - 1} others {sizes.typical:.3g}"
                f"{also}; steps that are small enough for the large ones hardly move what is learned of the others."
            ),
            remedy=remedy.text,
            code=remedy.code,
        )


def _softmax_output(made_of: Architecture) -> Iterator[Finding]:
    if made_of.softmax:
        yield Finding(
            kind="softmax_output",
            severity="info",
            block=None,
            message="the model's output is a softmax: probabilities, and no logits.",
            remedy="Nothing, if the loss takes probabilities; nn.CrossEntropyLoss takes logits: leave the softmax out.",
        )


# Different examples that have become one direction are hard to tell apart by what follows; what was alike to begin
# with is not the network's doing. Six layers of ReLU with biases of 100 are alike to 1e-5, and still learn; eight to
# 3e-6, and do not. Where the signal has faded, it is the biases that are alike, and how far it has decides.
COLLAPSED, LOST_DIFFERENCE = 0.99, 5e-6

# Of one feature the cosine is the sign.
FEW_FEATURES = 4


def _correlation_collapse(along: Sequence[Stretch], made_of: Architecture) -> Iterator[Finding]:
    found = [(start, alike) for stretch in along for start, alike in _find_collapse(stretch)]
    if not found:
        return
    (start, alike), remedy = found[0], remedies.correlation_collapse(made_of)
    collapsed = {point for _, points in found for point in points}
    faded = {point for each in along for point in each.points if point.avg_channel_var < WEAK * each.start}
    closest, closest_unfaded = (
        min((1 - (point.input_correlation or 0.0) for point in points), default=1.0)
        for points in (collapsed, collapsed - faded)
    )
    yield Finding(
        kind="correlation_collapse",
        severity="error" if closest_unfaded < LOST_DIFFERENCE else "warning",
        block=alike[0].index_on_plot,
        message=(
            f"different inputs become alike: the mean cosine similarity of their features rises from {start:.3f} at "
            f"the entry past {COLLAPSED} at {alike[0].place}, to within {max(closest, 0.0):.2g} of 1."
        ),
        remedy=remedy.text,
        code=remedy.code,
    )


def _find_collapse(stretch: Stretch) -> Iterator[tuple[float, list[BlockSignal]]]:
    """The similarity a stretch begins with and the points that are alike, if it makes different examples so.

    A token of a class, or a learned query, starts the same for all: so its stream is not compared, and of layers beside
    blocks a single one that reads it is not. Nor is a small head, which starts as its bias. Nothing has collapsed where
    a normalizer takes off what the examples have in common (a bias above an input of small units), and leaves the rest;
    nor in a layer whose bias alone is what they have in common, be it that its weights are small or zero.
    """
    start = None if stretch.entry is None else stretch.entry.input_correlation
    if start is None or start > STILL_APART or stretch.pooled or stretch.apart_again:
        return
    points = [p for p in stretch.points if not p.last]
    many = [p for p in points if likeness(p) is not None and prod(p.shape[1:]) >= FEW_FEATURES]
    runs = groupby(many, key=lambda point: (likeness(point) or 0.0) > COLLAPSED)
    for is_alike, run in runs:
        alike = list(run)
        if is_alike and (len(alike) > 1 or alike[0].index != BESIDE):
            yield start, alike


def _inner_layers(along: Sequence[Stretch]) -> list[BlockSignal]:
    """The layers beside the blocks that are no heads, feed more than gates, and have positions where all do."""
    found = {p.number: p for each in along if not each.pooled for p in each.points}
    return [p for p in found.values() if p.index == BESIDE and not p.last]


def _growth_per_block(blocks: Sequence[BlockSignal]) -> float:
    """Median ratio of the variance from one block to the next, where the shortcut is the identity."""
    ratios = [
        after.avg_channel_var / before.avg_channel_var
        for before, after in pairwise(blocks)
        if before.avg_channel_var > 0 and not after.transition
    ]
    return median(ratios) if ratios else 1.0


def _branch_growth(signal: SignalPropagation) -> float:
    """Median branch variance of the last quarter of like blocks over that of the first; the most of all kinds."""
    alike: dict[tuple[int, ...], list[float]] = {}
    for block in signal.blocks:
        if block.residual_avg_channel_var and not block.transition and not block.broadcast:
            alike.setdefault((block.channel_axis, *block.shape[1:]), []).append(block.residual_avg_channel_var)
    quarters = [(branches, len(branches) // 4) for branches in alike.values() if len(branches) >= FEWEST_ALIKE]
    return max((median(branches[-n:]) / median(branches[:n]) for branches, n in quarters), default=1.0)


def _variance(point: BlockSignal) -> float:
    return point.avg_channel_var


def _offset(signal: SignalPropagation, point: Entry | BlockSignal) -> float:
    """Squared channel mean over variance, as they are expected of more values than the n that were measured.

    By chance alone the mean of n values has a variance of 1/n, and that around it is less by as much.
    """
    n = point.values * signal.input.get("batches", 1)
    if not point.avg_channel_var > 0 or n < 2:
        return 0.0
    return ((n - 1) * point.avg_channel_sq_mean / point.avg_channel_var - 1) / n


def _is_measurable(block: BlockSignal) -> bool:
    return isfinite(block.avg_channel_var) and isfinite(block.avg_channel_sq_mean) and block.avg_channel_var > 0


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:2])
    return shown if len(names) <= 2 else f"{shown} and {len(names) - 2} more"
