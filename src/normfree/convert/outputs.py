"""What models return: its form (containers, lengths, kinds of numbers, shapes), and whether values decide it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from normfree.convert.dataflow import Dataflow
from normfree.trace.graph import Node

WHOLE = "what it returns"


def difference(was: Any, now: Any, *, sizes: bool = True, numbers: bool = False, place: str = WHOLE) -> str:
    """Where the form of an output is another, in words; "" where it is the same.

    Args:
        was: the one output.
        now: the other.
        sizes: shapes count; else the number of axes alone.
        numbers: the values of Python's own numbers and texts count, too.
        place: how to name the output.
    """
    if isinstance(was, Tensor) or isinstance(now, Tensor) or type(was) is not type(now):
        before, after = _told(was, sizes), _told(now, sizes)
        return "" if before == after else f"{place} was {before} and is {after}"
    if isinstance(was, Mapping):
        pairs = {f"[{key!r}]": (was[key], now[key]) for key in was if key in now}
        if was.keys() != now.keys():
            return f"{place} had the keys {list(was)} and has {list(now)}"
    elif isinstance(was, (list, tuple)):
        pairs = {f"[{index}]": pair for index, pair in enumerate(zip(was, now, strict=False))}
        if len(was) != len(now):
            return f"{place} was a {type(was).__name__} of {len(was)} and is one of {len(now)}"
    elif isinstance(was, (bool, int, float, complex, str)):
        same = not numbers or was == now or (was != was and now != now)
        return "" if same else f"{place} was {was!r} and is {now!r}"
    else:
        tensors = {name: value for name, value in getattr(was, "__dict__", {}).items() if isinstance(value, Tensor)}
        pairs = {f".{name}": (value, getattr(now, name, None)) for name, value in tensors.items()}
    joint = " " if place == WHOLE else ""
    found = (
        difference(*pair, sizes=sizes, numbers=numbers, place=f"{place}{joint}{part}") for part, pair in pairs.items()
    )
    return next(filter(None, found), "")


def _told(value: Any, sizes: bool) -> str:
    """What an output is: of a tensor the kind of its numbers and its shape, of anything else its class."""
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    kind = "floating-point" if value.is_floating_point() else "complex" if value.is_complex() else str(value.dtype)[6:]
    return f"a {kind} tensor of " + (f"shape {list(value.shape)}" if sizes else f"{value.dim()} axes")


_OF_VALUES = frozenset(
    {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "nms", "bincount", "histc"}
    | {"_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
)
"""Operations that give Python a value, or a tensor whose shape the values decide."""


def depends_on_values(flow: Dataflow) -> bool:
    """Whether what a model returns, or the way it goes, may have another form for other values."""
    return any(
        step.name in _OF_VALUES or (step.name == "index" and any(isinstance(each, Node) for each in step.args[1]))
        for step in flow.steps
    )
