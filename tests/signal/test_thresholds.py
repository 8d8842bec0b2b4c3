"""Every threshold of the findings from both sides: just below it there is no finding, just above it there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from normfree.signal import findings as rules
from normfree.signal.findings import findings_of
from normfree.signal.propagation import BlockSignal, Entry, SignalPropagation

ENTRY = Entry(
    name="body",
    shape=(8, 16, 8, 8),
    channel_axis=1,
    avg_channel_sq_mean=0.0,
    avg_channel_var=1.0,
    input_correlation=0.0,
)
BLOCK = BlockSignal(
    index=0,
    name="block",
    kind="residual",
    shape=ENTRY.shape,
    channel_axis=1,
    transition=False,
    avg_channel_sq_mean=0.0,
    avg_channel_var=1.0,
    residual_avg_channel_var=1.0,
    input_correlation=0.0,
)


def chained(points: Sequence[BlockSignal]) -> list[BlockSignal]:
    """The points one behind the other, the first behind the entry."""
    return [replace(p, number=i, after=i - 1 if i else None, entry=None if i else 0) for i, p in enumerate(points)]


def severity(kind: str, blocks: Sequence[BlockSignal], layers: int = 0) -> str | None:
    """The severity of a kind of finding in a network of blocks, the last few of them layers behind the blocks."""
    points = chained(blocks)
    on_plot = points[: len(points) - layers]
    signal = SignalPropagation(
        model="by hand",
        mode="eval",
        input={},
        entry=ENTRY,
        blocks=tuple(replace(p, index=i) for i, p in enumerate(on_plot)),
        layers=tuple(replace(p, index=i, kind="layer") for i, p in enumerate(points[len(on_plot) :])),
        entries=(ENTRY,),
    )
    return {finding.kind: finding.severity for finding in findings_of(signal)}.get(kind)


def geometric(ratio: float, count: int) -> list[BlockSignal]:
    return [replace(BLOCK, avg_channel_var=ratio ** (i + 1)) for i in range(count)]


def ending(variance: float) -> list[BlockSignal]:
    return [BLOCK, BLOCK, BLOCK, replace(BLOCK, avg_channel_var=variance)]


def shifted(ratio: float, growth: float = 1.0) -> list[BlockSignal]:
    """Eight like blocks with a squared mean, whose branch variance grows from the first quarter to the last.

    What n values show of an offset of ``ratio`` times the variance s²: ratio s² + s²/n beside s² - s²/n.
    """
    n = BLOCK.values
    ratio = (n * ratio + 1) / (n - 1)
    grown = [1.0] * 6 + [growth] * 2
    return [replace(BLOCK, avg_channel_sq_mean=ratio, residual_avg_channel_var=v) for v in grown]


def outweighed(share: float) -> list[BlockSignal]:
    """Eight branches of unit variance, together a share of the stream they are added to."""
    return [replace(BLOCK, avg_channel_var=8 / share, transition=i == 0) for i in range(8)]


def changed(name: str) -> Callable[[float], list[BlockSignal]]:
    return lambda value: [BLOCK, replace(BLOCK, **{name: value})]


def alike(difference: float) -> list[BlockSignal]:
    """Examples that differ by so much of their cosine similarity."""
    return changed("input_correlation")(1 - difference)


def alike_by_a_bias(own: float) -> list[BlockSignal]:
    """Layers whose bias is what examples have in common, and their similarity without it."""
    return [replace(BLOCK, kind="layer", input_correlation=0.999, own_correlation=own) for _ in range(2)]


# kind: (points by a value, the threshold, the severities below and above)
SIDES = {
    "growth per block": ("explosion", lambda v: geometric(v, 40), rules.GROWTH_PER_BLOCK, (None, "error")),
    "growth in all": (*("explosion", lambda v: geometric(v ** (1 / 8), 8), rules.EXPLODED, (None, "error")),),
    "burst": ("explosion", ending, rules.BURST, (None, "warning")),
    "far burst": ("explosion", ending, rules.FAR_BURST, ("warning", "error")),
    "weak": ("attenuation", ending, rules.WEAK, ("warning", None)),
    "faded": ("attenuation", ending, rules.FADED, ("error", "warning")),
    "branch too large": (
        *("branch_variance", changed("residual_avg_channel_var"), rules.BRANCH_FACTOR, (None, "warning")),
    ),
    "branch too small": (
        *("branch_variance", changed("residual_avg_channel_var"), 1 / rules.BRANCH_FACTOR, ("info", None)),
    ),
    "outweighed": ("branch_variance", outweighed, rules.OUTWEIGHED, ("warning", None)),
    "shifted": ("mean_shift", shifted, rules.SHIFTED, (None, "warning")),
    "lost": ("mean_shift", shifted, rules.LOST, ("warning", "error")),
    "fed": ("mean_shift", lambda v: shifted(2.0, v), rules.FED, ("warning", "error")),
    "dead": ("dead_channels", changed("dead_channels"), rules.FEW_DEAD, (None, "info")),
    "many dead": ("dead_channels", changed("dead_channels"), rules.MANY_DEAD, ("info", "warning")),
    "collapsed": ("correlation_collapse", changed("input_correlation"), rules.COLLAPSED, (None, "warning")),
    "collapsed without the bias": ("correlation_collapse", alike_by_a_bias, rules.COLLAPSED, (None, "warning")),
    "difference lost": ("correlation_collapse", alike, rules.LOST_DIFFERENCE, ("error", "warning")),
}


@pytest.mark.parametrize("name", SIDES)
def test_just_below_and_just_above(name):
    kind, points, threshold, expected = SIDES[name]
    assert (severity(kind, points(threshold * 0.999)), severity(kind, points(threshold * 1.001))) == expected


def test_all_dead_is_an_error():
    assert severity("dead_channels", changed("dead_channels")(0.999)) == "warning"
    assert severity("dead_channels", changed("dead_channels")(1.0)) == "error"


@pytest.mark.parametrize(("last", "expected"), [(0.0, "error"), (1e-300, None), (math.nan, None)])
def test_an_output_of_which_no_gradient_arrives_anywhere_is_dead(last, expected):
    points = [replace(BLOCK, avg_sq_gradient=gradient) for gradient in (None, 0.0, last)]
    assert severity("dead_channels", points) == expected
    assert severity("dead_channels", [replace(point, avg_sq_gradient=None) for point in points]) is None


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(rules.WEAK_LAYERS, ("warning", None)), (rules.FADED, ("error", "warning"))],
)
def test_layers_behind_the_blocks_may_fade_further(threshold, expected):
    found = [severity("attenuation", ending(threshold * side), layers=1) for side in (0.999, 1.001)]
    assert tuple(found) == expected


@pytest.mark.parametrize(("variance", "expected"), [(rules.WEAK * 1.001, "error"), (rules.WEAK * 0.999, "warning")])
def test_where_the_signal_has_faded_its_variance_decides_and_not_what_the_examples_share(variance, expected):
    points = [BLOCK, replace(BLOCK, avg_channel_var=variance, input_correlation=1 - rules.LOST_DIFFERENCE / 2)]
    assert severity("correlation_collapse", points) == expected


def test_three_layers_that_grow_are_a_habit():
    def tail(count: int) -> list[BlockSignal]:
        grown = [replace(BLOCK, avg_channel_var=101.0 ** ((i + 1) / count)) for i in range(count)]
        return [BLOCK, BLOCK, *grown]

    assert severity("explosion", tail(rules.FEWEST_LAYERS - 1), layers=rules.FEWEST_LAYERS - 1) is None
    assert severity("explosion", tail(rules.FEWEST_LAYERS), layers=rules.FEWEST_LAYERS) == "error"


def test_what_was_alike_to_begin_with_is_no_collapse(monkeypatch):
    for start, expected in ((rules.STILL_APART * 0.999, "warning"), (rules.STILL_APART * 1.001, None)):
        monkeypatch.setitem(globals(), "ENTRY", replace(ENTRY, input_correlation=start))
        assert severity("correlation_collapse", changed("input_correlation")(0.995)) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"transition": True},
        {"shape": (8, 16, 4, 4)},
        {"shape": (8, 32, 8, 8)},
        {"broadcast": True},
    ],
    ids=lambda other: next(iter(other.items())),
)
def test_only_like_blocks_feed_a_shift(other):
    """Later blocks of another resolution, width or shortcut have a variance of their own."""
    early = [replace(BLOCK, avg_channel_sq_mean=2.0) for _ in range(8)]
    late = [replace(BLOCK, avg_channel_sq_mean=2.0, residual_avg_channel_var=50.0, **other) for _ in range(4)]
    assert severity("mean_shift", early + late) == "warning"
    assert (
        severity("mean_shift", early + [replace(p, transition=False, broadcast=False, shape=BLOCK.shape) for p in late])
        == "error"
    )


def test_two_values_of_mean_zero_have_no_mean_shift():
    """Their squared mean is on average as large as their variance around it; three times that is an offset."""
    points = [replace(BLOCK, shape=(1, 16, 2, 1), avg_channel_sq_mean=ratio) for ratio in (1.0, 2.9, 3.1)]
    assert [severity("mean_shift", [point]) for point in points] == [None, None, "warning"]


def test_growth_that_a_normalizer_takes_back_is_a_warning():
    blocks = geometric(1.5, 14)
    assert severity("explosion", blocks) == "error"
    assert severity("explosion", [*blocks[:-1], replace(blocks[-1], renewed=True)]) == "warning"


def test_messages_have_four_digits_at_most():
    import re

    exact = [replace(BLOCK, avg_channel_var=math.pi ** (i + 1) * 1.23456789) for i in range(20)]
    points = chained(exact)
    signal = SignalPropagation(
        model="by hand", mode="eval", input={}, entry=ENTRY, blocks=tuple(points), entries=(ENTRY,)
    )
    for finding in findings_of(signal):
        for number in re.findall(r"\d[\d.]*(?:e[+-]\d+)?", finding.message):
            assert len(number.partition("e")[0].replace(".", "").lstrip("0")) <= 4
