"""What the numbers of a plot mean, in plain words: what is wrong, where it shows, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

from normfree.signal import gradient_rules, rules
from normfree.signal.comparable import where as where_is
from normfree.signal.nonfinite import NonFinite
from normfree.signal.propagation import SEVERITIES, Finding, SignalPropagation

KINDS = (
    "explosion",
    "attenuation",
    "mean_shift",
    "branch_variance",
    "silenced_branch",
    "dead_channels",
    "correlation_collapse",
    "gradient_explosion",
    "gradient_vanishing",
    "zero_layer",
    "non_finite",
)


def findings_of(signal: SignalPropagation, non_finite: NonFinite | None = None) -> tuple[Finding, ...]:
    """Everything worth saying about a measurement, the most serious first.

    Args:
        signal: the measurement.
        non_finite: the first operation that made a non-finite value, if one did.

    Returns:
        Findings, ordered by severity.
    """
    found = list(_non_finite(signal, non_finite))
    for rule in (*rules.RULES, *gradient_rules.RULES):
        found += rule(signal)
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def _non_finite(signal: SignalPropagation, found: NonFinite | None) -> Iterator[Finding]:
    block = next((b for b in signal.blocks if not isfinite(b.avg_channel_var)), None)
    if block is None and found is None:
        return
    where = f"first seen at {where_is(block)}" if block is not None else "after the last block"
    origin = ""
    if found is not None:
        origin = (
            f" They begin in {found.operation} of module {found.module or '(the model itself)'}: {found.count} of "
            f"{found.total} results, from inputs of magnitude up to {found.largest:.3g}."
        )
    yield Finding(
        kind="non_finite",
        severity="error",
        block=None if block is None else block.index,
        message=f"values stop being finite, {where}.{origin}",
        remedy=(
            "If the magnitudes before it explode, cure the explosion; otherwise look at that operation: a division by "
            "zero, a logarithm or root of a negative number, or a range half precision does not have."
        ),
    )
