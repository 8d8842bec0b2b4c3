"""The recorder: follows every operation of one forward pass and finds each residual addition.

It sits below autograd, so it sees whatever runs, however the model's code looks; it keeps no activation
alive and leaves nothing on any module. Of every activation it knows its place in the graph (:class:`Node`), and beside
that what is in its :class:`Note`. Both are made for every operation of a model, also of one with a hundred thousand
small ones: what runs once an operation is written for speed. A tensor without values is no activation: what is given no
row of the batch is as if it had not run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from normfree.common.torch_compat import DispatchMode, base_of_view, current_autograd_node, tree_leaves
from normfree.trace import operations as op
from normfree.trace.graph import NO_STEP, Node, Path, Residual, residual
from normfree.trace.inputs import SPARSE, ModuleStack
from normfree.trace.scaling import (
    Factor,
    Statics,
    TensorMap,
    common_factors,
    equal_factors,
    gate_scaling,
    numbers_among,
    varying_axis,
    vector_factor,
)


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
        discrete: the integers (the index of a code word) through which alone it depends on what they were made of.
        viewed: the activation that it has the values of, of a view.
        difference: the two activations that it is the difference of.
        gain: the learned numbers by which another was multiplied to make it.
        weight_factors: those of the weight of a matrix product that made it, to which its bias is added by itself.
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
    discrete: Node | None = None
    viewed: Node | None = None
    difference: tuple[Node, Node] | None = None
    gain: _Gain | None = None
    weight_factors: tuple[Factor, ...] = ()

    @property
    def channel_axis(self) -> int:
        """The axis of the channels, by convention where the dataflow does not tell."""
        return self.axis if self.axis is not None else op.likely_axis(len(self.shape))

    def with_(self, **changes: Any) -> Note:
        """The note with some values changed: at a fifth of the cost of ``dataclasses.replace``."""
        new = object.__new__(Note)
        new.__dict__ = {**self.__dict__, **changes}
        return new

    def after(self, name: str, args: Sequence[Any], shape: torch.Size, order: int) -> Note:
        """This note of an operation's input as the note of its output."""
        new = object.__new__(Note)
        new.__dict__ = values = dict(self.__dict__)
        values["moments"], values["uses"], values["order"], values["silent"], values["viewed"] = (
            None,
            0,
            order,
            (),
            None,
        )
        if name in op.CONVOLUTION and len(shape) > 2:
            values["axis"] = 1
        elif name in op.LINEAR or name in op.EMBEDDING or name in op.RECURRENT:
            values["axis"] = len(shape) - 1
        elif self.axis is not None and (shape != self.shape or name in op.MOVES_AXES):
            values["axis"] = op.axis_after(name, args, self.shape, self.axis, shape)
        values["shape"] = tuple(shape)
        if name not in op.VIEW:
            values["operation"], values["difference"], values["weight_factors"] = name, None, ()
            if name in op.NORM and op.uses_statistics(name, args):
                values["normalized"] = True
            elif name in op.AVERAGE:
                values["averaged"] = True
        return new


class _Gain(Enum):
    """Several learned numbers by which an activation is multiplied, one a channel or one a position."""

    ALIKE = "they have a common size: ones, or what training has made of them"
    NOISE = "they have none: most of their mean square is variance"


_Operands = tuple[Node, int, Node, int]
"""Two activations, each with how often its memory had been written to."""


class Recorder(DispatchMode):
    """Records the dataflow of one forward pass; open it around the call.

    Args:
        model: the model that will run.
        inputs: the tensors it is given, each a source of its own.
        stack: the running modules.
        before_writing: called with every tensor about to be written.
        examples: number of examples in the batch, None if unknown.
        wake: find the zero gains that silence a branch.
        woken: names of zero gains that were set to one before.
        refused: numbers of sums that look residual and are not, see :attr:`sums`.

    Attributes:
        nodes: of every activation that is alive, its place in the graph.
        silencing: names of the zero gains because of which the branch of some residual addition is zero.
        sums: how many residual additions there were so far, the refused ones among them.
        scaled_skips: those of them, as they come, whose skip is multiplied by several learned numbers.
        inner: those of these that a branch was computed from: skips of a layer (D·u of a state space), and no blocks.
        created: how many activations there were so far.
    """

    follows_weights = True
    broadcast_branches = True
    """Whether a branch of one position that is added to a map (a global context) is one."""
    merges_sums = True
    """Whether two activations that are added once more make the activation that they made before."""

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
        self.scaled_skips: list[Node] = []
        self.inner: set[Node] = set()
        self.sums = self.created = 0
        self.stack = stack
        self.examples = examples
        self.before_writing = before_writing
        self.statics = Statics(model, woken=woken)
        self.nodes: TensorMap[Node] = TensorMap()
        self.begun: list[tuple[nn.Module, tuple[Any, ...]]] = []
        self.sum_of: dict[_Operands, Node] = {}
        root = Node((), note=Note())
        for stream, tensor in enumerate(inputs):
            # Of three axes the channels may be the second (sequences) or the last (tokens): the first layer tells.
            axis = op.likely_axis(tensor.dim()) if tensor.dim() > 3 else None
            self.nodes[tensor] = Node((root,), note=Note(shape=tuple(tensor.shape), axis=axis, stream=stream, order=-1))

    def begin_module(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A module is about to run; looked at with the next operation, where what is measured is not recorded."""
        self.begun.append((module, inputs))

    # What a kind of recording answers.

    def before_operation(self) -> bool:
        """An operation is about to run; the answer is whether it is recorded."""
        return True

    def on_module(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A module is about to run."""

    def on_use(self, x: Tensor, node: Node) -> None:
        """An activation is about to be read."""

    def on_axis(self, x: Tensor) -> None:
        """Called when a convolution has shown which axis of ``x`` holds the channels."""

    def on_addition(self, found: Residual, operands: Sequence[Tensor], run: Callable[[], Tensor]) -> Tensor:
        """A residual addition is about to run; the answer must be what ``run`` returns."""
        return run()

    def on_sum_again(self, result: Tensor, node: Node) -> None:
        """Two activations were added once more; ``node`` is what they made the first time."""

    def on_weighted(self, x: Tensor, result: Tensor) -> None:
        """A weighted operation has turned ``x`` into ``result``."""

    def on_constant(self, name: str, tensors: Sequence[Tensor]) -> None:
        """An operation none of whose arguments is an activation is about to run; what has no values is none."""

    def on_made(self, nodes: Sequence[Node]) -> None:
        """An operation on activations has made these."""

    def measure_before_scaling(self, x: Tensor) -> Any:
        """Statistics of an activation that is about to be scaled by what cannot be divided out afterwards."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.before_operation():
            return func(*args, **kwargs)
        if differentiates():
            return self._differentiate(func, args, kwargs)
        while self.begun:
            self.on_module(*self.begun.pop(0))
        name, written = op.name_and_written(func)
        if written:
            for target in op.written_by(func, args, kwargs):
                self.before_writing(target)
        tensors = op.tensors_in(args, kwargs)
        known = self.nodes.by_id
        active = [] if name in op.FACTORY else [tensor for tensor in tensors if id(tensor) in known]
        if not active:
            if not tensors:
                return func(*args, **kwargs)
            self.on_constant(name, tensors)
            return self.statics.run(name, func, args, kwargs, tensors)
        if name == "add" and len(active) == 2 and self.merges_sums and not written and not kwargs:
            return self._add_mergeably(func, args, active)
        return self._follow(name, func, args, kwargs, active)

    def _differentiate(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Execute an operation of a backward pass, which is no layer and no block, whatever it computes.

        One that the forward itself asks for (forces are the derivative of an energy) gives activations all the same.
        """
        result = func(*args, **kwargs)
        if self.stack.running:
            known = self.nodes.by_id
            active = [tensor for tensor in op.tensors_in(args, kwargs) if id(tensor) in known]
            parents = [known[id(tensor)] for tensor in active]
            for tensor in tree_leaves(result) if parents else ():
                if _is_activation(tensor, active) and id(tensor) not in known:
                    note = Note(shape=tuple(tensor.shape), order=self.created, stream=parents[0].note.stream)
                    self.nodes[tensor] = Node(parents, note=note)
                    self.created += 1
        return result

    def _follow(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], active: list[Tensor]) -> Any:
        """Execute an operation on activations, which may be a residual addition."""
        if name in op.CONVOLUTION:
            self._learn_axis(active[0], op.weight_and_bias(name, args)[0])
        for tensor in active:
            self.on_use(tensor, self.nodes[tensor])
        if len(active) == 2 and name in op.SUMS and not self._left_of_sum(name, active):
            operands = self._operands(name, args, kwargs, active)
            found = self._residual(name, args, operands) if operands else None
            if found:
                scaled = self._gain_of_skip(name, args, operands, found) is not None
                self._find_inner(found.ancestor, self.nodes[operands[1 - found.branch]])
                result = self.on_addition(found, operands, lambda: self._run(name, func, args, kwargs, active))
                self.scaled_skips += [self.nodes[result]] if scaled else []
                return result
        return self._run(name, func, args, kwargs, active)

    def _learn_axis(self, x: Tensor, weight: Tensor | None) -> None:
        """A convolution tells where the channels of its input are, should nothing before it have."""
        note: Note = self.nodes[x].note
        if note.axis is None and weight is not None:
            note.axis = x.dim() - weight.dim() + 1
            self.on_axis(x)

    # Sums.

    def _add_mergeably(self, func: Any, args: Sequence[Any], active: list[Tensor]) -> Tensor:
        """Add two activations; what they have made before, unless one has been written to since, is not recorded again.

        Where every layer adds up anew what all layers before it have made, there are as many different sums as layers,
        and as many additions as their number squared.
        """
        first, second = active
        if first.is_inference() or second.is_inference():  # they do not count what is written to them
            return self._follow("add", func, args, {}, active)
        key = self.nodes[first], first._version, self.nodes[second], second._version
        node = self.sum_of.get(key)
        if node is None:
            result = self._follow("add", func, args, {}, active)
            self.sum_of[key] = self.nodes[result]
            return result
        result = func(*args)
        self.nodes[result] = node
        self.on_sum_again(result, node)
        return result

    def _operands(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], active: list[Tensor]) -> list[Tensor]:
        """The two activations an operation adds, of one shape or the one broadcast, a factor of the second noted."""
        if not active[0].is_floating_point() or active[0].dim() < 2:  # losses and counts are no activations
            return []
        if not self._fit(name, active):
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
            note: Note = self.nodes[active[1]].note
            scaled = self._scaled_by(note, active[1], factor)
            if scaled is not None:  # the operand itself is not scaled: there is no factor to see past
                gains = self.statics.zero_gain(factor) if self.wake and isinstance(factor, Tensor) else ()
                self.nodes[active[1]].note = note.with_(woken=scaled.woken, silent=(*note.silent, *gains))
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

    def _residual(self, name: str, args: Sequence[Any], operands: Sequence[Tensor]) -> Residual | None:
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
        if branch.note.discrete is not None and branch.note.discrete.number > found.ancestor.number:
            return None  # a code word, looked up by the index of the one nearest to the shortcut
        if self._gain_of_skip(name, args, operands, found) is _Gain.NOISE:
            return None  # what each channel keeps is a choice of the layer's, and none of it is carried on as it is
        self.sums += 1
        if self.sums - 1 in self.refused:
            return None
        self.silencing.update(branch.note.silent)
        return found

    def _gain_of_skip(
        self, name: str, args: Sequence[Any], operands: Sequence[Tensor], found: Residual
    ) -> _Gain | None:
        """The learned numbers by which the skip of an addition is multiplied; None of one that is a projection."""
        node, gain = self.nodes[operands[1 - found.branch]], None
        if found.weighted_shortcut:
            return None
        if name == "addcmul" and found.branch == 0:
            gain = self._gain(args[2] if args[1] is operands[1] else args[1])
        while gain is None and node is not found.ancestor and len(set(node.parents)) == 1:
            node, gain = node.parents[0], node.note.gain
        return gain

    def _gain(self, factor: Any) -> _Gain | None:
        if not isinstance(factor, Tensor) or factor.numel() < 2 or factor.is_complex() or not self.statics.owns(factor):
            return None
        values = factor.detach().float()
        return _Gain.NOISE if values.var(correction=0) > values.mean().square() else _Gain.ALIKE

    def _find_inner(self, ancestor: Node, shortcut: Node) -> None:
        """Find the sums with a scaled skip that lie inside of a branch that is about to be added."""
        for node in reversed(self.scaled_skips):
            if node.number <= ancestor.number:
                break
            if ancestor.dominates(node) and not node.dominates(shortcut):
                self.inner.add(node)

    def _left_of_sum(self, name: str, active: Sequence[Tensor]) -> tuple[Node, ...]:
        """What is left of a sum of which one operand takes the other away again: ``q`` of ``x + (q - x)``.

        So quantizers let the gradient of their result go to their input. Nothing of ``x`` is in the sum.
        """
        first, second = (self.nodes[tensor] for tensor in active)
        for other, one in ((first, second), (second, first)):
            difference: tuple[Node, Node] | None = one.note.difference
            if name == "add" and difference is not None:
                if difference[1] is _without_views(other):
                    return (difference[0],)
                if difference[0] is difference[1]:
                    return (other,)
        return ()

    # One operation on activations.

    def _run(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], active: list[Tensor]) -> Any:
        """Execute an operation on activations and note what it makes."""
        known = self.nodes.by_id
        parents: Sequence[Node] = [known[id(tensor)] for tensor in active]
        difference = None
        if len(parents) == 2 and name in op.SUMS:
            parents = self._left_of_sum(name, active) or parents
            if name == "sub" and args[0] is active[0] and args[1] is active[1] and kwargs.get("alpha", 1) == 1:
                difference = _without_views(parents[0]), _without_views(parents[1])
        weight, bias = op.weight_and_bias(name, args)
        silent = self._silenced_by(name, args, weight, parents) if self.wake else ()
        note = self._note_after(name, args, active, parents, weight, bias)
        written = op.name_and_written(func)[1]
        looked_up = args[0] is not active[0]
        if looked_up and name in op.ATTENTION:  # learned queries begin a stream of their own
            note = note.with_(stream=-self.created, point=None, normalized=False)
        gain = None
        if name in op.SCALING and len(active) == 1 and len(args) > 1:
            gain = self._gain(args[1] if args[0] is active[0] else args[0])
        result = func(*args, **kwargs)
        nodes = []
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if _is_activation(tensor, active):
                made = note.after(name, args, tensor.shape, self.created)
                if silent and not bool(tensor.any()):
                    made.silent = silent
                made.gain = gain
                if name in ("mm", "bmm") and len(active) == 1 and args[0] is active[0]:
                    made.weight_factors = self.statics.of(args[1]).factors
                if difference is not None:
                    made.difference = difference
                elif name in op.VIEW and len(parents) == 1:
                    made.viewed = _without_views(parents[0])
                step = step_of(name, active, tensor, looked_up=looked_up)
                if looked_up and step.weighted and name in op.PARTIAL:
                    made.axis = tensor.dim() - 1
                elif step.weighted and op.multiplies_from_left(name, args, active):
                    # Rows are channels then; a single one is a sum of activations with weights, and of their layout.
                    rows = tensor.shape[-2] if tensor.dim() > 1 else len(tensor)
                    made.axis = None if rows == 1 else max(tensor.dim() - 2, 0)
                    step = NO_STEP if rows == 1 else step
                node = Node(parents, step, made)
                if made.discrete is not None or len(parents) > 1:
                    assert node.dominator is not None
                    made.discrete = node.dominator.note.discrete
                if tensor.dtype == torch.int64 and active[0].is_floating_point():
                    made.discrete = node
                nodes.append(node)
                self.created += 1
                self.nodes[tensor] = node
                if written and base_of_view(tensor) is not None:
                    self._note_write(name, args, tensor, node)
        self.on_made(nodes)
        first = isinstance(result, (tuple, list)) and (name in op.RECURRENT or name in op.EMBEDDING)
        output = result[0] if first else result
        if nodes and nodes[0].step.weighted and isinstance(output, Tensor) and id(output) in known:
            self.on_weighted(active[0], output)
        return result

    def _note_write(self, name: str, args: Sequence[Any], view: Tensor, node: Node) -> None:
        """If an operation has written through a view, the whole it views now depends on what was written."""
        base = base_of_view(view)
        through = any(view is value for value in args)
        if base is None or not through or (name in op.VIEW and name != "copy"):
            return
        whole = self.nodes.get(base)
        parents = [node] if whole is None else [whole, node]
        source: Note = parents[0].note
        note = Note(
            shape=tuple(base.shape),
            axis=None if whole is None else source.axis,
            order=self.created,
            operation=name,
            stream=source.stream,
            point=source.point,
            normalized=source.normalized,
        )
        self.nodes[base] = Node(parents, note=note)

    def _silenced_by(
        self, name: str, args: Sequence[Any], weight: Tensor | None, parents: Sequence[Node]
    ) -> tuple[str, ...]:
        """The zero gains that may make a result zero: those its inputs carry, and those multiplied in now."""
        silent = [gain for parent in parents for gain in parent.note.silent]
        if weight is not None:
            silent += self.statics.zero_gain(weight) if name in op.NORM else self.statics.of(weight).silent
        elif name in op.SCALING:
            factors = [t for t in args if isinstance(t, Tensor) and id(t) not in self.nodes.by_id]
            silent += [gain for factor in factors for gain in self.statics.zero_gain(factor)]
        return tuple(dict.fromkeys(silent)) if silent else ()

    # Scalings.

    def _note_after(
        self,
        name: str,
        args: Sequence[Any],
        active: Sequence[Tensor],
        parents: Sequence[Node],
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Note:
        """The note of an operation's main input with the scalings as they are after the operation.

        Runs before the operation, since an operation in place leaves nothing to look back on.
        """
        main: Note = parents[0].note
        if name in op.VIEW:
            return self._with_woken(main, parents)
        if name == "add" and len(active) == 1:
            if main.weight_factors:
                added = args[1] if args[0] is active[0] else args[0]
                of_bias = self.statics.of(added).factors if isinstance(added, Tensor) else ()
                main = main.with_(factors=common_factors(main.weight_factors, of_bias))
            return self._with_woken(main.with_(gated=False) if main.gated else main, parents)
        if name in op.SCALING:
            if len(active) == 1 and (name == "mul" or args[0] is active[0]):
                other = args[1] if args[0] is active[0] else args[0]
                scaled = self._scaled_by(main, active[0], other, inverse=name == "div")
                if scaled is not None:
                    return scaled
            elif len(active) == 2 and name == "mul":
                return self._with_woken(_note_of_product(active, parents), parents)
            elif len(active) == 2:  # divided by its own size, or what the input makes of it
                main = main.with_(normalized=True)
        elif name == "cat" and len(set(parents)) > 1:  # of several signals the one that has come furthest
            deepest: Note = max(parents, key=lambda parent: parent.level).note
            main = main.with_(stream=deepest.stream, point=deepest.point, mixed=True)
            main.normalized, main.averaged = deepest.normalized, deepest.averaged
        factors: tuple[Factor, ...] = ()
        if weight is not None and bias is not None and name not in op.NORM:
            factors = common_factors(self.statics.of(weight).factors, self.statics.of(bias).factors)
        elif name == "add" and len(parents) == 2 and main.unscaled is None:
            factors = equal_factors(main.factors, parents[1].note.factors)
        elif name in op.HOMOGENEOUS and len(active) == 1 and main.unscaled is None:
            factors = tuple(one for one in numbers_among(main.factors) if one.value > 0)
        if factors or main.factors or main.unscaled is not None or main.gated:
            main = main.with_(factors=factors, unscaled=None, gated=False)
        return self._with_woken(main, parents, weight, bias)

    def _scaled_by(self, note: Note, x: Tensor, other: Any, *, inverse: bool = False) -> Note | None:
        """The note of ``x`` multiplied by something that does not depend on the input; None if that is no scaling.

        A factor that can be divided out later is remembered; where it cannot (zero, a mask over examples, half
        precision that underflows) the statistics are taken now.
        """
        statics = self.statics
        woken = note.woken
        if isinstance(other, Tensor):
            woken = tuple(dict.fromkeys([*woken, *statics.of(other).woken]))
        factor = statics.factor(other, inverse=inverse)
        if factor is not None and factor.constant and note.gated:
            return note.with_(gated=False, woken=woken)  # the gate's own constant, restoring what it halves
        if factor is None:
            axis = varying_axis(x, other) if isinstance(other, Tensor) else None
            if axis == note.channel_axis and axis is not None:
                factor = vector_factor(other, inverse=inverse)
            elif axis is not None and axis != 0 and statics.owns(other):
                note.axis = axis  # a learned gain knows its channels; a linear layer over tokens had them wrong
            elif axis != 0:
                return None
        if note.unscaled is not None:
            return note.with_(gated=False, woken=woken)
        if factor is None or factor.vanishes or x.dtype == torch.float16:
            return note.with_(unscaled=self.measure_before_scaling(x), factors=(), gated=False, woken=woken)
        return note.with_(factors=(*note.factors, factor), gated=False, woken=woken)

    def _with_woken(self, note: Note, parents: Sequence[Node], *weights: Tensor | None) -> Note:
        """The note with all woken gains that its inputs and the weights carry."""
        if not self.statics.woken:
            return note
        names = [name for parent in parents for name in parent.note.woken]
        names += [name for tensor in weights if tensor is not None for name in self.statics.of(tensor).woken]
        return note.with_(woken=tuple(dict.fromkeys(names))) if names else note


def running_function() -> BackwardCFunction | None:
    """The autograd function, written in Python, whose backward is running."""
    node = current_autograd_node()
    return node if isinstance(node, BackwardCFunction) else None


def differentiates() -> bool:
    """Whether an operation of a backward pass runs, other than one that a Python function runs again."""
    return current_autograd_node() is not None and running_function() is None


def _is_activation(made: Any, active: Sequence[Tensor]) -> bool:
    """Whether what an operation made of activations has values, and is an activation.

    What is sparse and made of dense ones holds weights, and is none; of sparse inputs alone it is one still.
    """
    if not isinstance(made, Tensor) or made.numel() == 0:
        return False
    return made.layout not in SPARSE or all(tensor.layout in SPARSE for tensor in active)


def _without_views(node: Node) -> Node:
    """The activation that has the values of one, before all views."""
    return node.note.viewed or node


def _note_of_product(active: Sequence[Tensor], parents: Sequence[Node]) -> Note:
    """The note of a product of two activations; a smaller one is a gate, and its scaling scales the product."""
    main: Note = parents[0].note
    sizes = [prod(s for s, stride in zip(t.shape, t.stride(), strict=True) if stride) for t in active]
    if sizes[0] == sizes[1]:
        return main.with_(factors=(), unscaled=None, gated=False)
    values, gate = (0, 1) if sizes[0] > sizes[1] else (1, 0)
    main = parents[values].note
    if parents[gate].note.operation in op.INVERSE_SIZE:
        main = main.with_(normalized=True)
    side: tuple[Factor, ...] = parents[gate].note.factors
    factors = (*main.factors, *gate_scaling(side))
    return main.with_(factors=factors, unscaled=None, gated=not factors and not side)


# What an operation adds to the paths that run through it.
_WEIGHTED, _LOOKED_UP = Path(weighted=1, mixing=1), Path(weighted=1, mixing=1, nonlinear=1)
_PRODUCT, _MIXED = Path(mixing=1, nonlinear=1), Path(mixing=1)
_BENT, _PART = Path(nonlinear=1), Path(partial=1)


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
        return _WEIGHTED if weighted else _PRODUCT
    if name in op.CONVOLUTION:
        return _WEIGHTED
    if name in op.EMBEDDING or name in op.RECURRENT:  # neither a lookup nor a recurrence is linear
        return _LOOKED_UP
    if name in op.ATTENTION:
        return _PRODUCT
    if name in op.POOL:
        return _MIXED
    if name in op.NONLINEAR or (name == "mul" and len(active) > 1) or result.dtype == torch.bool:
        return _BENT
    if name in op.PARTIAL:
        if looked_up:  # rows of a table that the input numbers, as an embedding is
            return _LOOKED_UP
        if result.numel() < active[0].numel():
            return _PART
    return NO_STEP
