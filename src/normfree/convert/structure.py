"""What in a recorded dataflow conversion is about: the norms, the layers that feed them, the gates, the branches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from normfree.convert.constants import AffineMap, norm_calls
from normfree.convert.dataflow import Addition, Call, Dataflow, Step, passes_unchanged
from normfree.convert.kinds import activation_in
from normfree.convert.maps import WeightedMap, layers_of
from normfree.convert.normalization import Normalizations
from normfree.signal.graph import Node


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

    def feeding(self, node: Node) -> list[Call]:
        """The layers (and norms) nearest behind an activation, whatever lies between."""
        stops = {**self.norm_at, **self.layer_at}
        found = self.flow.backwards(node, stop=lambda each: each in stops)
        return [stops[each] for each in found if each in stops]

    def is_convolution(self, call: Call) -> bool:
        """Whether a call is of a layer that convolves."""
        return call.name in self.maps and self.maps[call.name].convolution

    def has_layer_behind(self, node: Node) -> bool:
        """Whether anything with a weight lies between the input and an activation."""
        behind = self.flow.backwards(node, stop=lambda each: each in self.layer_at)
        return any(each in self.layer_at or each.step.weighted for each in behind)

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
        return {
            node
            for node in self.flow.backwards(end, stop=lambda each: each is ancestor)
            if node is not ancestor and node.level > ancestor.level
        }


def gate_of(flow: Dataflow, step: Step) -> tuple[Node, Node] | None:
    """What a product of two activations gates and the gate, the smaller of them; None for any other operation."""
    if step.name != "mul" or len(step.inputs) != 2:
        return None
    sizes = [prod(_unexpanded(flow, node)) for node in step.inputs]
    if sizes[0] == sizes[1]:
        return None
    value, gate = (0, 1) if sizes[0] > sizes[1] else (1, 0)
    return step.inputs[value], step.inputs[gate]


def _unexpanded(flow: Dataflow, node: Node) -> tuple[int, ...]:
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


def layers_to_standardize(structure: Structure, removed: set[str]) -> tuple[list[str], dict[str, str]]:
    """The layers that take over what removed norms did, and why the others stay.

    A convolution is one if a removed norm follows it before any other layer, or if it lies in a residual branch or
    shortcut some norm of which is removed and none kept; a linear layer, if the norm follows at once or in such a
    branch. Layers that only compute a gate stay unless a removed norm follows at once, and so do the network's last.
    """
    direct = _directly_followed(structure, removed)
    wanted = direct | _followed(structure, removed) | _in_branches(structure, removed)
    chosen, kept = [], {}
    for name in structure.layers:
        if name not in wanted:
            kept[name] = "no removed normalizer follows it"
        elif name not in direct and structure.is_gate_only(name):
            kept[name] = "it only computes a gate"
        elif name in structure.shared:
            kept[name] = f"{structure.shared[name]} reads a parameter of it, too"
        elif problem := structure.maps[name].why_not(fresh=True):
            kept[name] = f"it {problem}"
        else:
            chosen.append(name)
    return chosen, kept


def _directly_followed(structure: Structure, removed: set[str]) -> set[str]:
    """The layers whose output a removed norm takes."""
    calls = (call for name in removed for call in structure.norms[name])
    before = (structure.directly_behind(call.input, alone=False) for call in calls)
    return {layer.name for layer in before if layer is not None}


def _followed(structure: Structure, removed: set[str]) -> set[str]:
    """The convolutions that a removed norm follows before any other layer."""
    inputs = [call.input for name in removed for call in structure.norms[name] if call.input is not None]
    return {call.name for node in inputs for call in structure.feeding(node) if structure.is_convolution(call)}


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
