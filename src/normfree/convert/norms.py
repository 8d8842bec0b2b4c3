"""Which norms a fresh model can do without, and why it keeps the others."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from normfree.convert.dataflow import Call, Dataflow, passes_unchanged
from normfree.convert.kinds import (
    activation_in,
    is_batch_norm,
    is_map_norm,
    is_norm,
    is_removable,
)
from normfree.convert.maps import why_no_map
from normfree.convert.structure import Structure
from normfree.nn.fold import attached_to
from normfree.signal import operations as op

_ACTIVATIONS = op.NONLINEAR - {"pow", "square", "sqrt", "rsqrt", "reciprocal", "abs", "clamp", "clamp_min", "maximum"}
NOT_FOLLOWED = "no recorded operation leads from the input to it"
"""Why a norm stays in a model whose forward copies its input piece by piece, as detectors do."""

_WEIGHTED = op.CONVOLUTION | op.RECURRENT | op.EMBEDDING
_LAYOUT = op.VIEW | op.PARTIAL | {"cat"}
_AFFINE = op.SCALING | op.ADDITION | {"addcmul"}


@dataclass(frozen=True)
class Norms:
    """The norms of a model, by what a fresh start makes of them.

    Attributes:
        removed: those it can do without.
        of_the_input: those that give the input its units: no layer comes before them.
        kept: the others, and why.
    """

    removed: list[str] = field(default_factory=list)
    of_the_input: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


def sorted_norms(structure: Structure) -> Norms:
    """What becomes of each norm of a model in a fresh start."""
    norms = Norms()
    for name, calls in structure.norms.items():
        if reason := _reason_to_keep(structure, calls):
            norms.kept[name] = reason
        elif any(_comes_before_layers(structure, call) for call in calls):
            if is_batch_norm(calls[0].module):
                norms.of_the_input.append(name)
            else:
                alone = ", each example by itself" if is_norm(calls[0].module) else ""
                norms.kept[name] = f"it gives the input its units{alone}"
        else:
            norms.removed.append(name)
    return norms


def _comes_before_layers(structure: Structure, call: Call) -> bool:
    return call.input is not None and not structure.has_layer_behind(call.input)


def _reason_to_keep(structure: Structure, calls: list[Call]) -> str:
    if unknown := why_unknown(structure.flow, calls[0]):
        return unknown
    if any(call.input is None or call.output is None for call in calls):
        return NOT_FOLLOWED
    behind = [structure.directly_behind(call.input, alone=False) for call in calls]
    if not _is_of_maps(structure, calls) and not all(
        call is not None and structure.is_convolution(call) for call in behind
    ):
        return "it stands between linear and attention layers, not behind a convolution"
    if len({call.name for call in behind if call is not None}) > 1:
        return f"several layers share it ({', '.join(sorted({c.name for c in behind if c}))})"
    if foreign := _foreign(structure, calls, behind):
        return foreign
    shared = next((c.name for c in behind if c is not None and c.name in structure.shared), None)
    if shared is not None:
        return f"{structure.shared[shared]} reads a parameter of {shared} before it, too"
    return next((reason for call in calls if (reason := _unknown_operation(structure, call))), "")


def _is_of_maps(structure: Structure, calls: list[Call]) -> bool:
    """Whether a norm is one of convolutional networks: of torch's classes, with statistics, or of maps [N, C, …, …]."""
    name, module, node = calls[0].name, calls[0].module, calls[0].input
    if is_norm(module):
        return is_map_norm(module)
    is_map = node is not None and len(structure.flow.shapes[node]) > 3 and node.note.channel_axis == 1
    return name in structure.constants or is_map


def _foreign(structure: Structure, calls: list[Call], behind: list[Call | None]) -> str:
    """Why a norm stays behind layers none of which has a twin; "" where one has, or there is none."""

    def problem(call: Call) -> str:
        return structure.maps[call.name].why_not(fresh=True) if call.name in structure.maps else ""

    direct = [call for call in behind if call is not None and problem(call)]
    nearest = [c for call in calls if call.input is not None for c in structure.feeding(call.input)]
    convolutions = [call for call in nearest if structure.is_convolution(call)]
    if not direct and any(not problem(call) for call in convolutions):
        return ""
    return next((f"{call.name} before it {problem(call)}" for call in (*direct, *convolutions)), "")


def why_unknown(flow: Dataflow, call: Call) -> str:
    """Why it is not known what a norm's module does; "" where it normalizes, and runs its own activation at most."""
    if attached := attached_to(call.module):
        return f"it has {attached}"
    if isinstance(call.module, nn.LocalResponseNorm):
        return "it divides by its neighbouring channels, each position by itself: it keeps no statistics"
    if not is_removable(call.module):
        return "what it does beside normalizing is not known"
    more = _beside_normalizing(flow, call)
    return f"its forward does more than normalize ({more})" if more else ""


def _beside_normalizing(flow: Dataflow, call: Call) -> str:
    """An operation of a norm's own forward that has no part in normalizing; "" for none."""
    own = tuple(f"{call.name}.{part}" for part, _ in activation_in(call.module))
    leading = set(flow.backwards(call.output, stop=lambda node: node is call.input)) if call.output else set()
    steps = [
        step
        for step in flow.within(call.name)
        if not step.module.startswith(own) and not leading.isdisjoint(step.outputs)
    ]
    at_once = any(step.name in op.NORM for step in steps)
    for step in steps:
        is_affine = step.name in _AFFINE and len(step.inputs) == 1
        if step.name in _ACTIVATIONS or (at_once and not (is_affine or step.name in _LAYOUT | op.NORM)):
            return step.name
    return ""


def _unknown_operation(structure: Structure, call: Call) -> str:
    """Why a norm stays behind a convolution or matrix product that is no layer we know; "" where it is none."""
    node, flow = call.input, structure.flow
    while node is not None and node not in structure.layer_at:
        step = flow.made_by.get(node)
        if step is None:
            return ""
        if step.name in _WEIGHTED or (step.name in op.LINEAR and step.outputs[0].step.weighted):
            known = why_no_map(flow, step.module)
            return (
                f"{step.module or 'the model'} before it {known or f'computes {step.name} with no weight of its own'}"
            )
        node = step.inputs[0] if passes_unchanged(step) else None
    return ""


def needs_copy(structure: Structure, call: Call) -> bool:
    """Whether an operation behind a norm would overwrite the norm's input, were the norm gone, while that is needed.

    The output of a layer that feeds the norm alone may be overwritten: nobody else reads it, not the layer either.
    """
    if structure.directly_behind(call.input, alone=True) is not None:
        return False
    flow = structure.flow
    waiting, seen = [call.output], {call.output}
    if any(op.mutated_arguments(step.function) for step in flow.within(call.name) if step.module != call.name):
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
