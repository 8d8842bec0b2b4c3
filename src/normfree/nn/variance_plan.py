"""The variance plan: what the activations' variance is expected to be, block by block, at initialisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from normfree.common.checks import check_integers, check_number, invalid


@dataclass(frozen=True)
class PlannedBlock:
    """One residual block of the plan.

    Attributes:
        stage: the block's stage, from 0.
        index: the block's number over the whole network, from 0.
        beta: expected standard deviation of the block's input, which its branch is divided by.
        expected_var: expected variance of the block's output.
        transition: whether it is the first of its stage, whose shortcut sees the downscaled input.
    """

    stage: int
    index: int
    beta: float
    expected_var: float
    transition: bool


def variance_plan(depths: Sequence[int], alpha: float = 0.2) -> tuple[PlannedBlock, ...]:
    """Return the plan of a network of residual blocks ``x + alpha * f(x / beta)``, f variance preserving.

    ``beta = sqrt(expected_var)``; then ``expected_var = 1 + alpha^2`` after a transition block, whose
    shortcut is variance preserving itself, and ``expected_var += alpha^2`` after any other; 1 to begin with.

    Args:
        depths: blocks per stage; the first of each is a transition block.
        alpha: the branch's factor.

    Returns:
        One entry per block, in order.

    Raises:
        ValueError: depths that are not positive integers; negative or non-finite alpha.

    Source: Brock et al. 2021, section 3.
    """
    if not isinstance(depths, (tuple, list)) or not depths:
        raise invalid("depths", depths, "must be a sequence of blocks per stage", "pass one such as (3, 4, 6, 3)")
    check_integers("depths", depths, len(depths))
    check_number("alpha", alpha, 0.0)
    plan: list[PlannedBlock] = []
    variance = 1.0
    for stage, depth in enumerate(depths):
        for position in range(depth):
            beta = math.sqrt(variance)
            variance = (1.0 if position == 0 else variance) + alpha**2
            plan.append(PlannedBlock(stage, len(plan), beta, variance, transition=position == 0))
    return tuple(plan)
