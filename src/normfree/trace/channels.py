"""Which axis of an activation holds its channels, followed through the operations that move axes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any


def axis_after_view(shape: Sequence[int], axis: int, new_shape: Sequence[int]) -> int | None:
    """Where the channels are after a reshape: the axis of the same size with as many values before it."""
    before = prod(shape[:axis])
    for new_axis, size in enumerate(new_shape):
        if size == shape[axis] and prod(new_shape[:new_axis]) == before:
            return new_axis
    return None


def axis_after(
    name: str, arguments: Sequence[Any], shape: Sequence[int], axis: int | None, new_shape: Sequence[int]
) -> int | None:
    """Where the channels are after an operation that moves or keeps axes.

    Args:
        name: the operation, as :mod:`normfree.trace.operations` names it.
        arguments: its positional arguments.
        shape: shape of its input.
        axis: where the channels were, None if that is not known.
        new_shape: shape of its output.

    Returns:
        The axis, or None where they cannot be followed.
    """
    if axis is None:
        return None
    dims = len(shape)
    if name == "permute":
        return [d % dims for d in arguments[1]].index(axis)
    if name == "transpose":
        first, second = arguments[1] % dims, arguments[2] % dims
        return {first: second, second: first}.get(axis, axis)
    if name == "t":
        return dims - 1 - axis
    if name in ("select", "unbind"):
        removed = (arguments[1] if len(arguments) > 1 else 0) % dims
        return None if removed == axis else axis - (removed < axis)
    if name == "expand":
        return axis + len(new_shape) - dims
    if len(new_shape) == dims and shape[axis] == new_shape[axis]:
        return axis
    return axis_after_view(shape, axis, new_shape) if prod(shape) == prod(new_shape) else None


def likely_axis(dims: int) -> int:
    """Where PyTorch's conventions put the channels when the dataflow does not tell: maps [N, C, …], tokens last."""
    return 1 if dims >= 4 else dims - 1
