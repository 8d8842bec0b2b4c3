"""What in a recorded dataflow conversion is about: the norms, the layers that feed them, the gates, the branches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from normfree.convert.constants import AffineMap, norm_calls
from normfree.convert.dataflow import Addition, Call, Dataflow, Step, passes_unchanged
from normfree.convert.kinds import activation_in
from normfree.convert.maps import WeightedMap, layers_of
from normfree.convert.normalization import Normalizations
from normfree.trace import operations as op
from normfree.trace.graph import Node


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
                self.has_layer_behind(node)

    @cached_property
    def obstacles(self) -> dict[str, str]:
        """For each layer why it cannot be standardized, as what a norm behind it sees; "" where it can."""
        return {name: self._obstacle(name) for name in self.layers}

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

    def has_layer_behind(self, node: Node) -> bool:
        """Whether anything with a weight lies between the input and an activation."""
        if node not in self._layered:
            self._layered[node] = (
                node in self.layer_at or node.step.weighted > 0 or any(map(self.has_layer_behind, node.parents))
            )
        return self._layered[node]

    def nearest_behind(self, node: Node) -> set[str]:
        """The layers and norms nearest behind an activation, by name."""
        stops = self.norm_at | self.layer_at
        found = self.flow.backwards(node, stop=lambda each: each in stops)
        return {stops[each].name for each in found if each in stops}

    def directly_behind(self, node: Node | None, *, alone: bool) -> Call | None:
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

    def is_plain_norm(self, node: Node, removed: set[str]) -> bool:
        """Whether an activation is what a norm to be removed made, without an activation of its own."""
        call = self.norm_at.get(node)
        return call is not None and call.name in removed and not activation_in(call.module)

    def is_gate_only(self, name: str) -> bool:
        """Whether a layer only computes a gate."""
        return all(call.output not in self.alive for call in self.layers[name])

    def region(self, addition: Addition, end: Node) -> set[Node]:
        """The activations between an addition's ancestor and its branch or shortcut ``end``, which is included."""
        ancestor = addition.ancestor
        if (ancestor, end) not in self._regions:
            self._regions[ancestor, end] = {
                node
                for node in self.flow.backwards(end, stop=lambda each: each.level <= ancestor.level)
                if node.level > ancestor.level
            }
        return self._regions[ancestor, end]


def gate_of(flow: Dataflow, step: Step) -> tuple[Node, Node] | None:
    """What a product of two activations gates and the gate, the smaller of them; None for any other operation."""
    if step.name != "mul" or len(step.inputs) != 2:
        return None
    sizes = [prod(unexpanded(flow, node)) for node in step.inputs]
    if sizes[0] == sizes[1]:
        return None
    value, gate = (0, 1) if sizes[0] > sizes[1] else (1, 0)
    return step.inputs[value], step.inputs[gate]


def unexpanded(flow: Dataflow, node: Node) -> tuple[int, ...]:
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


def layers_to_standardize(
    structure: Structure, removed: Mapping[str, Iterable[str]]
) -> tuple[list[str], dict[str, str]]:
    """The layers that take over what removed norms did, and why the others stay.

    One does if it answers a removed norm; if it is a convolution that a removed norm follows before any other layer;
    or if it lies in a residual branch or shortcut some norm of which is removed and none kept. Of the last two kinds,
    layers that only compute a gate stay.

    Args:
        structure: of the model.
        removed: the norms that go, and the layers that answer each.
    """
    answers = {layer for layers in removed.values() for layer in layers} | _before(structure, removed)
    wanted = answers | _in_branches(structure, set(removed))
    direct = _directly_followed(structure, removed)
    chosen, kept = [], {}
    for name in structure.layers:
        if name not in wanted:
            kept[name] = "no removed normalizer follows it"
        elif name not in direct and structure.is_gate_only(name):
            kept[name] = "it only computes a gate"
        elif structure.obstacles[name]:
            kept[name] = structure.obstacles[name].replace(f"{name} before it ", "it ").replace(" before it", "")
        else:
            chosen.append(name)
    return chosen, kept


def _directly_followed(structure: Structure, removed: Iterable[str]) -> set[str]:
    """The layers whose output a removed norm takes."""
    calls = (call for name in removed for call in structure.norms[name])
    before = (structure.directly_behind(call.input, alone=False) for call in calls)
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
            behind = [parent for parent in node.parents if parent not in seen and parent.dominator is not None]
            seen.update(behind)
            waiting += behind
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


def changes_branch(structure: Structure, addition: Addition, removed: set[str]) -> bool:
    """Whether some norm of a residual branch, or one that takes the sum alone, is removed, and none of it kept."""
    norms = norms_in(structure, structure.region(addition, addition.branch))
    if not structure.flow.is_read_twice(addition.output):
        norms |= {c.name for calls in structure.norms.values() for c in calls if c.input is addition.output}
    return bool(norms) and norms <= removed


def norms_in(structure: Structure, region: set[Node]) -> set[str]:
    """The norms that made activations of a region."""
    return {structure.norm_at[node].name for node in region if node in structure.norm_at}


def layers_in(structure: Structure, region: set[Node]) -> Iterator[str]:
    """The layers that made activations of a region."""
    return (structure.layer_at[node].name for node in region if node in structure.layer_at)
