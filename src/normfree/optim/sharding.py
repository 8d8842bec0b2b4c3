"""Sharded parameters, as adaptive gradient clipping sees them: local tensors, and what is to be summed over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch import distributed as dist

from normfree.common.checks import invalid
from normfree.optim.units import Units


@dataclass(frozen=True)
class Split:
    """How the units of a parameter lie on a device mesh; nothing of it for an ordinary parameter.

    Attributes:
        mesh: the device mesh, or None.
        within: mesh axes over which each unit is split, so that its squared norm is a sum over ranks.
        between: mesh axes over which the units are dealt out, so that each rank sees only some.
    """

    mesh: Any = None
    within: tuple[int, ...] = ()
    between: tuple[int, ...] = ()


def split_of(units: Units) -> Split:
    """Say how a parameter's units are sharded.

    Raises:
        ValueError: for a placement that has no units on any rank.
    """
    placements = placements_of(units.parameter)
    if placements is None:
        return Split()
    gradient = units.parameter.grad
    if gradient is not None and placements_of(gradient) != placements:
        rule = "the gradient is sharded otherwise than its parameter"
        raise invalid("parameters", units.name, rule, "redistribute the gradient to the parameter's placements")
    within, between = [], []
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if placement.is_partial() or units.groups > 1:
            rule = "a grouped transposed convolution's shards, and partial sums, cut through its units"
            raise invalid("parameters", units.name, rule, "replicate this parameter, or exclude it")
        (between if placement.dim % units.parameter.dim() in units.kept else within).append(axis)
    return Split(units.parameter.device_mesh, tuple(within), tuple(between))  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor, sharing its memory; an ordinary tensor as it is."""
    return tensor if placements_of(tensor) is None else tensor.to_local()  # type: ignore[attr-defined]


def sum_over(tensor: Tensor, mesh: Any, axes: tuple[int, ...]) -> Tensor:
    """Sum a tensor in place over the ranks along some axes of a mesh; collective over these ranks."""
    for axis in axes:
        dist.all_reduce(tensor, group=mesh.get_group(axis))
    return tensor


def placements_of(tensor: Tensor) -> Any:
    """Return how a sharded tensor lies on its device mesh; None for an ordinary one."""
    # Without a process group there is no sharded tensor, and the import, which takes a second, is saved.
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    return tensor.placements if isinstance(tensor, DTensor) else None
