"""The dataflow of someone else's model as conversion needs it: what every layer and every norm is fed by, and feeds.

The signal recorder already knows each activation, its ancestors and which additions are residual. Here it also
keeps the operations between the activations (so that an activation function can be run again on numbers of our
choice) and the calls of the modules that conversion may exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from normfree.convert.kinds import is_layer, is_norm
from normfree.convert.weights import FollowedWeights, biasless, is_foreign, zero_biases
from normfree.trace import operations as op
from normfree.trace.graph import Node, Residual
from normfree.trace.inputs import Batch, ModuleStack, examples_in, run_once, tensors_of
from normfree.trace.preserve import Preserved, untouched
from normfree.trace.recorder import Recorder


@dataclass(frozen=True, eq=False)
class Step:
    """One operation on activations.

    Attributes:
        name: as :mod:`normfree.trace.operations` names it.
        function: the operation itself.
        args, kwargs: its arguments, activations replaced by their nodes.
        inputs: the activations among them, in order.
        outputs: the activations it made.
        module: the innermost running module.
        number: how many operations ran before it.
        learned: among its other arguments is a parameter, or what was computed from one.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    module: str
    number: int = 0
    learned: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """One run of a module that conversion may exchange (or that makes an activation as a whole).

    Attributes:
        name: the module's qualified name.
        module: the module.
        input, output: activations it took (the first) and gave; None where it took or gave none.
        place: its name in the module that called it; "" where that module does not hold it.
    """

    name: str
    module: nn.Module
    input: Node | None
    output: Node | None
    place: str = ""


@dataclass(frozen=True, eq=False)
class Addition:
    """A residual addition: ``output = shortcut + branch``, both from ``ancestor``."""

    name: str
    ancestor: Node
    shortcut: Node
    branch: Node
    output: Node


@dataclass(eq=False)
class Dataflow:
    """What one forward pass did.

    Attributes:
        steps: every operation on activations, in order.
        calls: runs of leaf modules, norms and layers, in the order they ended.
        additions: the residual ones.
        outputs: what the model returned.
        numbers: the activations that are no floating-point numbers: indices, masks, counts.
        parameter_readers: the modules in which an operation read a parameter, by where its memory begins.
        foreign: by name, the modules with a weight that are neither norms nor layers of torch's.
        weights: what became of their parameters.
    """

    steps: list[Step] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    numbers: set[Node] = field(default_factory=set)
    made_by: dict[Node, Step] = field(default_factory=dict)
    read_by: dict[Node, list[Step]] = field(default_factory=dict)
    shapes: dict[Node, tuple[int, ...]] = field(default_factory=dict)
    parameter_readers: dict[int, set[str]] = field(default_factory=dict)
    foreign: dict[str, nn.Module] = field(default_factory=dict)
    weights: FollowedWeights | None = None

    def add(self, step: Step) -> None:
        """Enter an operation."""
        self.steps.append(step)
        for node in step.outputs:
            self.made_by[node] = step
        for node in step.inputs:
            self.read_by.setdefault(node, []).append(step)

    def note(self, node: Node, tensor: Tensor) -> None:
        """Enter an activation's shape, and whether it is one of numbers that no variance belongs to."""
        self.shapes[node] = tuple(tensor.shape)
        if not (tensor.is_floating_point() or tensor.is_complex()):
            self.numbers.add(node)

    def readers(self, node: Node) -> Sequence[Step]:
        """The operations that read an activation."""
        return self.read_by.get(node, ())

    def is_read_twice(self, node: Node) -> bool:
        """Whether more than one operation reads an activation, or one does and the model returns it, too."""
        return len({id(step) for step in self.readers(node)}) + (node in self.outputs) > 1

    @cached_property
    def steps_of(self) -> dict[str, list[Step]]:
        """The operations that ran inside each module, its parts included, by its name."""
        found: dict[str, list[Step]] = {}
        for step in self.steps:
            name = step.module
            found.setdefault(name, []).append(step)
            while name:
                name = name.rpartition(".")[0]
                found.setdefault(name, []).append(step)
        return found

    def within(self, module: str) -> Sequence[Step]:
        """The operations that ran inside a module, by name."""
        return self.steps_of.get(module, ())

    @cached_property
    def calls_of(self) -> dict[str, list[Call]]:
        """The calls of every recorded module, by name."""
        return self.called(lambda module: True)

    def called(self, kind: Callable[[nn.Module], bool]) -> dict[str, list[Call]]:
        """The calls of every module of a kind, by name, in the order they first ran."""
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            if kind(call.module):
                found.setdefault(call.name, []).append(call)
        return found

    def backwards(self, node: Node, stop: Callable[[Node], bool]) -> Iterator[Node]:
        """``node`` and all it was computed from, not looking behind an activation where ``stop`` holds."""
        seen, waiting = {node}, [node]
        while waiting:
            current = waiting.pop()
            yield current
            if stop(current):
                continue
            for parent in current.parents:
                if parent not in seen and parent.dominator is not None:
                    seen.add(parent)
                    waiting.append(parent)


class DataflowRecorder(Recorder):
    """Keeps operations and residual additions; measures nothing."""

    broadcast_branches = False  # their factors would have to be one per position

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.flow = Dataflow()
        self.flow.parameter_readers = {parameter.data_ptr(): set() for parameter in model.parameters()}
        self.flow.foreign = {name: module for name, module in model.named_modules() if is_foreign(module)}
        self.statics = self.weights = self.flow.weights = FollowedWeights(model)
        self.entered: list[tuple[nn.Module, Node | None]] = []
        self.learned: Any = WeakTensorKeyDictionary()
        """Parameters, and what was computed from them alone."""
        for parameter in model.parameters():
            self.learned[parameter] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        tensors = op.tensors_in(args, kwargs or {})
        for tensor in tensors:
            if (readers := self.flow.parameter_readers.get(_place(tensor))) is not None:
                readers.add(self.stack.name)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if any(tensor in self.learned for tensor in tensors) and not any(tensor in self.nodes for tensor in tensors):
            for made in tree_leaves(result):
                if isinstance(made, Tensor):
                    self.learned[made] = True
        return result

    def on_addition(self, found: Residual, operands: Sequence[Tensor], run: Callable[[], Tensor]) -> Tensor:
        """Note which operand was what, before an addition in place makes the one into the sum."""
        nodes = [self.nodes[operand] for operand in operands]
        result = run()
        branch, shortcut = nodes[found.branch], nodes[1 - found.branch]
        self.flow.additions.append(Addition(self.stack.name, found.ancestor, shortcut, branch, self.nodes[result]))
        return result

    def _run(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], active: list[Tensor]) -> Any:
        inputs = tuple(self.nodes[tensor] for tensor in active)
        known = {id(tensor): node for tensor, node in zip(active, inputs, strict=True)}

        def noted(value: Any) -> Any:
            return known.get(id(value), value) if isinstance(value, Tensor) else value

        kept, kept_kwargs = tree_map(noted, tuple(args)), tree_map(noted, dict(kwargs))
        for tensor, node in zip(active, inputs, strict=True):
            self.flow.shapes.setdefault(node, tuple(tensor.shape))
        learned = any(tensor in self.learned for tensor in op.tensors_in(args, kwargs))
        result = super()._run(name, func, args, kwargs, active)
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor) and tensor in self.nodes]
        outputs = tuple(self.nodes[tensor] for tensor in made)
        for tensor, node in zip(made, outputs, strict=True):
            self.flow.note(node, tensor)
        number = len(self.flow.steps)
        self.flow.add(Step(name, func, kept, kept_kwargs, inputs, outputs, self.stack.name, number, learned))
        running = self.stack.running[-1] if self.stack.running else None
        self.weights.note(name, args, kept, kept_kwargs, next(iter(outputs), None), running)
        return result

    def node_in(self, value: Any) -> Node | None:
        """The first activation in a module's arguments or result."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf in self.nodes:
                return self.nodes[leaf]
        return None

    def enter(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A module begins: remember what it was given."""
        self.entered.append((module, self.node_in((inputs, named))))
        self.weights.runs[module] = self.weights.runs.get(module, 0) + 1

    def leave(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """A module ends: its call is complete."""
        if self.entered and self.entered[-1][0] is module:
            _, node = self.entered.pop()
            if _is_of_interest(module):
                call = Call(self.stack.names[module], module, node, self.node_in(output), self._place_of(module))
                self.flow.calls.append(call)
            made = self.nodes.get(output) if isinstance(output, Tensor) else None
            self.weights.returned.setdefault(module, []).append(made)

    def _place_of(self, module: nn.Module) -> str:
        """The name of a module that has just run in the one that called it; "" where that one does not hold it."""
        if not self.stack.running:
            return ""
        caller = self.stack.running[-1]
        attribute = next((name for name, child in caller._modules.items() if child is module), None)
        return "" if attribute is None else f"{self.stack.names[caller]}.{attribute}".removeprefix(".")


def _place(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 for one that has none of its own, such as a sparse one."""
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


def _is_of_interest(module: nn.Module) -> bool:
    leaf = next(module.children(), None) is None
    return leaf or is_norm(module) or is_layer(module) or bool(module._buffers)


@contextmanager
def resting(model: nn.Module, *, heads: bool, statistics: str = "running") -> Iterator[Preserved]:
    """Put a model into evaluation mode and back; with ``heads`` its containers believe that they are training.

    Auxiliary heads run in training alone. Dropout, which has no children, stays in evaluation mode, and so do norms,
    unless their ``statistics`` are to be those of the "batch", as in training.
    """
    with untouched(model, "eval" if statistics == "running" else "batch-statistics") as preserved:
        for module in model.modules():
            if heads and next(module.children(), None) is not None and not is_norm(module):
                module.training = True
        yield preserved


def record_all(model: nn.Module, batch: Batch) -> tuple[Dataflow, bool]:
    """Record a model, with its auxiliary heads if only so all norms run; also whether that was so."""
    flow = record(model, batch)
    norms = sum(is_norm(module) for module in model.modules())
    if len(flow.called(is_norm)) == norms:
        return flow, False
    try:
        more = record(model, batch, heads=True)
    except ValueError:  # training wants something else, such as targets
        return flow, False
    return (more, True) if len(more.called(is_norm)) > len(flow.called(is_norm)) else (flow, False)


def record(
    model: nn.Module,
    batch: Batch,
    *,
    heads: bool = False,
    state: Callable[[], AbstractContextManager[Preserved]] | None = None,
) -> Dataflow:
    """Run a model once and keep its dataflow; the model is given back as it was.

    Foreign layers that could have a bias have one of zeros meanwhile, if the model takes that.

    Args:
        model: the model, which runs in evaluation mode.
        batch: its input.
        heads: have what runs in training alone run, too.
        state: another mode that it runs in: a context that puts it into that and back, and preserves it.

    Raises:
        ValueError: the model does not take the batch; one line says where it failed.
    """
    state = state or partial(resting, model, heads=heads)
    if without := biasless(model):
        try:
            with zero_biases(without):
                return _record(model, batch, state())
        except ValueError:  # not such a bias
            pass
    return _record(model, batch, state())


def _record(model: nn.Module, batch: Batch, state: AbstractContextManager[Preserved]) -> Dataflow:
    with state as preserved:
        stack = ModuleStack(model)
        tensors = tensors_of(batch)
        recorder = DataflowRecorder(
            model,
            tensors,
            stack=stack,
            before_writing=preserved.before_writing,
            examples=examples_in(batch),
            wake=False,
        )
        for tensor in tensors:
            recorder.flow.note(recorder.nodes[tensor], tensor)
        # Not torch's hooks for all modules: of one that takes keyword arguments, removal leaves a trace.
        first = {"with_kwargs": True, "prepend": True}
        handles = []
        try:
            for module in stack.names:
                if not _is_of_interest(module) and not is_foreign(module):
                    continue
                handles.append(module.register_forward_pre_hook(recorder.enter, **first))
                handles.append(module.register_forward_hook(recorder.leave, **first))
            with preserved.guarding(tensors), torch.no_grad(), stack.followed(), recorder:
                outputs = run_once(model, batch, stack)
            recorder.flow.outputs = [recorder.nodes[t] for t in outputs if t in recorder.nodes]
        finally:
            for handle in handles:
                handle.remove()
    return recorder.flow


def passes_unchanged(step: Step) -> bool:
    """Whether an operation carries its one input on as it is, but for its layout."""
    return step.name in op.VIEW and len(step.inputs) == 1
