"""The layers that keep their weight and get unit variance by a constant factor in it.

A branch is scaled to alpha², and adds that share to a stream of unit variance: to one of variance 1000 it adds nothing,
and one of 0.001 it drowns. A layer that is standardized gives unit variance. So does one that keeps its weight (of few
weights a filter, say) with a constant factor, which is measured: in whatever units its input is, it gives the same and
learns at the same pace. Its bias takes out what all examples have in common.

Where something else begins a stream (the input itself, a lookup, weights that are computed) nothing carries such a
factor, and what enters the first block is measured for a note. In a model without norms the first layers get such a
factor where no stream follows, too.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from normfree.convert.carriers import INPUT, SignalPaths
from normfree.convert.dataflow import class_name
from normfree.convert.record import RESCALED, Change
from normfree.convert.structure import Structure
from normfree.nn import WeightLayout
from normfree.trace import operations as op
from normfree.trace.graph import Node


@dataclass(frozen=True)
class Sources:
    """What some activations come from.

    Attributes:
        layers: the nearest layers on the way back along the shortcuts, by name.
        others: what else, in words.
    """

    layers: set[str] = field(default_factory=set)
    others: dict[str, None] = field(default_factory=dict)


def find_sources(
    structure: Structure, ways: SignalPaths, nodes: Iterable[Node | None], gone: Container[str]
) -> Sources:
    """What gives some activations their size; of a residual sum it is what gives it to the shortcut.

    Args:
        structure: of the model.
        ways: through it.
        nodes: the activations.
        gone: the norms in whose place nothing gives unit variance.
    """
    flow, found = structure.flow, Sources()
    shortcuts = {addition.output: addition.shortcut for addition in flow.additions}
    waiting = [node for node in nodes if node is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        step, norm = flow.made_by.get(node), structure.norm_at.get(node)
        before: list[Node] = []
        if node in structure.layer_at:
            found.layers.add(structure.layer_at[node].name)
        elif norm is not None:
            before = [norm.input] if norm.name in gone and norm.input is not None else []
        elif node in shortcuts:
            before = [shortcuts[node]]
        elif step is None:  # an input, or what was written through a view
            before = [each for each in node.parents if each.parents]
            found.others.update({} if before else {INPUT: None})
        elif step.name in op.EMBEDDING or step.name in op.RECURRENT or node.step.weighted:
            found.others[step.module or "a weight of the model"] = None
        else:
            before = ways.carried_values(step)
        before = [each for each in before if each not in seen]
        seen.update(before)
        waiting += before
    return found


def first_layers(structure: Structure, ways: SignalPaths, scalable: Container[str], gone: Container[str]) -> set[str]:
    """Those of the layers that take a factor before which there is nothing but the input and such layers."""
    before = {
        name: find_sources(structure, ways, [call.input for call in calls], gone)
        for name, calls in structure.layers.items()
        if name in scalable
    }
    found = set[str]()
    while new := {n for n, b in before.items() if b.layers <= found and b.others.keys() <= {INPUT}} - found:
        found |= new
    return found


def rescaling(structure: Structure, name: str, reason: str) -> Change:
    """The change by which a layer gets a measured input scale, and keeps its weight; ``reason`` it is kept for."""
    layer = structure.maps[name]
    kind = class_name(layer.module)
    why = f"measured, for unit variance of what it gives; it keeps its weight: {reason}"
    layout = WeightLayout() if layer.layout is None else layer.layout
    return Change(name=name, was=kind, now=f"{RESCALED} {kind}", reason=why, weight=layout)
