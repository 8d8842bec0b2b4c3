"""What ran in place on a norm's output would write into a layer's output once the norm is gone: it must not.

Hooks, class activation maps and per-example gradients keep what a layer gave; so does autograd of some operations. An
activation module with an ``inplace`` flag is set to work out of place, which costs what the norm's own output took and
no more; in front of any other write (``x += y``, ``F.relu_``) stands a copy. Where the norm alone read the layer's
output the copy is for such observers only, and :func:`normfree.fold` leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from normfree.convert.dataflow import Call, Dataflow, passes_unchanged
from normfree.convert.kinds import activation_in, class_name
from normfree.convert.record import Change
from normfree.convert.rewrite import BARE, COPY, OUT_OF_PLACE, OUTPUT_COPY, WITH_ACTIVATION
from normfree.convert.structure import Structure
from normfree.trace import operations as op
from normfree.trace.graph import Node


def without_overwriting(changes: Iterable[Change], structure: Structure, training: Structure | None) -> list[Change]:
    """The changes of a plan, and those by which nothing writes in place into the input of a norm that is removed.

    Args:
        changes: the plan.
        structure: of the model in evaluation mode.
        training: of the model in training mode, where it runs in it: dropout writes in place only then.
    """
    structures = [(each, _by_input(each.flow)) for each in (structure, training) if each is not None]
    made: list[Change] = []
    out_of_place: dict[str, tuple[nn.Module, str]] = {}
    for change in changes:
        if change.now not in (BARE, WITH_ACTIVATION, COPY) or change.name not in structure.norms:
            made.append(change)
            continue
        writers: dict[str, nn.Module] = {}
        copied = False
        for each, takers in structures:
            for call in each.norms.get(change.name, ()):
                if not _has_own_activation(each.flow, call):
                    found, others = _writers(each.flow, call, takers)
                    writers |= found
                    copied = copied or others
        if copied:
            inputs = [call.input for call in structure.norms[change.name]]
            alone = all(structure.directly_behind(node, alone=True) is not None for node in inputs)
            reason = f"{change.reason}; what follows writes in place, so it gets a copy"
            made.append(replace(change, now=OUTPUT_COPY if alone else COPY, reason=reason))
        else:
            made.append(change)
            for name, module in writers.items():
                out_of_place.setdefault(name, (module, change.name))
    for name, (module, norm) in out_of_place.items():
        reason = f"inplace=False: it would write into what comes before {norm}, which is gone"
        made.append(Change(name=name, was=class_name(module), now=OUT_OF_PLACE, reason=reason))
    return made


def _has_own_activation(flow: Dataflow, call: Call) -> bool:
    """Whether a norm runs an activation of its own, which stays and gives an output in memory of its own."""
    own = {part for _, part in activation_in(call.module)}
    return bool(own) and any(other.module in own and other.input is not other.output for other in flow.calls)


def _by_input(flow: Dataflow) -> Mapping[Node | None, list[Call]]:
    """The calls that take each activation."""
    found: dict[Node | None, list[Call]] = {}
    for call in flow.calls:
        found.setdefault(call.input, []).append(call)
    return found


def _writers(
    flow: Dataflow, call: Call, by_input: Mapping[Node | None, list[Call]]
) -> tuple[dict[str, nn.Module], bool]:
    """The modules with an ``inplace`` flag that write into a norm's output, and whether anything else does."""
    modules: dict[str, nn.Module] = {}
    others = False
    waiting, seen = [call.output], {call.output}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        takers = by_input.get(node, ())
        flagged = {one.name: one.module for one in takers if getattr(one.module, "inplace", False) is True}
        modules |= flagged
        for step in flow.readers(node):
            places = op.mutated_arguments(step.function)
            written = any(place < len(step.args) and step.args[place] is node for place in places)
            others = others or (written and step.module not in flagged)
            for output in step.outputs if passes_unchanged(step) else ():
                if output not in seen:
                    seen.add(output)
                    waiting.append(output)
    return modules, others
