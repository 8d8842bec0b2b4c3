"""What one operation does to what is known of an activation: its path, its channels, its scalings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from normfree.signal.moments import Moments
from normfree.trace import operations as op
from normfree.trace.channels import axis_after, likely_axis
from normfree.trace.graph import NO_STEP, Node, Path
from normfree.trace.scaling import Factor, common_factors, gate_scaling, varying_axis, vector_factor
from normfree.trace.statics import Statics

MomentsOf = Callable[[Tensor], Moments | None]

ACTIVATION = op.NONLINEAR & {
    *("relu", "relu6", "leaky_relu", "_prelu_kernel", "prelu", "rrelu_with_noise", "elu", "celu", "selu", "clamp_min"),
    *("gelu", "silu", "mish", "hardswish", "softplus", "sigmoid", "hardsigmoid", "hardtanh", "tanh"),
}
"""Elementwise activation functions."""

BOUNDED_GATE = frozenset({"sigmoid", "hardsigmoid", "_softmax", "_safe_softmax"})
"""What makes a gate, or the weights of an attention, of the values it is given."""

INVERSE_SIZE = frozenset({"rsqrt", "reciprocal"})
"""What a hand-written normalizer multiplies by, where it does not divide."""

AVERAGE = frozenset({"avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "mean"})


@dataclass(kw_only=True)
class Note:
    """What the recorder knows of an activation besides its place in the graph.

    Attributes:
        shape: its shape.
        axis: the axis of its channels, where the dataflow tells.
        factors: scalings that were the last thing to happen to it.
        unscaled: its statistics before those, where they could not be had afterwards.
        gated: a data-dependent gate was the last thing to happen to it.
        woken: zero gains measured as one since the last residual addition.
        silent: the zero gains that make all of it zero.
        moments: its statistics, where they were taken.
        uses: how many operations have read it.
        order: how many activations there were before it.
        operation: what computed it; of a view, what computed the values.
        stream: the input it came from along the first operands of what joins signals.
        point: number of the last weighted layer or residual addition it came through on that way.
        normalized: a normalizer has acted since that point.
        averaged: an average pool has acted since that point.
        mixed: another signal has been put beside it since that point.
    """

    shape: tuple[int, ...] = ()
    axis: int | None = None
    factors: tuple[Factor, ...] = ()
    unscaled: Moments | None = None
    gated: bool = False
    woken: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    moments: Moments | None = None
    uses: int = 0
    order: int = 0
    operation: str = ""
    stream: int = 0
    point: int | None = None
    normalized: bool = False
    averaged: bool = False
    mixed: bool = False

    @property
    def channel_axis(self) -> int:
        """The axis of the channels, by convention where the dataflow does not tell."""
        return self.axis if self.axis is not None else likely_axis(len(self.shape))

    def made(self, name: str, args: Sequence[Any], shape: torch.Size, order: int) -> Note:
        """This note of an operation's input as the note of its output."""
        if name in op.CONVOLUTION and len(shape) > 2:
            axis: int | None = 1
        elif name in op.LINEAR or name in op.EMBEDDING or name in op.RECURRENT:
            axis = len(shape) - 1
        else:
            axis = axis_after(name, args, self.shape, self.axis, shape)
        return replace(
            self,
            shape=tuple(shape),
            axis=axis,
            moments=None,
            uses=0,
            order=order,
            operation=self.operation if name in op.VIEW else name,
            normalized=self.normalized or (name in op.NORM and _uses_statistics(name, args)),
            averaged=self.averaged or name in AVERAGE,
        )


def replace(note: Note, **changes: Any) -> Note:
    """A note with some values changed: at a fifth of the cost of ``dataclasses.replace``."""
    new = object.__new__(Note)
    new.__dict__ = {**note.__dict__, **changes}
    return new


def _uses_statistics(name: str, args: Sequence[Any]) -> bool:
    """Whether a norm divides by the statistics of its input, and not by those it has kept."""
    kept = name.endswith(("no_training", "no_update")) or ("batch_norm" in name and len(args) > 5 and args[5] is False)
    return not kept


def step_of(name: str, active: Sequence[Tensor], result: Tensor, *, looked_up: bool = False) -> Path:
    """What an operation adds to the paths that run through it.

    Args:
        name: the operation.
        active: its arguments that depend on the input.
        result: what it made.
        looked_up: the input only numbers what is taken of a tensor that does not depend on it.
    """
    if name in op.LINEAR:
        weighted = len(active) < 2 or (name == "addmm" and len(active) < 3)
        return Path(weighted=1, mixing=1) if weighted else Path(mixing=1, nonlinear=1)
    if name in op.CONVOLUTION:
        return Path(weighted=1, mixing=1)
    if name in op.EMBEDDING or name in op.RECURRENT:  # neither a lookup nor a recurrence is linear
        return Path(weighted=1, mixing=1, nonlinear=1)
    if name in op.ATTENTION:
        return Path(mixing=1, nonlinear=1)
    if name in op.POOL:
        return Path(mixing=1)
    if name in op.NONLINEAR or (name == "mul" and len(active) > 1) or result.dtype == torch.bool:
        return Path(nonlinear=1)
    if name in op.PARTIAL and looked_up:  # rows of a table that the input numbers, as an embedding is
        return Path(weighted=1, mixing=1, nonlinear=1)
    if name in op.PARTIAL and result.numel() < active[0].numel():
        return Path(partial=1)
    return NO_STEP


def noted_after(
    name: str,
    args: Sequence[Any],
    active: Sequence[Tensor],
    parents: Sequence[Node],
    weight_and_bias: tuple[Tensor | None, Tensor | None],
    statics: Statics,
    moments_of: MomentsOf,
) -> Note:
    """The note of an operation's main input with the scalings as they are after the operation.

    Runs before the operation, since an operation in place leaves nothing to look back on.
    """
    main: Note = parents[0].note
    if name in op.VIEW:
        return _with_woken(main, parents, [], statics)
    if name == "add" and len(active) == 1:
        return _with_woken(replace(main, gated=False), parents, [], statics)
    if name in op.SCALING and len(active) == 1 and (name == "mul" or args[0] is active[0]):
        other = args[1] if args[0] is active[0] else args[0]
        scaled = scaled_by(main, active[0], other, statics, moments_of, inverse=name == "div")
        if scaled is not None:
            return scaled
    if name == "mul" and len(active) == 2:
        return _with_woken(_gated(active, parents), parents, [], statics)
    if name == "div" and len(active) == 2:  # by its own size, or what the input makes of it
        main = replace(main, normalized=True)
    if name == "cat" and len(set(parents)) > 1:  # of several signals the one that has come furthest
        deepest = max(parents, key=lambda parent: parent.level).note
        main = replace(main, stream=deepest.stream, point=deepest.point, mixed=True)
        main = replace(main, normalized=deepest.normalized, averaged=deepest.averaged)
    factors: tuple[Factor, ...] = ()
    weight, bias = weight_and_bias
    if weight is not None and bias is not None and name not in op.NORM:
        factors = common_factors(statics.of(weight).factors, statics.of(bias).factors)
    plain = replace(main, factors=factors, unscaled=None, gated=False)
    return _with_woken(plain, parents, [t for t in weight_and_bias if t is not None], statics)


def scaled_by(
    note: Note, x: Tensor, other: Any, statics: Statics, moments_of: MomentsOf, *, inverse: bool = False
) -> Note | None:
    """The note of ``x`` multiplied by something that does not depend on the input; None if that is no scaling.

    A factor that can be divided out later is remembered; where it cannot (zero, a mask over examples, half
    precision that underflows) the statistics are taken now.
    """
    woken = note.woken
    if isinstance(other, Tensor):
        woken = tuple(dict.fromkeys([*woken, *statics.of(other).woken]))
    factor = statics.factor(other, inverse=inverse)
    if factor is not None and factor.constant and note.gated:
        return replace(note, gated=False, woken=woken)  # the gate's own constant, restoring what it halves
    if factor is None:
        axis = varying_axis(x, other) if isinstance(other, Tensor) else None
        if axis == note.channel_axis and axis is not None:
            factor = vector_factor(other, inverse=inverse)
        elif axis is not None and axis != 0 and statics.owns(other):
            note.axis = axis  # a learned gain knows its channels; a linear layer over tokens had them wrong
        elif axis != 0:
            return None
    if note.unscaled is not None:
        return replace(note, gated=False, woken=woken)
    if factor is None or factor.vanishes or x.dtype == torch.float16:
        return replace(note, unscaled=moments_of(x), factors=(), gated=False, woken=woken)
    return replace(note, factors=(*note.factors, factor), gated=False, woken=woken)


def _gated(active: Sequence[Tensor], parents: Sequence[Node]) -> Note:
    """The note of a product of two activations; a smaller one is a gate, and its scaling scales the product."""
    sizes = [prod(s for s, stride in zip(t.shape, t.stride(), strict=True) if stride) for t in active]
    if sizes[0] == sizes[1]:
        return replace(parents[0].note, factors=(), unscaled=None, gated=False)
    values, gate = (0, 1) if sizes[0] > sizes[1] else (1, 0)
    main: Note = parents[values].note
    if parents[gate].note.operation in INVERSE_SIZE:
        main = replace(main, normalized=True)
    side: tuple[Factor, ...] = parents[gate].note.factors
    factors = (*main.factors, *gate_scaling(side))
    return replace(main, factors=factors, unscaled=None, gated=not factors and not side)


def _with_woken(note: Note, parents: Sequence[Node], weights: Sequence[Tensor], statics: Statics) -> Note:
    names = [name for parent in parents for name in parent.note.woken]
    names += [name for tensor in weights for name in statics.of(tensor).woken]
    return replace(note, woken=tuple(dict.fromkeys(names))) if names else note
