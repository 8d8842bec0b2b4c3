"""What one operation does to what is known of an activation: its path, its channels, its scalings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normfree.trace import operations as op
from normfree.trace.graph import NO_STEP, Node, Path, Residual, residual
from normfree.trace.inputs import ModuleStack
from normfree.trace.operations import axis_after, likely_axis
from normfree.trace.scaling import (
    Factor,
    Statics,
    TensorMap,
    common_factors,
    gate_scaling,
    varying_axis,
    vector_factor,
)

MeasureBefore = Callable[[Tensor], Any]

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
    unscaled: Any = None
    gated: bool = False
    woken: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    moments: Any = None
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
    measure: MeasureBefore,
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
        scaled = scaled_by(main, active[0], other, statics, measure, inverse=name == "div")
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
    note: Note, x: Tensor, other: Any, statics: Statics, measure: MeasureBefore, *, inverse: bool = False
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
        return replace(note, unscaled=measure(x), factors=(), gated=False, woken=woken)
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


SPARSE = frozenset({torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})
"""Layouts of tensors that hold some of their values: adjacencies, masks."""


class Recorder(TorchDispatchMode):
    """Records the dataflow of one forward pass; open it around the call.

    Args:
        model: the model that will run.
        inputs: the tensors it is given, each a source of its own.
        stack: the running modules.
        before_writing: told of every tensor about to be written.
        examples: number of examples in the batch, None if unknown.
        wake: find the zero gains that silence a branch.
        woken: names of zero gains that were set to one before.
        refused: numbers of sums that look residual and are not, see :attr:`sums`.

    Attributes:
        silencing: names of the zero gains because of which the branch of some residual addition is zero.
        sums: how many residual additions there were so far, the refused ones among them.
    """

    follows_weights = True
    broadcast_branches = True
    """Whether a branch of one position that is added to a map (a global context) is one."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Iterable[Tensor],
        *,
        stack: ModuleStack,
        before_writing: Callable[[Tensor], None],
        examples: int | None,
        wake: bool = True,
        woken: Collection[str] = (),
        refused: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.wake, self.refused = wake, refused
        self.silencing: set[str] = set()
        self.sums = 0
        self.stack = stack
        self.examples = examples
        self.before_writing = before_writing
        self.statics = Statics(model, woken=woken)
        self.nodes: TensorMap[Node] = TensorMap()
        self.created = 0
        self.begun: list[tuple[nn.Module, tuple[Any, ...]]] = []
        self.measuring = False
        root = Node((), note=Note())
        for stream, tensor in enumerate(inputs):
            # Of three axes the channels may be the second (sequences) or the last (tokens): the first layer tells.
            axis = likely_axis(tensor.dim()) if tensor.dim() > 3 else None
            self.nodes[tensor] = Node((root,), note=Note(shape=tuple(tensor.shape), axis=axis, stream=stream, order=-1))

    def begin_module(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A module is about to run; looked at with the next operation, where what is measured is not recorded."""
        self.begun.append((module, inputs))

    # What a kind of recording answers.

    def on_module(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A module is about to run."""

    def on_use(self, x: Tensor) -> None:
        """An activation is about to be read."""

    def on_addition(self, found: Residual, operands: Sequence[Tensor], run: Callable[[], Tensor]) -> Tensor:
        """A residual addition is about to run; the answer must be what ``run`` returns."""
        return run()

    def on_weighted(self, x: Tensor, result: Tensor) -> None:
        """A weighted operation has turned ``x`` into ``result``."""

    def on_axis(self, x: Tensor) -> None:
        """A convolution has told which axis of ``x`` holds the channels."""

    def measure_before_scaling(self, x: Tensor) -> Any:
        """Statistics of an activation that is about to be scaled by what cannot be divided out afterwards."""

    def on_made(self, nodes: Sequence[Node]) -> None:
        """An operation on activations has made these."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.measuring:
            return func(*args, **kwargs)
        while self.begun:
            self.on_module(*self.begun.pop(0))
        if op.mutated_arguments(func):
            for target in op.written_by(func, args, kwargs):
                self.before_writing(target)
        name = op.name_of(func)
        tensors = list(op.tensors_in(args, kwargs))
        if not tensors:
            return func(*args, **kwargs)
        active = [] if name in op.FACTORY else [t for t in tensors if t in self.nodes]
        if not active:
            return self.statics.run(name, func, args, kwargs, tensors)
        if name in op.CONVOLUTION:
            self._learn_axis(active[0], op.weight_and_bias(name, args)[0])
        for tensor in active:
            self.on_use(tensor)

        def run() -> Any:
            return self._run(name, func, args, kwargs, active)

        operands = self._added(name, args, kwargs, active)
        found = self._residual(name, operands) if operands else None
        return self.on_addition(found, operands, run) if found else run()

    def _residual(self, name: str, operands: Sequence[Tensor]) -> Residual | None:
        """The residual addition that a sum of two activations is, if it is one."""
        nodes = [self.nodes[operand] for operand in operands]
        found = residual(*nodes)
        if found is None or (name == "sub" and found.branch == 0):
            return None  # what is left of a branch without its input (pool(x) - x) carries nothing on
        branch = nodes[found.branch]
        if operands[0].shape != operands[1].shape:
            small = operands[found.branch].numel() < operands[1 - found.branch].numel()
            if not small or branch.path.weighted <= found.ancestor.path.weighted:
                return None  # a mean that is taken off or added has learned nothing
        self.sums += 1
        if self.sums - 1 in self.refused:
            return None
        self.silencing.update(branch.note.silent)
        return found

    def _learn_axis(self, x: Tensor, weight: Tensor | None) -> None:
        """A convolution tells where the channels of its input are, should nothing before it have."""
        note: Note = self.nodes[x].note
        if note.axis is None and weight is not None:
            note.axis = x.dim() - weight.dim() + 1
            self.on_axis(x)

    def _added(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], active: list[Tensor]) -> list[Tensor]:
        """The two activations an operation adds, of one shape or the one broadcast, a factor of the second noted."""
        if len(active) != 2 or not self._fit(name, active):
            return []
        if not active[0].is_floating_point() or active[0].dim() < 2:  # losses and counts are no activations
            return []
        if name == "add":
            factor = kwargs.get("alpha", 1)
        elif name in ("sub", "lerp") and args[0] is active[0] and args[1] is active[1]:
            factor = 1  # a sign, or a share of both: nothing that the operands have seen yet
        elif name == "addcmul" and args[0] is active[0] and kwargs.get("value", 1) == 1:
            factor = args[2] if args[1] is active[1] else args[1]
        else:
            return []
        if isinstance(factor, Tensor) or factor != 1:
            note = self.nodes[active[1]].note
            scaled = scaled_by(note, active[1], factor, self.statics, self.measure_before_scaling)
            if scaled is not None:  # the operand itself is not scaled: there is no factor to see past
                gains = self.statics.zero_gain(factor) if self.wake and isinstance(factor, Tensor) else ()
                self.nodes[active[1]].note = replace(note, woken=scaled.woken, silent=(*note.silent, *gains))
        return active

    def _fit(self, name: str, operands: Sequence[Tensor]) -> bool:
        """Whether two operands have one shape, or all of it but for positions over which the smaller is broadcast."""
        first, second = (operand.shape for operand in operands)
        if first == second:
            return True
        if not self.broadcast_branches or name != "add" or len(first) != len(second) or len(first) < 3:
            return False
        small, large = sorted((first, second), key=lambda shape: shape.numel())
        note: Note = self.nodes[operands[0] if first == large else operands[1]].note
        axis = note.channel_axis % len(large)
        return all(s == n or (s == 1 and i not in (0, axis)) for i, (s, n) in enumerate(zip(small, large, strict=True)))

    def _run(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], active: list[Tensor]) -> Any:
        """Execute an operation on activations and note what it makes."""
        parents = [self.nodes[t] for t in active]
        weight, bias = op.weight_and_bias(name, args)
        silent = self._silenced_by(name, args, weight, parents) if self.wake else ()
        note = noted_after(name, args, active, parents, (weight, bias), self.statics, self.measure_before_scaling)
        if name in op.ATTENTION and args[0] is not active[0]:  # learned queries begin a stream of their own
            note = replace(note, stream=-self.created, point=None, normalized=False)
        result = func(*args, **kwargs)
        looked_up = args[0] is not active[0]
        nodes = []
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout not in SPARSE:  # a mask or weights, no activation
                made = note.made(name, args, tensor.shape, self.created)
                made.silent = silent if silent and not bool(tensor.any()) else ()
                step = step_of(name, active, tensor, looked_up=looked_up)
                if looked_up and step.weighted and name in op.PARTIAL:
                    made.axis = tensor.dim() - 1
                nodes.append(Node(parents, step, made))
                self._add_node(name, args, tensor, nodes[-1])
        self.on_made(nodes)
        output = result[0] if name in op.RECURRENT and isinstance(result, (tuple, list)) else result
        if isinstance(output, Tensor) and output in self.nodes and self.nodes[output].step.weighted:
            self.on_weighted(active[0], output)
        return result

    def _silenced_by(
        self, name: str, args: Sequence[Any], weight: Tensor | None, parents: Sequence[Node]
    ) -> tuple[str, ...]:
        """The zero gains that may make a result zero: those behind its inputs, and those multiplied in now."""
        silent = [gain for parent in parents for gain in parent.note.silent]
        if name in op.NORM and weight is not None:
            silent += self.statics.zero_gain(weight)
        elif weight is not None:
            silent += self.statics.of(weight).silent
        elif name in op.SCALING:
            silent += [gain for t in args if isinstance(t, Tensor) for gain in self.statics.zero_gain(t)]
        return tuple(dict.fromkeys(silent))

    def _add_node(self, name: str, args: Sequence[Any], tensor: Tensor, node: Node) -> None:
        self.created += 1
        self.nodes[tensor] = node
        if (name in op.VIEW and name != "copy") or not tensor._is_view() or not any(tensor is a for a in args):
            return
        base = tensor._base  # written through a view: the whole now depends on this too
        if isinstance(base, Tensor):
            whole = self.nodes.get(base)
            parents = [node] if whole is None else [whole, node]
            note = Note(shape=tuple(base.shape), order=self.created, operation=name)
            source: Note = parents[0].note
            note.axis = None if whole is None else source.axis
            note.stream, note.point, note.normalized = source.stream, source.point, source.normalized
            self.nodes[base] = Node(parents, note=note)
