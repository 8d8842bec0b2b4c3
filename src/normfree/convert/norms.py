"""Which norms a fresh model can do without, and why it keeps the others."""

from __future__ import annotations

from dataclasses import dataclass, field

from normfree.convert.dataflow import Call, Dataflow, passes_unchanged
from normfree.convert.kinds import (
    activation_in,
    base_of,
    class_name,
    has_hooks,
    is_batch_norm,
    is_convolution,
    is_layer,
    is_map_norm,
    is_removable,
)
from normfree.convert.structure import Structure
from normfree.signal import operations as op

_ACTIVATIONS = op.NONLINEAR - {"pow", "square", "sqrt", "rsqrt", "reciprocal", "abs", "clamp", "clamp_min", "maximum"}
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
                norms.kept[name] = "it gives the input its units, each example by itself"
        else:
            norms.removed.append(name)
    return norms


def _comes_before_layers(structure: Structure, call: Call) -> bool:
    return call.input is not None and not any(is_layer(c.module) for c in structure.feeding(call.input))


def _reason_to_keep(structure: Structure, calls: list[Call]) -> str:
    norm = calls[0].module
    if unknown := why_unknown(structure.flow, calls[0]):
        return unknown
    if any(call.input is None or call.output is None for call in calls):
        return "it normalizes something that is not computed from the input"
    behind = [structure.directly_behind(call.input, alone=False) for call in calls]
    if not is_map_norm(norm) and not all(call is not None and is_convolution(call.module) for call in behind):
        return "it stands between linear and attention layers, not behind a convolution"
    if len({call.name for call in behind if call is not None}) > 1:
        return f"several layers share it ({', '.join(sorted({c.name for c in behind if c}))})"
    foreign = next((c for c in behind if c is not None and base_of(c.module, fresh=True) is None), None)
    if foreign is not None:
        return f"{foreign.name} before it is a {class_name(foreign.module)}, which has no standardized twin"
    shared = next((c.name for c in behind if c is not None and c.name in structure.shared), None)
    if shared is not None:
        return f"{structure.shared[shared]} reads the weight of {shared} before it, too"
    return next((reason for call in calls if (reason := _unknown_operation(structure, call))), "")


def why_unknown(flow: Dataflow, call: Call) -> str:
    """Why it is not known what a norm's module does; "" where it normalizes, and runs its own activation at most."""
    if has_hooks(call.module):
        return "it has hooks"
    if not is_removable(call.module):
        return "what it does beside normalizing is not known"
    more = _beside_normalizing(flow, call)
    return f"its forward does more than normalize ({more})" if more else ""


def _beside_normalizing(flow: Dataflow, call: Call) -> str:
    """An operation of a norm's own forward that has no part in normalizing; "" for none."""
    own = tuple(f"{call.name}.{part}" for part, _ in activation_in(call.module))
    steps = [step for step in flow.within(call.name) if not step.module.startswith(own)]
    at_once = any(step.name in op.NORM for step in steps)
    for step in steps:
        is_affine = step.name in _AFFINE and len(step.inputs) == 1
        if step.name in _ACTIVATIONS or (at_once and not (is_affine or step.name in op.NORM | op.VIEW)):
            return step.name
    return ""


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
