"""What in a recorded dataflow conversion is about: the norms, the layers that feed them, the gates, the branches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from torch import nn

from normfree.convert.dataflow import Addition, Call, Dataflow, Step, passes_unchanged
from normfree.convert.kinds import base_of, class_name, fan_in, is_layer, is_map_norm, is_norm, is_removable
from normfree.signal import operations as op
from normfree.signal.graph import Node


@dataclass(eq=False)
class Structure:
    """A dataflow with its modules sorted.

    Attributes:
        flow: the dataflow.
        norms, layers: calls of each norm and of each layer, by name.
        norm_at, layer_at: the call that made an activation.
        alive: activations that reach an output other than through a gate.
    """

    flow: Dataflow
    norms: dict[str, list[Call]] = field(init=False)
    layers: dict[str, list[Call]] = field(init=False)
    norm_at: dict[Node, Call] = field(init=False)
    layer_at: dict[Node, Call] = field(init=False)
    alive: set[Node] = field(init=False)

    def __post_init__(self) -> None:
        self.norms, self.layers = self.flow.called(is_norm), self.flow.called(is_layer)
        self.norm_at = {c.output: c for calls in self.norms.values() for c in calls if c.output is not None}
        self.layer_at = {c.output: c for calls in self.layers.values() for c in calls if c.output is not None}
        self.alive = _alive(self.flow)

    def feeding(self, node: Node) -> list[Call]:
        """The layers (and norms) nearest behind an activation, whatever lies between."""
        stops = {**self.norm_at, **self.layer_at}
        found = self.flow.backwards(node, stop=lambda each: each in stops)
        return [stops[each] for each in found if each in stops]

    def directly_behind(self, node: Node | None, *, alone: bool) -> Call | None:
        """The layer whose output an activation is, but for its layout.

        Args:
            node: the activation.
            alone: nothing else may read that output.
        """
        while node is not None:
            if alone and len({id(step) for step in self.flow.readers(node)}) > 1:
                return None
            if node in self.layer_at:
                return self.layer_at[node]
            step = self.flow.made_by.get(node)
            if step is None or not passes_unchanged(step):
                return None
            node = step.inputs[0]
        return None

    def is_gate_only(self, name: str) -> bool:
        """Whether a layer only computes a gate."""
        return all(call.output not in self.alive for call in self.layers[name])

    def region(self, addition: Addition) -> set[Node]:
        """The activations between an addition's ancestor and its branch, the branch included."""
        ancestor = addition.ancestor
        return {
            node
            for node in self.flow.backwards(addition.branch, stop=lambda each: each is ancestor)
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
    """What reaches an activation that nothing reads, not counting ways through a gate."""
    gates = {id(step): found[1] for step in flow.steps if (found := gate_of(flow, step))}
    waiting = [node for node in flow.made_by if not flow.readers(node)] + flow.outputs
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


def removable_norms(structure: Structure) -> tuple[list[str], dict[str, str]]:
    """The norms a fresh model can do without, and why it keeps the others."""
    remove, keep = [], {}
    for name, calls in structure.norms.items():
        reason = _reason_to_keep(structure, calls)
        if reason:
            keep[name] = reason
        else:
            remove.append(name)
    return remove, keep


def _reason_to_keep(structure: Structure, calls: list[Call]) -> str:
    norm = calls[0].module
    if not is_removable(norm):
        return "what it does beside normalizing is not known"
    if any(call.input is None or call.output is None for call in calls):
        return "it normalizes something that is not computed from the input"
    behind = [structure.directly_behind(call.input, alone=False) for call in calls]
    if not is_map_norm(norm) and not all(_is_convolution(call) for call in behind):
        return "it stands between linear and attention layers, not behind a convolution"
    if len({call.name for call in behind if call is not None}) > 1:
        return f"several layers share it ({', '.join(sorted({c.name for c in behind if c}))})"
    unknown = next((c for c in behind if c is not None and base_of(c.module, fresh=True) is None), None)
    if unknown is not None:
        return f"{unknown.name} before it is a {class_name(unknown.module)}, which has no standardized twin"
    return next((reason for call in calls if (reason := _unknown_operation(structure, call))), "")


def _unknown_operation(structure: Structure, call: Call) -> str:
    """Why a norm stays behind a convolution or matrix product that is no layer we know; "" where it is none."""
    node, flow = call.input, structure.flow
    while node is not None and node not in structure.layer_at:
        step = flow.made_by.get(node)
        if step is None:
            return ""
        if step.name in op.CONVOLUTION or (step.name in op.LINEAR and step.outputs[0].step.weighted):
            return f"{step.module or 'the model'} before it computes {step.name} with a weight of no known layer"
        node = step.inputs[0] if passes_unchanged(step) else None
    return ""


def _is_convolution(call: Call | None) -> bool:
    return call is not None and not isinstance(call.module, nn.Linear)


def needs_copy(structure: Structure, call: Call) -> bool:
    """Whether what follows a norm writes in place on what the norm's input, once that is the same tensor, still is for.

    The output of a layer that feeds the norm alone may be overwritten: nobody else reads it, not the layer either.
    """
    if structure.directly_behind(call.input, alone=True) is not None:
        return False
    flow, inside = structure.flow, f"{call.name}."
    waiting, seen = [call.output], {call.output}
    if any(op.mutated_arguments(step.function) for step in flow.steps if step.module.startswith(inside)):
        return True
    while waiting:
        node = waiting.pop()
        assert node is not None
        for step in flow.readers(node):
            if op.mutated_arguments(step.function):
                return True
            for made in step.outputs if passes_unchanged(step) else ():
                if made not in seen:
                    seen.add(made)
                    waiting.append(made)
    return False


def layers_to_standardize(structure: Structure, removed: set[str]) -> tuple[list[str], dict[str, str]]:
    """The layers that take over what removed norms did, and why the others stay.

    A convolution is one if a removed norm follows it before any other layer, or if it lies in a residual branch or
    shortcut some norm of which is removed and none kept; a linear layer, if the norm follows at once or in such a
    branch. Layers that only compute a gate stay, and so do the network's last.
    """
    wanted = _followed(structure, removed) | _in_branches(structure, removed)
    chosen, kept = [], {}
    for name, calls in structure.layers.items():
        module = calls[0].module
        if name not in wanted:
            kept[name] = "no removed normalizer follows it"
        elif structure.is_gate_only(name):
            kept[name] = "it only computes a gate"
        elif base_of(module, fresh=True) is None:
            kept[name] = f"a {class_name(module)} has no standardized twin, or has hooks or parametrizations"
        elif fan_in(module) == 1 and not isinstance(module, nn.Conv2d):
            kept[name] = "a filter of one weight cannot be standardized"
        else:
            chosen.append(name)
    return chosen, kept


def _followed(structure: Structure, removed: set[str]) -> set[str]:
    wanted = set()
    for name in removed:
        for call in structure.norms[name]:
            assert call.input is not None
            direct = structure.directly_behind(call.input, alone=False)
            wanted |= {direct.name} if direct is not None else set()
            wanted |= {c.name for c in structure.feeding(call.input) if is_layer(c.module) and _is_convolution(c)}
    return wanted


def _in_branches(structure: Structure, removed: set[str]) -> set[str]:
    wanted = set()
    for addition in structure.flow.additions:
        if changes_branch(structure, addition, removed):
            wanted |= set(layers_in(structure, structure.region(addition)))
    return wanted


def changes_branch(structure: Structure, addition: Addition, removed: set[str]) -> bool:
    """Whether some norm of a residual branch is removed and none kept."""
    region = structure.region(addition)
    norms = {structure.norm_at[node].name for node in region if node in structure.norm_at}
    return bool(norms) and norms <= removed


def layers_in(structure: Structure, region: set[Node]) -> Iterator[str]:
    """The layers that made activations of a region."""
    return (structure.layer_at[node].name for node in region if node in structure.layer_at)
