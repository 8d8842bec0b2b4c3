"""A recorded dataflow, sorted: its norms, its layers and their linear maps, its gates, branches and fusions.

A module each run of which has exactly one convolution or matrix product with its own weight, while nothing else reads
that weight, is a layer like torch's: its forward is kept, and its weight standardized in place
(:mod:`normfree.nn.standardized_module`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import permutations
from math import prod

import torch
from torch import Tensor, nn

from normfree.convert.dataflow import (
    CROPPING,
    KEPT_TWINS,
    TWINS,
    Addition,
    Call,
    Dataflow,
    Origin,
    Step,
    Use,
    activation_in,
    base_of,
    class_name,
    fan_in,
    is_convolution,
    is_layer,
    is_norm,
    passes_unchanged,
    record,
)
from normfree.convert.norms import AffineMap, Normalizations, norm_calls
from normfree.convert.record import KEPT_MEAN, STANDARDIZED
from normfree.nn import ScaledConv2d, WeightLayout
from normfree.nn.fold import attached_to
from normfree.nn.standardized_module import names_needed
from normfree.trace import operations as op
from normfree.trace.graph import Node
from normfree.trace.inputs import Batch


@dataclass(eq=False)
class Structure:
    """A dataflow with its modules sorted.

    Attributes:
        flow: the dataflow.
        norms, layers: calls of each norm and of each layer, by name.
        maps: the linear map of each layer, by name.
        norm_at, layer_at: the call that made an activation.
        alive: activations that reach an output other than through a gate.
        shared: the layers a parameter of which another module reads, too, and that module.
        normalizations: every place at which an activation is normalized.
        constants: what each norm that has constants in evaluation mode computes then.
    """

    flow: Dataflow
    norms: dict[str, list[Call]] = field(init=False)
    layers: dict[str, list[Call]] = field(init=False)
    maps: dict[str, WeightedMap] = field(init=False)
    norm_at: dict[Node, Call] = field(init=False)
    layer_at: dict[Node, Call] = field(init=False)
    alive: set[Node] = field(init=False)
    shared: dict[str, str] = field(init=False)
    normalizations: Normalizations = field(init=False)
    constants: dict[str, AffineMap] = field(init=False)

    def __post_init__(self) -> None:
        self.normalizations = Normalizations(self.flow)
        self.norms, self.constants = norm_calls(self.flow, self.normalizations)
        self.layers, self.maps = layers_of(self.flow)
        self.norm_at = {c.output: c for calls in self.norms.values() for c in calls if c.output is not None}
        self.layer_at = {c.output: c for calls in self.layers.values() for c in calls if c.output is not None}
        self.alive = _alive(self.flow)
        self.shared = _shared(self.flow, self.layers)
        self._regions: dict[tuple[Node, Node], set[Node]] = {}
        self._owners: dict[tuple[bool, str], str | None] = {}
        self._layered: dict[Node, bool] = {}
        for step in self.flow.steps:  # in their order, so that no answer has to look far
            for node in step.outputs:
                self.has_layer_before(node)

    def keep(self, layers: Mapping[str, str]) -> None:
        """Keep some layers as they are, for reasons as predicates of each; before anything is planned."""
        for name, reason in layers.items():
            self.maps[name] = replace(self.maps[name], problem=reason)

    @cached_property
    def norms_reading(self) -> dict[Node, set[str]]:
        """The names of the norms that take each activation."""
        reading: dict[Node, set[str]] = {}
        for call in (call for calls in self.norms.values() for call in calls):
            if call.input is not None:
                reading.setdefault(call.input, set()).add(call.name)
        return reading

    @cached_property
    def norms_on_streams(self) -> set[str]:
        """The names of the norms that a residual stream goes through, from one sum to the next."""
        begins = {node for addition in self.flow.additions for node in (addition.ancestor, addition.shortcut)}
        sums = {addition.output for addition in self.flow.additions}
        return {c.name for c in self.norm_at.values() if c.output in begins and c.input in sums}

    @cached_property
    def obstacles(self) -> dict[str, str]:
        """For each layer why it cannot be standardized, as what a norm after it sees; "" where it can."""
        return {name: self._obstacle(name) for name in self.layers}

    def why_left(self, name: str) -> str:
        """Why a layer cannot be standardized, as its own reason to stay; "" where it can."""
        return self.obstacles[name].replace(f"{name} before it ", "it ").replace(" before it", "")

    def _obstacle(self, name: str) -> str:
        if problem := self.maps[name].why_not(fresh=True):
            return f"{name} before it {problem}"
        if name in self.shared:
            return f"{self.shared[name]} reads a parameter of {name} before it, too"
        return ""

    def layer_of(self, step: Step) -> str | None:
        """The layer in which an operation ran."""
        return self._owner(step.module, self.layers, of_norm=False)

    def norm_of(self, step: Step) -> str | None:
        """The norm in which an operation ran."""
        return self._owner(step.module, self.norms, of_norm=True)

    def _owner(self, module: str, among: Mapping[str, list[Call]], *, of_norm: bool) -> str | None:
        key = of_norm, module
        if key not in self._owners:
            name = module
            while name and name not in among:
                name = name.rpartition(".")[0]
            self._owners[key] = name if name in among else None
        return self._owners[key]

    def is_convolution(self, call: Call) -> bool:
        """Whether a call is of a layer that convolves."""
        return call.name in self.maps and self.maps[call.name].convolution

    def has_layer_before(self, node: Node) -> bool:
        """Whether anything with a weight lies between the input and an activation."""
        if node not in self._layered:
            self._layered[node] = (
                node in self.layer_at or node.step.weighted > 0 or any(map(self.has_layer_before, node.parents))
            )
        return self._layered[node]

    def nearest_before(self, node: Node) -> set[str]:
        """The layers and norms nearest before an activation, by name."""
        stops = self.norm_at | self.layer_at
        found = self.flow.backwards(node, stop=lambda each: each in stops)
        return {stops[each].name for each in found if each in stops}

    def producing_layer(self, node: Node | None, *, alone: bool) -> Call | None:
        """The layer whose output an activation is, but for its layout.

        Args:
            node: the activation.
            alone: nothing else may read that output.
        """
        while node is not None:
            if alone and self.flow.is_read_twice(node):
                return None
            if node in self.layer_at:
                return self.layer_at[node]
            step = self.flow.made_by.get(node)
            if step is None or not passes_unchanged(step):
                return None
            node = step.inputs[0]
        return None

    def keeps_order(self, layer: Call, node: Node) -> bool:
        """Whether channel c of an activation [N, C, …] after a layer is the layer's output c."""
        if node.note.axis is not None or layer.product is None:
            return node.note.axis == 1
        indices = self.flow.outputs_in(node, layer.product)
        return indices is not None and 1 in axis_counting(indices)

    def is_plain_norm(self, node: Node, removed: set[str]) -> bool:
        """Whether an activation is what a norm to be removed made, without an activation of its own."""
        call = self.norm_at.get(node)
        return call is not None and call.name in removed and not activation_in(call.module)

    def is_gate_only(self, name: str) -> bool:
        """Whether a layer only computes a gate."""
        return all(call.output not in self.alive for call in self.layers[name])

    def region(self, addition: Addition, end: Node) -> set[Node]:
        """The activations between an addition's ancestor and its branch or shortcut ``end``, which is included.

        What else a branch reads (the embedding of a time step, a memory) comes from elsewhere, and is not among them.
        """
        ancestor = addition.ancestor
        if (ancestor, end) not in self._regions:
            before = self.flow.backwards(end, stop=lambda each: each.level <= ancestor.level)
            inside = {ancestor}
            for node in sorted(before, key=lambda each: each.level):
                if not inside.isdisjoint(node.parents):
                    inside.add(node)
            self._regions[ancestor, end] = inside - {ancestor}
        return self._regions[ancestor, end]


def layers_to_standardize(
    structure: Structure, removed: Mapping[str, Iterable[str]], replaced: Collection[str]
) -> tuple[list[str], dict[str, str]]:
    """The layers that take over what removed norms did, and why the others stay.

    One does if it answers a removed norm; if it is a convolution that a removed norm follows before any other layer;
    or if it lies in a residual branch or shortcut some norm of which is removed and none kept. Of the last two kinds,
    layers that only compute a gate stay.

    Args:
        structure: of the model.
        removed: the norms that go, and the layers that answer each.
        replaced: those in whose places constants stand.
    """
    answers = {layer for layers in removed.values() for layer in layers} | _before(structure, removed)
    wanted = answers | _in_branches(structure, {*removed, *replaced})
    direct = directly_followed(structure, removed)
    chosen, kept = [], {}
    for name in structure.layers:
        if name not in wanted:
            kept[name] = "it answers for no removed normalizer"
        elif name not in direct and structure.is_gate_only(name):
            kept[name] = "it only computes a gate"
        elif reason := structure.why_left(name):
            kept[name] = reason
        else:
            chosen.append(name)
    return chosen, kept


def directly_followed(structure: Structure, removed: Iterable[str]) -> set[str]:
    """The layers whose output a removed norm takes."""
    calls = (call for name in removed for call in structure.norms[name])
    before = (structure.producing_layer(call.input, alone=False) for call in calls)
    return {layer.name for layer in before if layer is not None}


def _before(structure: Structure, removed: Iterable[str]) -> set[str]:
    """The convolutions that a removed norm follows before any other layer or norm."""
    waiting = [call.input for name in removed for call in structure.norms[name] if call.input is not None]
    seen, found = set(waiting), set[str]()
    while waiting:
        node = waiting.pop()
        if node in structure.layer_at:
            call = structure.layer_at[node]
            found |= {call.name} if structure.is_convolution(call) else set()
        elif node not in structure.norm_at:
            parents = [parent for parent in node.parents if parent not in seen and parent.dominator is not None]
            seen.update(parents)
            waiting += parents
    return found


def _in_branches(structure: Structure, removed: set[str]) -> set[str]:
    wanted = set()
    for addition in structure.flow.additions:
        if changes_branch(structure, addition, removed):
            wanted |= set(layers_in(structure, structure.region(addition, addition.branch)))
            shortcut = structure.region(addition, addition.shortcut)
            if norms_in(structure, shortcut) <= removed:
                wanted |= set(layers_in(structure, shortcut))
    return wanted


def changes_branch(structure: Structure, addition: Addition, removed: set[str]) -> bool:
    """Whether some norm of a residual branch, or one that takes the sum alone, is removed, and none of it kept.

    A norm that stays behind the last of pre-norm blocks (in front of a head that shares the embedding's weight) is not
    on their stream, and none of the branch.
    """
    norms = norms_in(structure, structure.region(addition, addition.branch))
    if not structure.flow.is_read_twice(addition.output):
        before, after = structure.norm_at.get(addition.shortcut), structure.norms_reading.get(addition.output, set())
        around = after | {before.name} if before is not None else after
        norms |= after if not norms or around & structure.norms_on_streams else set()
    return bool(norms) and norms <= removed


def norms_in(structure: Structure, region: set[Node]) -> set[str]:
    """The norms that made activations of a region."""
    return {structure.norm_at[node].name for node in region if node in structure.norm_at}


def layers_in(structure: Structure, region: set[Node]) -> Iterator[str]:
    """The layers that made activations of a region."""
    return (structure.layer_at[node].name for node in region if node in structure.layer_at)


def is_fusion(structure: Structure, addition: Addition) -> bool:
    """Whether an addition joins two resolutions, and is no residual one.

    It is where the longer operand has been through a weight at a lower resolution than both the activation that the
    two have in common and their sum, and has come up again: in the decoder of a U-Net that adds its skips, in the
    top-down path of a pyramid. What it brings is then no correction of the other, but all that the lower resolutions
    know: scaled by alpha at each of n levels, alpha^n of the lowest is left. Unscaled, two operands of unit variance
    have an equal part, and the variance 2 of their sum is undone by the input scale of the layer that reads it. A block
    that ends at a lower resolution than it begins (a stride), or pools for a gate, does not come up; one that enlarges
    its input on both ways was never lower.
    """
    flow, ancestor = structure.flow, addition.ancestor
    least = min(_positions(flow, ancestor), _positions(flow, addition.output))
    lower, seen, waiting = False, {addition.branch}, [addition.branch]
    rises = False
    while waiting:
        node = waiting.pop()
        step = flow.made_by.get(node)
        if step is None:
            continue
        lower |= node.step.weighted > 0 and _positions(flow, node) < least
        gated = gate_of(flow, step)
        inputs = [gated[0]] if gated else [each for each in step.inputs if each not in flow.numbers]
        rises |= step.name in _RISING and _positions(flow, node) > max(_positions(flow, each) for each in inputs)
        for each in inputs:
            if each not in seen and each.level > ancestor.level:
                seen.add(each)
                waiting.append(each)
        if lower and rises:
            return True
    return False


_RISING = op.POOL | op.CONVOLUTION | {"pixel_shuffle", "max_unpool2d", "max_unpool3d", "repeat_interleave"}


def _positions(flow: Dataflow, node: Node) -> int:
    """The values of each channel of an activation, over all examples."""
    shape = flow.shapes.get(node, ())
    axis = node.note.channel_axis if len(shape) > 1 else 0
    return prod(shape) // max(1, shape[axis]) if shape and axis < len(shape) else 0


def gate_of(flow: Dataflow, step: Step) -> tuple[Node, Node] | None:
    """What a product of two activations gates and the gate, the smaller of them; None for any other operation."""
    if step.name != "mul" or len(step.inputs) != 2:
        return None
    sizes = [prod(unexpanded_shape(flow, node)) for node in step.inputs]
    if sizes[0] == sizes[1]:
        return None
    value, gate = (0, 1) if sizes[0] > sizes[1] else (1, 0)
    return step.inputs[value], step.inputs[gate]


def unexpanded_shape(flow: Dataflow, node: Node) -> tuple[int, ...]:
    """The shape of an activation before it was expanded to another's."""
    step = flow.made_by.get(node)
    while step is not None and step.name in ("expand", "clone", "alias") and len(step.inputs) == 1:
        node = step.inputs[0]
        step = flow.made_by.get(node)
    return flow.shapes[node]


def _alive(flow: Dataflow) -> set[Node]:
    """What reaches an output, or an operation of which nothing is read, not counting ways through a gate."""
    gates = {id(step): found[1] for step in flow.steps if (found := gate_of(flow, step))}
    ends = (s for s in flow.steps if s.name != "detach" and not any(flow.readers(node) for node in s.outputs))
    waiting = [node for step in ends for node in step.outputs] + flow.outputs
    seen = set(waiting)
    while waiting:
        step = flow.made_by.get(waiting.pop())
        if step is None:
            continue
        for node in step.inputs:
            if node not in seen and gates.get(id(step)) is not node:
                seen.add(node)
                waiting.append(node)
    return seen


def _shared(flow: Dataflow, layers: Mapping[str, list[Call]]) -> dict[str, str]:
    found = {}
    for name, calls in layers.items():
        readers = (flow.parameter_readers.get(p.data_ptr(), ()) for p in calls[0].module.parameters())
        others = {other for each in readers for other in each if not f"{other}.".startswith(f"{name}.")}
        if others:
            found[name] = min(others) or "the model"
    return found


def unseen_norms(model: nn.Module, structure: Structure) -> dict[str, nn.Module]:
    """The norms of a model that did not run: of torch's classes, or of a class that is one elsewhere in the model.

    One whose weight or statistics a function normalizes with (``F.batch_norm(x, norm.running_mean, …)``) is that one.
    """
    classes = {type(calls[0].module) for calls in structure.norms.values()}
    ran = structure.norms.keys() | {call.name for call in structure.flow.calls}
    steps = (step for step in structure.flow.steps if step.name in op.NORM)
    read = {value.data_ptr() for step in steps for value in step.args if isinstance(value, Tensor) and value.numel()}
    return {
        name: module
        for name, module in model.named_modules()
        if name not in ran
        and (is_norm(module) or type(module) in classes)
        and read.isdisjoint(t.data_ptr() for t in (*module.parameters(False), *module.buffers(False)))
    }


def training_structure(model: nn.Module, structure: Structure, batch: Batch) -> Structure | None:
    """What the model does in training mode with the statistics of its norms frozen; None where it does not run so.

    Some models want targets in training: then all but the outermost module train, and if that fails, too, those
    without children, which dropout layers are.

    Args:
        model: the model.
        structure: of it in evaluation mode.
        batch: its input.
    """
    norms = {calls[0].module for calls in structure.norms.values()} | set(filter(is_norm, model.modules()))
    attempts: tuple[Callable[[nn.Module], bool], ...] = (
        lambda module: module not in norms,
        lambda module: module not in norms and module is not model,
        lambda module: module not in norms and next(module.children(), None) is None,
    )
    for trains in attempts:
        try:
            return Structure(record(model, batch, mode="train", trains=trains))
        except ValueError:
            continue
    return None


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightedMap:
    """The linear map of a layer: what standardizing its weight has to know.

    Attributes:
        module: the layer.
        twin: the torch class whose standardized twin takes its place; None for none.
        layout: how its own weight is read, where that is standardized in place; None with a twin, or a problem.
        outputs: channels or features that it makes.
        fan_in: weights of one output.
        convolution: whether it is one; a matrix product otherwise.
        own_standardization: its forward standardizes the weight, which a fresh start does instead.
        problem: why the weight cannot be standardized, as a predicate of the layer ("has hooks"); "" where it can.
    """

    module: nn.Module
    twin: type[nn.Module] | None = None
    layout: WeightLayout | None = None
    outputs: int = 0
    fan_in: int = 0
    convolution: bool = False
    own_standardization: bool = False
    problem: str = ""

    def why_not(self, *, fresh: bool) -> str:
        """Why the weight cannot be standardized, as a predicate of the layer; "" where it can.

        Args:
            fresh: the weight is drawn anew, so that a standardization of the layer's own does not matter.
        """
        if self.problem:
            return self.problem
        if self.own_standardization and not fresh:
            return f"is a {class_name(self.module)}, which standardizes its weight itself"
        if self.layout is not None and not self.layout.biases and not fresh:
            return "takes no bias, and does more than multiply by its weight"
        if self.fan_in == 1 and self.twin is not nn.Conv2d:
            return "has one weight a filter, which standardizing would make zero"
        return ""

    def now(self, *, fresh: bool) -> str:
        """What stands in the layer's place once its weight is standardized, as the record names it."""
        assert not self.why_not(fresh=fresh)
        if self.twin is None:
            return f"{STANDARDIZED if fresh else KEPT_MEAN} {class_name(self.module)}"
        if self.fan_in == 1:
            return ScaledConv2d.__name__
        return (TWINS if fresh else KEPT_TWINS)[self.twin].__name__

    @property
    def plain_scale(self) -> float | None:
        """The input scale at which the standardized weight has no constant; None for 1."""
        if self.layout is not None:
            return None if self.layout.factor == 1 else 1 / self.layout.factor
        transposed = isinstance(self.module, nn.modules.conv._ConvTransposeNd)
        return math.prod(self.module.stride) ** -0.5 if transposed else None  # type: ignore[arg-type]

    def own_weight(self) -> Tensor:
        """The layer's weight parameter."""
        return self.module.get_parameter("weight" if self.layout is None else self.layout.weight)


def plain_map(module: nn.Module) -> WeightedMap | None:
    """The map of a layer that is one of torch's, in what it computes; None for any other module."""
    kind = base_of(module, fresh=True)
    if kind is None:
        return None
    outputs = module.out_features if kind is nn.Linear else module.out_channels
    return WeightedMap(
        module=module,
        twin=kind,
        outputs=int(outputs),  # type: ignore[arg-type]
        fan_in=fan_in(module),
        convolution=kind is not nn.Linear,
        own_standardization=base_of(module, fresh=False) is None,
    )


def layers_of(flow: Dataflow) -> tuple[dict[str, list[Call]], dict[str, WeightedMap]]:
    """The layers of a model: the calls of each, and its map, by name.

    The input and output of a call are the module's, of torch's layers and subclasses that compute the same; of any
    other layer they are those of its map, a bias included, whatever its forward does before and after.
    """
    calls = flow.calls_by_module(is_layer)
    maps: dict[str, WeightedMap] = {}
    for name, each in calls.items():
        module = each[0].module
        attached = f"has {attached_to(module) or 'a weight that is no parameter of its own'}"
        known, problem = (None, _COMPLEX) if _is_complex(module) else (plain_map(module), attached)
        maps[name] = known or WeightedMap(module=module, problem=problem, convolution=is_convolution(module))
    for name, module in flow.foreign.items():
        found = _Finder(flow, name, module)
        try:
            maps[name], calls[name] = found.map()
        except _NoMapError as reason:
            if name in calls:
                maps[name] = WeightedMap(module=module, convolution=is_convolution(module), problem=str(reason))
    return calls, maps


def why_no_map(flow: Dataflow, name: str) -> str:
    """Why a module with a weight of its own is no layer, as a predicate; "" for one that is, or has no weight."""
    if name not in flow.foreign:
        return ""
    try:
        _Finder(flow, name, flow.foreign[name]).map()
    except _NoMapError as reason:
        return str(reason)
    return ""


class _NoMapError(Exception):
    """A module computes no linear map of its own weight, or one that cannot be standardized: why, as a predicate."""


_COMPLEX = "has weights of complex numbers"


def _is_complex(module: nn.Module) -> bool:
    return any(parameter.is_complex() for parameter in module.parameters(recurse=False))


_BIAS_POSITIONS = {"convolution": 2, "_convolution": 2, "addmm": 0, "addmv": 0, "baddbmm": 0, "linear": 2}


class _Finder:
    """Finds the one linear map of a foreign module among the recorded operations."""

    def __init__(self, flow: Dataflow, name: str, module: nn.Module) -> None:
        self.flow, self.name, self.module = flow, name, module
        assert flow.weights is not None, "a recorded dataflow"
        self.weights = flow.weights
        self.uses = self.weights.uses.get(module, [])

    def map(self) -> tuple[WeightedMap, list[Call]]:
        """The map, and the calls of it.

        Raises:
            _NoMapError: there is none.
        """
        if attached := attached_to(self.module):
            raise _NoMapError(f"has {attached}")
        if _is_complex(self.module):
            raise _NoMapError(_COMPLEX)
        weight = self._weight()
        uses = [use for use in self.uses if use.origin.name == weight]
        self._check_alone(weight, uses)
        rows, factors = zip(*(_filters(use) for use in uses), strict=True)
        if any(not torch.equal(each, rows[0]) for each in rows) or len(set(factors)) > 1:
            raise _NoMapError(f"reads its {weight} in several ways")
        layout = _layout(weight, self.module.get_parameter(weight), rows[0], factors[0], uses[0])
        biases = [self._bias(use, len(rows[0])) for use in uses]
        if any(bias[:2] != biases[0][:2] for bias in biases):
            raise _NoMapError("adds its bias not each time")
        bias, bias_factor, _ = biases[0]
        ends = [node for _, _, node in biases]
        returned = self._returned(uses, ends, len(rows[0]))
        axis = None if bias or returned is None else returned[0]
        ends = ends if returned is None else returned[1]
        layout = WeightLayout(**{**layout, "bias": bias, "bias_factor": bias_factor, "axis": axis})
        if taken := next((one for one in names_needed(layout) if hasattr(self.module, one)), ""):
            raise _NoMapError(f"has an attribute {taken!r}, whose name standardizing needs")
        found = WeightedMap(
            module=self.module,
            layout=layout,
            outputs=len(rows[0]),
            fan_in=rows[0].shape[1],
            convolution=uses[0].name in op.CONVOLUTION,
        )
        runs = zip(uses, ends, strict=True)
        calls = [Call(self.name, self.module, _input(use), end, product=self._product(use)) for use, end in runs]
        return found, calls

    def _weight(self) -> str:
        """The name of the one parameter that enters a convolution or a matrix product as its weight."""
        weights = {use.origin.name for use in self.uses if _is_product(use)}
        if len(weights) == 1:
            return weights.pop()
        if weights:
            raise _NoMapError(f"multiplies by several parameters ({', '.join(sorted(weights))})")
        spoilt = [(name, by) for (owner, name), by in self.weights.other_reads.items() if owner is self.module]
        if spoilt:
            name, by = max(spoilt, key=lambda one: self.module._parameters[one[0]].numel())  # type: ignore[union-attr]
            raise _NoMapError(f"computes its weight from {name} ({by}) in its forward")
        raise _NoMapError("uses its weight in no convolution or matrix product by itself")

    def _check_alone(self, weight: str, uses: list[Use]) -> None:
        """Every run reads the weight once, for the map."""
        others = [use.name for use in uses if not _is_product(use)]
        by = self.weights.other_reads.get((self.module, weight)) or next(iter(others), "")
        if by:
            raise _NoMapError(f"reads its {weight} elsewhere, too ({by})")
        if not all(use.inside for use in uses):
            raise _NoMapError(f"has its {weight} read outside of its own forward")
        if [use.run for use in uses] != list(range(1, self.weights.runs.get(self.module, 0) + 1)):
            raise _NoMapError(f"uses its {weight} more than once in a run, or not in every run")

    def _bias(self, use: Use, outputs: int) -> tuple[str, float, Node]:
        """The name of the bias added to what an operation makes, "" for none, its factor, and the activation then."""
        assert use.made is not None, "a product makes an activation"
        position = _BIAS_POSITIONS.get(use.name)
        if position is not None and position < len(use.args) and use.args[position] is not None:
            return (*self._checked_bias(use.origins[position], outputs), use.made)
        node = use.made
        while len(readers := self.flow.readers(node)) == 1:
            step = readers[0]
            if step.name == "add" and len(step.inputs) == 1 and not step.kwargs:
                added = next((each for each in self.uses if each.made is step.outputs[0]), None)
                return (*self._checked_bias(added.origin, outputs), step.outputs[0]) if added else ("", 1.0, use.made)
            if not passes_unchanged(step):
                break
            node = step.outputs[0]
        return "", 1.0, use.made

    def _checked_bias(self, origin: Origin | None, outputs: int) -> tuple[str, float]:
        if origin is None or origin.owner is not self.module:
            raise _NoMapError("adds a bias that is no parameter of its own")
        if not torch.equal(origin.elements().flatten(), torch.arange(outputs)):
            raise _NoMapError(f"adds {origin.name}, which is not one number for each output")
        if (self.module, origin.name) in self.weights.other_reads:
            raise _NoMapError(f"reads its {origin.name} elsewhere, too")
        return origin.name, origin.factor

    def _returned(self, uses: list[Use], ends: list[Node], outputs: int) -> tuple[int, list[Node]] | None:
        """The axis of the channels in what the forward returns, and that, where it is the map's output.

        But for its layout, and positions cropped from it. None where it is anything else.
        """
        axes, found = set[int](), list[Node]()
        for use, end, returned in zip(uses, ends, self.weights.returned.get(self.module, []), strict=False):
            if returned is None or not self._leads_alone(end, returned):
                return None
            shape = self.flow.shapes[returned]
            axis = returned.note.axis if returned is not end and not _is_first(use) else self._product(use)[1]
            if axis is None or _is_first(use):
                indices = self.flow.outputs_in(returned, self._product(use))
                found_axes = () if indices is None else axis_counting(indices)
                axis = next((each for each in found_axes if shape[each] == outputs), None)
            if axis is None or shape[axis % len(shape)] != outputs:
                return None
            axis %= len(shape)
            axes.add(axis if use.name in op.CONVOLUTION else axis - len(shape))
            found.append(returned)
        return (axes.pop(), found) if len(axes) == 1 else None

    def _product(self, use: Use) -> tuple[Node, int]:
        """What a product makes, and the axis of its outputs in that."""
        assert use.made is not None, "a product makes an activation"
        dimensions = len(self.flow.shapes[use.made])
        axis = 1 if use.name in op.CONVOLUTION else dimensions - 2 if _is_first(use) else dimensions - 1
        return use.made, axis % dimensions

    def _leads_alone(self, end: Node, returned: Node) -> bool:
        """Whether an activation is another in another layout or cropped, with nothing in between read elsewhere."""
        node = returned
        while node is not end:
            step = self.flow.made_by.get(node)
            if step is None or not (passes_unchanged(step) or step.name in CROPPING):
                return False
            node = step.inputs[0]
            if self.flow.is_read_twice(node):
                return False
        return True


def axis_counting(indices: Tensor) -> Iterator[int]:
    """The axes along which a tensor counts 0, 1, …, and is constant along all others."""
    for axis, size in enumerate(indices.shape):
        rows = indices.movedim(axis, 0).reshape(size, -1)
        if bool((rows == torch.arange(size)[:, None]).all()):
            yield axis


def _is_product(use: Use) -> bool:
    """Whether a use is as the weight of a convolution or a factor of a matrix product."""
    if use.position is None or use.position == _BIAS_POSITIONS.get(use.name):
        return False
    return use.name in op.LINEAR or (use.name in op.CONVOLUTION and use.position == 1)


def _is_first(use: Use) -> bool:
    """Whether the weight is the first factor of a matrix product, so that its rows make the second axis from last."""
    factors = _factors(use)
    return use.name in op.LINEAR and use.name != "linear" and use.position == factors[0]


def _factors(use: Use) -> tuple[int, int]:
    """The positions of the two factors of a product."""
    return (1, 2) if use.name in ("addmm", "addmv", "baddbmm", "addbmm") else (0, 1)


def _input(use: Use) -> Node | None:
    """The activation that a product multiplies by the weight."""
    other = next(position for position in _factors(use) if position != use.position)
    found = use.args[other]
    return found if isinstance(found, Node) else None


def _filters(use: Use) -> tuple[Tensor, float]:
    """The elements of the parameter that make each output of a map [O, fan-in], and the constant factor of them.

    Raises:
        _NoMapError: an operation whose filters are not known, or differ from example to example.
    """
    elements = use.origin.elements()
    if use.kwargs:
        raise _NoMapError(f"computes {use.name} with factors of its own")
    if _input(use) is None:
        raise _NoMapError(f"computes {use.name} of nothing but its parameters")
    if use.name in ("convolution", "_convolution"):
        stride, transposed, groups = use.args[3], use.args[6], use.args[8]
        if transposed:
            elements = elements.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        taps = math.sqrt(math.prod(stride)) if transposed else 1.0
        return elements.flatten(1), taps / use.origin.factor
    if use.name in op.CONVOLUTION or use.name in ("addbmm", "matmul", "mkldnn_linear"):
        raise _NoMapError(f"computes {use.name}, whose filters are not known")
    if use.name in ("bmm", "baddbmm"):
        if not bool((elements == elements[:1]).all()):
            raise _NoMapError("multiplies each group by a matrix of its own")
        elements = elements[0]
    if elements.dim() != 2:
        raise _NoMapError(f"multiplies by a vector ({use.name})")
    return elements if use.name == "linear" or _is_first(use) else elements.t(), 1 / use.origin.factor


def _layout(name: str, parameter: Tensor, rows: Tensor, factor: float, use: Use) -> dict[str, object]:
    """How a parameter is read to give the rows [O, fan-in] of a map, in whatever order within each row.

    Raises:
        _NoMapError: some of its elements are in no row, or in several.
    """
    outputs = len(rows)
    if rows.numel() != parameter.numel() or len(torch.unique(rows)) != parameter.numel():
        raise _NoMapError(f"multiplies by a part of its {name} alone")
    wanted = rows.sort(1).values
    groups = int(use.args[8]) if use.name in op.CONVOLUTION else 1
    for layout in _layouts(parameter.shape, outputs, groups):
        filters = layout.filters(torch.arange(parameter.numel()).view(parameter.shape)).flatten(1)
        if torch.equal(filters.sort(1).values, wanted):
            return {
                "weight": name,
                "groups": layout.groups,
                "order": layout.order,
                "leading": layout.leading,
                "factor": factor,
            }
    raise _NoMapError(f"regroups the numbers of its {name}")


def _layouts(shape: torch.Size, outputs: int, groups: int) -> Iterator[WeightLayout]:
    """The ways to read a parameter as filters of so many outputs; the plainest first."""
    for parts in dict.fromkeys((1, groups)):
        if shape[0] % parts:
            continue
        split = shape if parts == 1 else torch.Size((parts, shape[0] // parts, *shape[1:]))
        axes = range(len(split))
        for leading in axes[1:]:
            for first in permutations(axes, leading):
                order = (*first, *(axis for axis in axes if axis not in first))
                if math.prod(split[axis] for axis in first) == outputs:
                    yield WeightLayout(groups=parts, order=() if order == tuple(axes) else order, leading=leading)
