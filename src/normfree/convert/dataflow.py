"""Recording someone else's model: every operation on activations, what the parameters were read for, and the calls.

The recorder of :mod:`normfree.trace` knows each activation, its ancestors and which additions are residual. Here it
also keeps the operations between the activations (so that an activation function can be run again on numbers of our
choice), the calls of the modules that conversion may exchange, and follows the parameters of modules that are no layers
of torch's, through views, casts and constant factors, into the operations that read them: so it shows which module is
one linear map of its own weight.

In the order of this file: what a recording holds; how a model is run; the recorder; parameters; classes of modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from normfree import nn as ours
from normfree.convert.dropout import DropoutNoted
from normfree.nn.fold import attached_to
from normfree.trace import operations as op
from normfree.trace.graph import Node, Residual
from normfree.trace.inputs import (
    Batch,
    ModuleStack,
    call,
    copy_of,
    examples_in,
    is_without_values,
    run_once,
    tensors_in,
    tensors_of,
)
from normfree.trace.preserve import Mode, Preserved, Writes, preserve_model
from normfree.trace.recorder import Recorder, differentiates
from normfree.trace.scaling import Statics


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
        product: of a layer that is none of torch's, what its product makes, and the axis of the outputs in that.
        gives_more: it gave more than one activation in the form of what it took.
    """

    name: str
    module: nn.Module
    input: Node | None
    output: Node | None
    place: str = ""
    product: tuple[Node, int] | None = None
    gives_more: bool = False


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
        dropped: the activations that dropout acts on in training.
        without_values: the modules that ran on no rows of the input, whether or not they ran on others as well.
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
    dropped: set[Node] = field(default_factory=set)
    without_values: set[str] = field(default_factory=set)

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
        return self.calls_by_module(lambda module: True)

    def calls_by_module(self, kind: Callable[[nn.Module], bool]) -> dict[str, list[Call]]:
        """The calls of every module of a kind, by name, in the order they first ran."""
        found: dict[str, list[Call]] = {}
        for one in self.calls:
            if kind(one.module):
                found.setdefault(one.name, []).append(one)
        return found

    def laid_out(self, step: Step, x: Tensor) -> Tensor:
        """What an operation that carries its input on unchanged makes of another tensor, of that shape or all ones."""
        if step.name in ("permute", "transpose", "t"):
            return step.function(x, *step.args[1:], **step.kwargs)
        shape = self.shapes[step.outputs[0]]
        if self.shapes[step.inputs[0]] == shape:
            return x
        return x.expand(shape) if step.name == "expand" else x.reshape(shape)

    def outputs_in(self, node: Node, product: tuple[Node, int]) -> Tensor | None:
        """Which output of a product stands where in an activation after it: indices, in the activation's shape.

        Args:
            node: the activation.
            product: what the product made, and the axis of its outputs.

        Returns:
            The indices; None if anything but layout, cropping and an added constant lies between the two.
        """
        made, axis = product
        steps, current = list[Step](), node
        while current is not made:
            step = self.made_by.get(current)
            if step is None or len(step.inputs) != 1 or step.name == "as_strided":
                return None
            if not (passes_unchanged(step) or step.name in CROPPING or step.name == "add"):
                return None
            steps.append(step)
            current = step.inputs[0]
        shape = self.shapes[made]
        sizes = [1] * len(shape)
        sizes[axis] = shape[axis]
        indices = torch.arange(shape[axis]).view(sizes).expand(shape)
        for step in reversed(steps):
            if step.name in CROPPING:
                indices = step.function(indices, *step.args[1:], **step.kwargs)
            elif step.name == "add":
                indices = indices.expand(self.shapes[step.outputs[0]])
            else:
                indices = self.laid_out(step, indices)
        return indices

    def backwards(self, node: Node, stop: Callable[[Node], bool]) -> Iterator[Node]:
        """``node`` and all it was computed from, not looking before an activation where ``stop`` holds."""
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


CROPPING = frozenset({"slice", "narrow"})


def passes_unchanged(step: Step) -> bool:
    """Whether an operation carries its one input on as it is, but for its layout."""
    return step.name in op.VIEW and len(step.inputs) == 1


def factors_of(step: Step) -> tuple[float, ...] | None:
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
        return math.copysign(size, float(value.detach())) if value.numel() == 1 else size
    return float(value) if isinstance(value, (int, float)) else None


def record_all(model: nn.Module, batch: Batch) -> tuple[Dataflow, Trains]:
    """Record a model in evaluation mode, with its auxiliary heads if only so all norms run; also what trained then."""
    __tracebackhide__ = True
    flow = record(model, batch)
    norms = sum(is_norm(module) for module in model.modules())
    if len(flow.calls_by_module(is_norm)) == norms:
        return flow, None
    try:
        more = record(model, batch, trains=with_heads)
    except ValueError:  # training wants something else, such as targets
        return flow, None
    return (
        (more, with_heads) if len(more.calls_by_module(is_norm)) > len(flow.calls_by_module(is_norm)) else (flow, None)
    )


def record(model: nn.Module, batch: Batch, *, mode: Mode = "eval", trains: Trains = None) -> Dataflow:
    """Run a model once and keep its dataflow.

    Foreign layers that could have a bias have one of zeros meanwhile, if the model takes that.

    Args:
        model: the model.
        batch: its input.
        mode: that it runs in, as of :func:`prepare_run`.
        trains: which modules are in training mode, if not those that the mode puts into it.

    Raises:
        ValueError: the model does not take the batch; one line says where it failed.
    """
    __tracebackhide__ = True
    if without := biasless(model):
        try:
            with zero_biases(without):
                return _record(model, batch, mode, trains)
        except ValueError:  # not such a bias
            pass
    return _record(model, batch, mode, trains)


def _record(model: nn.Module, batch: Batch, mode: Mode, trains: Trains) -> Dataflow:
    __tracebackhide__ = True
    stack = ModuleStack(model)
    recorders: list[DataflowRecorder] = []
    foreign = {name: module for name, module in model.named_modules() if is_foreign(module)}  # before it has our hooks
    modules = [module for module in stack.names if _is_of_interest(module) or module in foreign.values()]
    before = [(module, lambda *given: recorders[0].enter(*given)) for module in modules]
    after = [(module, lambda *given: recorders[0].leave(*given)) for module in modules]
    options = {"mode": mode, "trains": trains, "before": before, "after": after, "first": True}
    with prepare_run(model, batch, **options) as (preserved, given):
        tensors = tensors_of(given)
        recorder = DataflowRecorder(
            model,
            tensors,
            foreign=foreign,
            stack=stack,
            before_writing=preserved.before_writing,
            examples=examples_in(given),
            wake=False,
        )
        recorders.append(recorder)
        for tensor in tensors:
            recorder.flow.note(recorder.nodes[tensor], tensor)
        with stack.follow_modules(), DropoutNoted(recorder.note_dropout), recorder:
            outputs = run_once(model, given, stack)
        recorder.flow.outputs = [recorder.nodes[t] for t in outputs if t in recorder.nodes]
    flow = recorder.flow
    flow.additions = [one for one in flow.additions if one.output not in recorder.inner]
    if not any(step.name in op.NONLINEAR for step in flow.steps):  # then a branch that is linear is one, too
        flow.additions = sorted(flow.additions + recorder.linear_additions, key=lambda one: one.output.number)
    return flow


Trains = Callable[[nn.Module], bool] | None
"""Which modules are in training mode in a run; None for those that the mode puts into it."""


def with_heads(module: nn.Module) -> bool:
    """Have containers believe that they are training, as auxiliary heads run in training alone.

    Dropout, which has no children, stays in evaluation mode, and so do norms.
    """
    return module.training or (next(module.children(), None) is not None and not is_norm(module))


Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]
"""What is called with a module, its positional and keyword arguments, and then its output."""


@contextmanager
def prepare_run(
    model: nn.Module,
    batch: Batch,
    *,
    mode: Mode = "eval",
    trains: Trains = None,
    before: Iterable[tuple[nn.Module, Before]] = (),
    after: Iterable[tuple[nn.Module, After]] = (),
    first: bool = False,
) -> Iterator[tuple[Preserved, Batch]]:
    """Prepare a model to run once, without gradients, and give it back as it was; every run of a conversion is such.

    Args:
        model: the model.
        batch: its input.
        mode: one of :data:`normfree.trace.preserve.Mode`.
        trains: which modules are in training mode, if not those that the mode puts into it.
        before: what to call before a module runs.
        after: what to call after it has run.
        first: before any other hook of the module.

    Yields:
        The keeper of the model's state, and the batch in memory of its own.
    """
    # Not torch's hooks for all modules: of one that takes keyword arguments, removal leaves a trace.
    handles = []
    with preserve_model(model, mode) as preserved:
        if trains is not None:
            for module in model.modules():
                module.training = trains(module)
        try:
            for module, hook in before:
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first))
            for module, hook in after:
                handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=first))
            with torch.no_grad():
                yield preserved, copy_of(batch)
        finally:
            for handle in handles:
                handle.remove()


def run_prepared(model: nn.Module, batch: Batch, **options: Any) -> list[Tensor]:
    """Run a model once as :func:`prepare_run` says; the tensors of its output."""
    with prepare_run(model, batch, **options) as (keeper, given), Writes(keeper):
        return tensors_in(call(model, given))


class DataflowRecorder(Recorder):
    """Keeps operations and residual additions; measures nothing."""

    broadcast_branches = False  # their factors would have to be one per position
    merges_sums = False  # each addition is a step of its own, with factors of its own

    def __init__(self, model: nn.Module, *args: Any, foreign: dict[str, nn.Module], **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.flow, self.linear_additions = Dataflow(), list[Addition]()
        self.flow.parameter_readers = {parameter.data_ptr(): set() for parameter in model.parameters()}
        self.flow.foreign = foreign
        self.statics = self.weights = self.flow.weights = FollowedWeights(model, foreign.values())
        self.entered: list[tuple[nn.Module, Node | None]] = []
        self.learned: Any = WeakTensorKeyDictionary()
        """Parameters, and what was computed from them alone."""
        for parameter in model.parameters():
            self.learned[parameter] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        tensors = [] if differentiates() else op.tensors_in(args, kwargs or {})
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
        addition = Addition(self.stack.name, found.ancestor, shortcut, branch, self.nodes[result])
        (self.linear_additions if found.linear else self.flow.additions).append(addition)
        return result

    def _run(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], active: list[Tensor]) -> Any:
        inputs = tuple(self.nodes[tensor] for tensor in active)
        known = {id(tensor): node for tensor, node in zip(active, inputs, strict=True)}

        def noted(value: Any) -> Any:
            if isinstance(value, Tensor):
                return known.get(id(value), value)
            return type(value)(map(noted, value)) if type(value) in (list, tuple) else value

        kept, kept_kwargs = tuple(map(noted, args)), {key: noted(value) for key, value in kwargs.items()}
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

    def note_dropout(self, x: Tensor) -> None:
        """A dropout is given ``x``."""
        if x in self.nodes:
            self.flow.dropped.add(self.nodes[x])

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
        """A module ends: its call is complete; one on no rows is none."""
        if self.entered and self.entered[-1][0] is module:
            _, node = self.entered.pop()
            if is_without_values(output):
                self.weights.runs[module] -= 1
                self.flow.without_values.add(self.stack.names[module])
                return
            if _is_of_interest(module):
                made = self.node_in(output)
                name, place, more = self.stack.names[module], self._place_of(module), _gives_more(inputs, output)
                self.flow.calls.append(Call(name, module, node, made, place, gives_more=more))
            returned = self.nodes.get(output) if isinstance(output, Tensor) else None
            self.weights.returned.setdefault(module, []).append(returned)

    def _place_of(self, module: nn.Module) -> str:
        """The name of a module that has just run in the one that called it; "" where that one does not hold it."""
        if not self.stack.running:
            return ""
        caller = self.stack.running[-1]
        attribute = next((name for name, child in caller._modules.items() if child is module), None)
        return "" if attribute is None else f"{self.stack.names[caller]}.{attribute}".removeprefix(".")


def _gives_more(inputs: tuple[Any, ...], output: Any) -> bool:
    """Whether a module gives anything but one tensor, or its first argument with the first tensor in it changed."""
    if isinstance(output, Tensor):
        return False
    if not inputs or type(inputs[0]) is not type(output):
        return True
    taken, given = tree_leaves(inputs[0]), tree_leaves(output)
    changed = [one for one, other in zip(taken, given, strict=False) if one is not other]
    return len(taken) != len(given) or len(changed) > 1 or not isinstance((changed or taken)[0], Tensor)


def _place(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 for one that has none of its own, such as a sparse one."""
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


def _is_of_interest(module: nn.Module) -> bool:
    leaf = next(module.children(), None) is None
    return leaf or is_norm(module) or is_layer(module) or bool(module._buffers)


_RESHAPING = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias"})
_REARRANGING = _RESHAPING | frozenset(
    {"flatten", "unsqueeze", "squeeze", "expand", "permute", "transpose", "t", "slice", "select", "narrow", "flip"}
    | {"unbind", "split", "split_with_sizes", "chunk"}
)
_CASTING = frozenset({"alias", "detach", "clone", "contiguous", "_to_copy", "to", "lift_fresh"})


class FollowedWeights(Statics):
    """Statics that also know what of a foreign module's parameters a tensor is.

    Attributes:
        uses: the operations on activations that read a parameter, by its owner.
        other_reads: another operation that reads a parameter, and makes something else of it, by owner and name.
        runs: how often each module has begun to run.
        returned: the activation that each run of a foreign module returned; None for anything else.
    """

    def __init__(self, model: nn.Module, foreign: Iterable[nn.Module]) -> None:
        super().__init__(model)
        self.origins: Any = WeakTensorKeyDictionary()
        self.uses: dict[nn.Module, list[Use]] = {}
        self.other_reads: dict[tuple[nn.Module, str], str] = {}
        self.runs: dict[nn.Module, int] = {}
        self.returned: dict[nn.Module, list[Node | None]] = {}
        for module in foreign:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    self.origins[parameter] = Origin(module, name, parameter.shape)

    def run(self, name: str, function: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Execute an operation on tensors that are no activations, and follow the parameters among them."""
        result = super().run(name, function, args, kwargs, tensors)
        read = [origin for tensor in tensors if (origin := self.origins.get(tensor)) is not None]
        if not read or name in op.FACTORY:
            return result
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        if is_without_values(made):
            return result
        found = None if op.mutated_arguments(function) or len(read) > 1 else self._after(name, function, args, kwargs)
        if found is None:
            self.other_reads |= {(origin.owner, origin.name): name for origin in read}
        else:
            for number, tensor in enumerate(made):
                if not isinstance(tensor, nn.Parameter):
                    self.origins[tensor] = found(number)
        return result

    def _after(
        self, name: str, function: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Callable[[int], Origin] | None:
        """What the results of an operation are, by their number; None for no parameter any longer."""
        origins = [self.origins.get(value) if isinstance(value, Tensor) else None for value in args]
        first = origins[0] if origins else None
        if name in _CASTING and first is not None:
            return lambda number: first
        if name in _REARRANGING and first is not None and not isinstance(args[-1], torch.dtype):

            def nth(number: int) -> Origin:
                def rearrange(elements: Tensor) -> Tensor:
                    if name in _RESHAPING:  # whose strides fit the parameter's memory, and a copy's in between
                        return elements.reshape(args[1])
                    return tree_leaves(function(elements, *args[1:], **kwargs))[number]

                return replace(first, rearranged=(*first.rearranged, rearrange))

            return nth
        if name == "mul" or (name == "div" and first is not None):
            origin, other = (first, args[1]) if first is not None else (origins[1], args[0])
            factor = None if self.owns(other) else self.factor(other, inverse=name == "div")
            if origin is not None and factor is not None and factor.value:
                value = float(factor.value)
                return lambda number: replace(origin, factor=origin.factor * value)
        return None

    def note(
        self, name: str, args: Sequence[Any], given: tuple[Any, ...], kwargs: dict[str, Any], made: Node | None,
        running: nn.Module | None,
    ) -> None:  # fmt: skip
        """Note the parameters that an operation on activations has read.

        Args:
            name: of the operation.
            args: its arguments.
            kwargs: those with a keyword.
            given: its arguments, activations replaced by their nodes.
            made: the activation it made.
            running: the innermost running module.
        """
        origins = tuple(self.origins.get(value) if isinstance(value, Tensor) else None for value in args)
        nested = [value for value in (*args, *kwargs.values()) if not isinstance(value, Tensor)]
        inner = [self.origins.get(leaf) for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]
        for position, origin in [*enumerate(origins), *((None, each) for each in inner)]:
            if origin is not None:
                run, inside = self.runs.get(origin.owner, 0), running is origin.owner
                use = Use(origin, name, given, kwargs, position, origins, made, run, inside)
                self.uses.setdefault(origin.owner, []).append(use)


@dataclass(frozen=True, eq=False)
class Origin:
    """What a tensor is that is a parameter, or a rearranged or scaled one.

    Attributes:
        owner: the module that has the parameter.
        name: of the parameter in it.
        shape: of the parameter.
        rearranged: what was done to the parameter, in order: each takes a tensor of its shape and returns one.
        factor: the constant that it was multiplied by.
    """

    owner: nn.Module
    name: str
    shape: torch.Size
    rearranged: tuple[Callable[[Tensor], Tensor], ...] = ()
    factor: float = 1.0

    def elements(self) -> Tensor:
        """Which element of the parameter, counted from 0, stands where in the tensor."""
        elements = torch.arange(self.shape.numel()).view(self.shape)
        for rearrange in self.rearranged:
            elements = rearrange(elements)
        return elements


@dataclass(frozen=True, eq=False)
class Use:
    """One operation on activations that reads a parameter, as it is or rearranged or scaled.

    Attributes:
        origin: what it reads.
        name: of the operation.
        args, kwargs: its arguments, activations replaced by their nodes.
        position: of the parameter among the arguments; None where it is in a list or has a keyword.
        origins: of every argument.
        made: the activation it makes, the first of several; None for none.
        run: how often the owner had begun to run.
        inside: whether the owner is the innermost running module.
    """

    origin: Origin
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    position: int | None
    origins: tuple[Origin | None, ...]
    made: Node | None
    run: int
    inside: bool


def is_foreign(module: nn.Module) -> bool:
    """Whether a module has a weight of its own, and is no norm and no layer of torch's in what it computes."""
    parameters = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
    weights = [p for p in parameters if p.is_floating_point() or p.is_complex()]
    return bool(weights) and not is_norm(module) and base_of(module, fresh=True) is None


def biasless(model: nn.Module) -> list[nn.Module]:
    """The foreign modules that could have a bias, and have none."""
    return [m for m in model.modules() if is_foreign(m) and m._parameters.get("bias", m) is None]


@contextmanager
def zero_biases(modules: list[nn.Module]) -> Iterator[None]:
    """Give modules without a bias one of zeros for a while, so that it shows what their forward does with it."""
    for module in modules:
        weight = next(p for p in module._parameters.values() if p is not None and p.dim() > 1)
        outputs = getattr(module, "out_channels", getattr(module, "out_features", None))
        zeros = weight.detach().new_zeros(outputs if isinstance(outputs, int) else len(weight))
        module._parameters["bias"] = nn.Parameter(zeros)
    try:
        yield
    finally:
        for module in modules:
            module._parameters["bias"] = None


TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ours.ScaledWSConv1d,
    nn.Conv2d: ours.ScaledWSConv2d,
    nn.Conv3d: ours.ScaledWSConv3d,
    nn.ConvTranspose1d: ours.ScaledWSConvTranspose1d,
    nn.ConvTranspose2d: ours.ScaledWSConvTranspose2d,
    nn.ConvTranspose3d: ours.ScaledWSConvTranspose3d,
    nn.Linear: ours.ScaledWSLinear,
}
"""The standardised layer in place of each plain one."""


KEPT_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ours.KeptMeanConv1d,
    nn.Conv2d: ours.KeptMeanConv2d,
    nn.Conv3d: ours.KeptMeanConv3d,
    nn.ConvTranspose1d: ours.KeptMeanConvTranspose1d,
    nn.ConvTranspose2d: ours.KeptMeanConvTranspose2d,
    nn.ConvTranspose3d: ours.KeptMeanConvTranspose3d,
    nn.Linear: ours.KeptMeanLinear,
}
"""The same with a kept mean per filter."""


# Convolutions of other libraries, by class name, and the torch class they are with which padding: what they do
# besides is padding like TensorFlow's, or a standardization of their own that ours replaces in a fresh model.
SAME_PADDED = frozenset({"Conv2dSame", "StdConv2dSame", "ScaledStdConv2dSame"})


STANDARDIZED = frozenset({"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"})


def class_name(module: nn.Module) -> str:
    """A module's class, as the record names it."""
    if isinstance(module, torch.jit.ScriptModule):
        return str(getattr(module, "original_name", type(module).__name__))
    return type(module).__name__


def is_norm(module: nn.Module) -> bool:
    """Whether a module is of torch's normalization classes; others are recognised by what they compute."""
    return isinstance(module, (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm))


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a norm takes statistics over the examples of a batch."""
    return isinstance(module, _BatchNorm)


def is_map_norm(module: nn.Module) -> bool:
    """Whether a norm of torch's is one of convolutional networks; a LayerNorm over the last axis: only after one."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return "2d" in class_name(module).lower()
    return is_norm(module)


def is_removable(module: nn.Module) -> bool:
    """Whether what a norm does beside normalizing is known (an activation and a dropout at most)."""
    return not isinstance(module, (torch.jit.ScriptModule, nn.LocalResponseNorm))


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution, of torch or a subclass."""
    return isinstance(module, nn.modules.conv._ConvNd)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear layer, of torch or a subclass."""
    return is_convolution(module) or isinstance(module, nn.Linear)


def base_of(module: nn.Module, *, fresh: bool) -> type[nn.Module] | None:
    """The torch class a layer behaves as; None where a subclass, or a hook, may do what is not known.

    Args:
        module: the layer.
        fresh: its weight is drawn anew, so that a standardization of its own does not matter.
    """
    if attached_to(module):
        return None
    if type(module) in TWINS:
        return type(module)
    if type(module) in (ours.PaddedConv2d, ours.ScaledConv2d):
        return nn.Conv2d
    for kind in TWINS:
        if isinstance(module, kind) and "weight" in module._parameters and _computes_as(module, kind):
            return kind
    name = class_name(module)
    if isinstance(module, nn.Conv2d) and (name in SAME_PADDED | STANDARDIZED) and (fresh or name not in STANDARDIZED):
        return nn.Conv2d
    return None


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a subclass leaves alone what its base computes."""
    methods = ("forward", "_conv_forward", "__call__")
    return all(getattr(type(module), name, None) is getattr(kind, name, None) for name in methods)


def fan_in(module: nn.Module) -> int:
    """Weights that feed one output of a layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return weight.numel() // module.out_channels
    return weight[0].numel()


def channels_of(norm: nn.Module) -> int:
    """The channels of a norm with statistics of each: no tensor of its own has more numbers."""
    tensors = (*norm._parameters.values(), *norm._buffers.values())
    sizes = [tensor.numel() for tensor in tensors if tensor is not None]
    return max(sizes) if sizes else int(norm.num_features)  # type: ignore[arg-type]


def activation_in(norm: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules a fused norm runs beside normalizing, in their order: an activation, a dropout, by any name."""
    return [(name, part) for name, part in norm.named_children() if not isinstance(part, nn.Identity)]
