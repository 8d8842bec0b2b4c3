"""The recorder: watches every operation of one forward pass and measures each residual addition.

It sits below autograd, so it sees whatever runs, however the model's code looks; it keeps no activation
alive and leaves nothing on any module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normfree.signal import operations as op
from normfree.signal.channels import likely_axis
from normfree.signal.flow import Note, noted_after, scaled_by, step_of
from normfree.signal.graph import Additions, Node, Residual, residual
from normfree.signal.modules import ModuleStack
from normfree.signal.moments import Moments, channel_moments
from normfree.signal.scaling import before_scaling
from normfree.signal.statics import Statics, written_by
from normfree.signal.tensor_map import TensorMap


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured point: the entry of the network, a residual addition, or a weighted layer."""

    name: str
    kind: str
    shape: tuple[int, ...]
    channel_axis: int
    output: Moments
    branch: Moments | None = None
    transition: bool = False
    encloses: int = 0
    woken: tuple[str, ...] = ()


@dataclass
class Recording:
    """What one forward pass gave."""

    entry: Point | None = None
    points: list[Point] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Records the dataflow of one forward pass; open it around the call.

    Args:
        model: the model that will run.
        inputs: the tensors it is given, each a source of its own.
        stack: the running modules.
        before_writing: told of every tensor about to be written.
        examples: number of examples in the batch, None if unknown.
        wake: measure branches silenced by a zero gain as if it were one.
    """

    follows_weights = True

    def __init__(
        self,
        model: nn.Module,
        inputs: Iterable[Tensor],
        *,
        stack: ModuleStack,
        before_writing: Callable[[Tensor], None],
        examples: int | None,
        wake: bool = True,
    ) -> None:
        super().__init__()
        self.recording = Recording()
        self.stack = stack
        self.examples = examples
        self.before_writing = before_writing
        self.statics = Statics(model, before_writing, wake=wake)
        self.nodes: TensorMap[Node] = TensorMap()
        self.created = 0
        self.begun: list[tuple[nn.Module, tuple[Any, ...]]] = []
        self.measuring = False
        root = Node((), note=Note())
        for tensor in inputs:
            # Of three axes the channels may be the second (sequences) or the last (tokens): the first layer tells.
            axis = likely_axis(tensor.dim()) if tensor.dim() > 3 else None
            self.nodes[tensor] = Node((root,), note=Note(shape=tuple(tensor.shape), axis=axis))

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
        found = residual(self.nodes[operands[0]], self.nodes[operands[1]]) if operands else None
        if found and name == "sub" and found.branch == 0:
            found = None  # what is left of a branch without its input (pool(x) - x) carries nothing on
        return self.on_addition(found, operands, run) if found else run()

    def _learn_axis(self, x: Tensor, weight: Tensor | None) -> None:
        """A convolution tells where the channels of its input are, should nothing before it have."""
        note: Note = self.nodes[x].note
        if note.axis is None and weight is not None:
            note.axis = x.dim() - weight.dim() + 1
            if note.moments is not None:
                note.moments = channel_moments(x, note.axis, examples=self.examples)

    def _added(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], active: list[Tensor]) -> list[Tensor]:
        """The two activations of one shape an operation adds, a factor of the second noted; else nothing."""
        if len(active) != 2 or active[0].shape != active[1].shape:
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
                self.nodes[active[1]].note = replace(note, woken=scaled.woken)
        return active

    def _run(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], active: list[Tensor]) -> Any:
        """Execute an operation on activations and note what it makes."""
        parents = [self.nodes[t] for t in active]
        weight, bias = op.weight_and_bias(name, args)
        if name in op.NORM and weight is not None:
            self.statics.wake(weight)
        note = noted_after(name, args, active, parents, (weight, bias), self.statics, self.moments_of)
        result = func(*args, **kwargs)
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                made = note.made(name, args, tensor.shape, self.created)
                self._add_node(name, args, tensor, Node(parents, step_of(name, active, tensor), made))
        output = result[0] if name in op.RECURRENT and isinstance(result, (tuple, list)) else result
        if isinstance(output, Tensor) and self.nodes[output].step.weighted:
            self.on_weighted(active[0], output)
        return result

    def _add_node(self, name: str, args: Sequence[Any], tensor: Tensor, node: Node) -> None:
        self.created += 1
        self.nodes[tensor] = node
        if (name in op.VIEW and name != "copy") or not tensor._is_view() or not any(tensor is a for a in args):
            return
        base = tensor._base  # written through a view: the whole now depends on this too
        if isinstance(base, Tensor):
            whole = self.nodes.get(base)
            axis = whole.note.axis if whole is not None else None
            parents = [node] if whole is None else [whole, node]
            self.nodes[base] = Node(parents, note=Note(shape=tuple(base.shape), axis=axis, order=self.created))

    # Measuring.

    def moments_of(self, x: Tensor) -> Moments | None:
        """The statistics of an activation as it was before the scalings it carries; None of what has no channels."""
        note: Note = self.nodes[x].note
        if note.unscaled is not None:
            return note.unscaled
        if not -x.dim() <= note.channel_axis < x.dim():  # a sum or a mean of everything has no channels
            return None
        return before_scaling(channel_moments(x, note.channel_axis), note.factors)


class ResidualRecorder(Recorder):
    """Measures the entry, every residual addition, and its branch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.additions = Additions()
        self.received: dict[nn.Module, Node] = {}

    def on_module(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Until the first addition shows which module is the first block, keep what each container receives."""
        if self.additions or next(module.children(), None) is None:
            return
        for x in inputs:
            if isinstance(x, Tensor) and x in self.nodes and x.is_floating_point() and x.dim() > 1:
                self._measure_once(x)
                self.received[module] = self.nodes[x]
                return

    def on_use(self, x: Tensor) -> None:
        """An activation read twice may be the ancestor of the first addition."""
        note: Note = self.nodes[x].note
        note.uses += 1
        if note.uses == 2 and not self.additions and x.is_floating_point() and x.dim() > 1:
            self._measure_once(x)

    def on_addition(self, found: Residual, operands: Sequence[Tensor], run: Callable[[], Tensor]) -> Tensor:
        """Measure the branch, add, measure the sum."""
        branch, shortcut = operands[found.branch], operands[1 - found.branch]
        branch_note, shortcut_node = self.nodes[branch].note, self.nodes[shortcut]
        axis = shortcut_node.note.axis if shortcut_node.note.axis is not None else branch_note.axis
        axis = likely_axis(branch.dim()) if axis is None else axis
        if not self.additions:
            self.recording.entry = self._entry(found.ancestor, shortcut)
        branch_note.axis = axis
        before = self.moments_of(branch)
        encloses = self.additions.enclosed(found.ancestor, shortcut_node)
        result = run()
        node = self.nodes[result]
        node.note = Note(shape=tuple(result.shape), axis=axis, order=self.created)
        self.additions.append(node)
        self.recording.points.append(
            Point(
                name=self.stack.name,
                kind="residual",
                shape=tuple(result.shape),
                channel_axis=axis,
                output=channel_moments(result, axis, examples=self.examples),
                branch=before,
                transition=found.weighted_shortcut or found.ancestor.note.shape != tuple(result.shape),
                encloses=encloses,
                woken=branch_note.woken,
            )
        )
        return result

    def _measure_once(self, x: Tensor) -> None:
        note: Note = self.nodes[x].note
        if note.moments is None:
            self.measuring = True
            note.moments = channel_moments(x, note.channel_axis, examples=self.examples)
            self.measuring = False

    def _entry(self, ancestor: Node, shortcut: Tensor) -> Point:
        """The input of the block whose addition is the first: before any pre-activation, after any pooling."""
        entry, name = ancestor, self.stack.name
        for module in reversed(self.stack.running):
            node = self.received.get(module)
            if node is not None and node.dominates(ancestor):
                since = ancestor.path - node.path
                if since.weighted == since.mixing == 0:
                    entry, name = node, self.stack.names[module]
                    break
        note: Note = entry.note
        if note.moments is None:  # read once, by an operation with several results: its shortcut is what is left
            self._measure_once(shortcut)
            note = self.nodes[shortcut].note
        assert note.moments is not None
        return Point(name=name, kind="entry", shape=note.shape, channel_axis=note.channel_axis, output=note.moments)


class LayerRecorder(Recorder):
    """Measures the output of every weighted operation, for models without residual additions."""

    def on_weighted(self, x: Tensor, result: Tensor) -> None:
        """Measure a layer's output, and once the input of the first."""
        if result.dim() < 2 or not result.is_floating_point():
            return
        if self.recording.entry is None:
            self.recording.entry = self._point(x, "entry")
        self.recording.points.append(self._point(result, "layer"))

    def _point(self, x: Tensor, kind: str) -> Point:
        note: Note = self.nodes[x].note
        axis = note.channel_axis
        moments = channel_moments(x.float() if not x.is_floating_point() else x, axis, examples=self.examples)
        shape = tuple(x.shape)
        return Point(name=self.stack.name, kind=kind, shape=shape, channel_axis=axis, output=moments, woken=note.woken)
