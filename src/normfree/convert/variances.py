"""What variance each activation is expected to have once the norms are gone.

The plan knows Gaussian activations: a standardized layer gives variance 1 (alpha² where it ends a branch), a sum with
constant factors the sum of its independent operands, a concatenation the mean over its channels. So inside a stage the
residual stream climbs by alpha² a block and a projection shortcut resets it, as in the variance plan of our own
networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from normfree.convert.branches import Ending
from normfree.convert.dataflow import Dataflow, Step, passes_unchanged
from normfree.convert.structure import Structure
from normfree.trace import operations as op
from normfree.trace.graph import Node


def planned_variances(
    structure: Structure, chosen: set[str], removed: set[str], found: list[Ending], alpha: float
) -> dict[Node, float]:
    """The variance of every activation that is expected to be Gaussian.

    Args:
        structure: of the model.
        chosen: names of the layers to be standardized.
        removed: names of the norms to be passed as if they were not there.
        found: the endings of the branches. A branch of which the plan knows no variance (it ends in a gate or an
            activation) is taken to have what its factor is for, alpha².
        alpha: of the branches.
    """
    carriers = {name for ending in found for name in ending.modules}
    variance: dict[Node, float] = {}
    for name in chosen:
        for call in structure.layers[name]:
            if call.output is not None:
                variance[call.output] = alpha**2 if name in carriers else 1.0
    sums = {ending.addition.output: ending for ending in found if ending.modules}
    for step in structure.flow.steps:
        for node in step.outputs[:1]:
            if node in variance or not step.inputs:
                continue
            if node in sums:
                variance.setdefault(sums[node].addition.branch, alpha**2 * sums[node].square)
            through = structure.is_plain_norm(node, removed) or (step.name in op.NORM and step.module in removed)
            value = _after(step, variance, structure.flow, through=through)
            if value is not None:
                variance[node] = value
    return variance


def _after(step: Step, variance: Mapping[Node, float], flow: Dataflow, *, through: bool) -> float | None:
    """The variance of what an operation makes, or None; ``through`` an operation that is not left in the model."""
    known = [variance[node] for node in step.inputs if node in variance]
    if len(known) < len(step.inputs):
        return None
    if through or passes_unchanged(step):
        return known[0]
    if step.name == "cat":
        sizes = [math.prod(flow.shapes[node]) for node in step.inputs]
        return sum(size * value for size, value in zip(sizes, known, strict=True)) / sum(sizes)
    factors = _factors(step)
    if factors is None or len(factors) != len(step.inputs) or len({flow.shapes[node] for node in step.inputs}) > 1:
        return None
    if len(factors) != len(step.inputs):  # a constant is added, which moves the mean: what follows is measured
        return None
    total = dict.fromkeys(step.inputs, 0.0)  # an activation added to itself is twice as large
    for node, factor in zip(step.inputs, factors, strict=True):
        total[node] += factor
    return sum(variance[node] * factor**2 for node, factor in total.items())


def _factors(step: Step) -> tuple[float, ...] | None:
    """With what factor each activation enters a linear operation; None for any other one."""
    args = step.args
    if len(step.inputs) == 1 and step.name in op.SCALING:
        other = next((each for each in args if not isinstance(each, Node)), None)
        size = _size(other) or 0.0
        divided = step.name == "div" and isinstance(args[0], Node)
        return None if not size else (size,) if step.name == "mul" else (1 / size,) if divided else None
    if step.name in ("add", "sub"):
        return 1.0, float(step.kwargs.get("alpha", 1)) * (1 if step.name == "add" else -1)
    if step.name == "lerp" and args[:2] == step.inputs:
        share = _size(args[2])
        return None if share is None else (1 - share, share)
    if step.name == "addcmul" and isinstance(args[0], Node):
        size = next((_size(each) for each in args[1:] if not isinstance(each, Node)), None)
        return None if size is None else (1.0, size * float(step.kwargs.get("value", 1)))
    return None


def _size(value: object) -> float | None:
    """A number, or the root mean square of a tensor that is no activation."""
    if isinstance(value, Tensor):
        size = float(value.detach().double().square().mean().sqrt())
        return math.copysign(size, float(value)) if value.numel() == 1 else size
    return float(value) if isinstance(value, (int, float)) else None
