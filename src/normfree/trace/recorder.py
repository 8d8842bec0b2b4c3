"""The recorder: follows every operation of one forward pass and finds each residual addition.

It sits below autograd, so it sees whatever runs, however the model's code looks; it keeps no activation
alive and leaves nothing on any module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normfree.signal.moments import Moments, channel_moments
from normfree.trace import operations as op
from normfree.trace.channels import likely_axis
from normfree.trace.flow import Note, noted_after, replace, scaled_by, step_of
from normfree.trace.graph import Node, Residual, residual
from normfree.trace.modules import ModuleStack
from normfree.trace.scaling import before_scaling
from normfree.trace.statics import Statics, written_by
from normfree.trace.tensor_map import TensorMap

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
            for target in written_by(func, args, kwargs):
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
            if note.moments is not None:
                note.moments = channel_moments(x, note.axis, examples=self.examples)

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
            scaled = scaled_by(note, active[1], factor, self.statics, self.moments_of)
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
        note = noted_after(name, args, active, parents, (weight, bias), self.statics, self.moments_of)
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

    # Measuring.

    def moments_of(self, x: Tensor) -> Moments | None:
        """The statistics of an activation as it was before the scalings it carries; None of what has no channels."""
        note: Note = self.nodes[x].note
        if note.unscaled is not None:
            return note.unscaled
        if not -x.dim() <= note.channel_axis < x.dim():  # a sum or a mean of everything has no channels
            return None
        return before_scaling(channel_moments(x, note.channel_axis), note.factors)
