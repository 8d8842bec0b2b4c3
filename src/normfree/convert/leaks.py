"""Whether an example's output depends on the other examples of its batch, and which operation does so."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from normfree.convert.checking import change_by_others
from normfree.convert.dataflow import Dataflow, Step, record
from normfree.convert.kinds import is_batch_norm
from normfree.convert.normalization import Normalization, Normalizations, reduced_axes
from normfree.convert.record import Conversion, Kept
from normfree.trace import operations as op
from normfree.trace.graph import Node
from normfree.trace.inputs import Batch
from normfree.trace.preserve import untouched

_ROWS = frozenset({"index_select", "gather", "index_add", "scatter_add", "scatter_reduce", "index_reduce", "scatter"})
"""Operations along an axis, their second argument, that read or write rows by their index."""

_STATISTICS = frozenset({"mean", "sum", "var", "var_mean", "std", "std_mean", "amax", "amin", "cumsum"})
_OVER_EXAMPLES = frozenset({"examples", "nodes"})


def noted_leak(converted: nn.Module, conversion: Conversion, batch: Batch) -> Conversion:
    """The record with what is seen of a converted model whose examples see each other in training mode.

    A normalization over the examples is a normalizer left. Messages along the first axis, as between the nodes of a
    graph or from one time step to the next, are the model's own design: a note. Of anything else it is recorded what
    was seen, not what it would be. Where a BatchNorm stays nothing is added, for it explains what is seen.
    """
    if any(is_batch_norm(converted.get_submodule(one.name)) for one in conversion.norms_left):
        return conversion
    change = change_by_others(converted, batch)
    if change is None:
        return conversion
    flow = _in_training(converted, batch)
    normalizations = None if flow is None else Normalizations(flow)
    seen = f"an example's output changed when the other examples of its batch did (relative change {change:.2g})"
    if normalizations is not None and (norm := _over_examples(normalizations)) is not None:
        if any(one.name == norm.module for one in conversion.norms_left):
            return conversion
        reason = f"{seen}: {norm.module or 'the model'} {norm}"
        kept = Kept(name=norm.module, was=norm.kind, reason=reason, norm=True)
        return replace(conversion, kept=(*conversion.kept, kept))
    step = None if normalizations is None else _along_first_axis(normalizations)
    if step is not None:
        where = step.module or "the model"
        note = (
            f"{seen}: {where} computes {step.name} along the first axis, whose rows (nodes of a graph, time steps) see "
            "each other by the model's own design, not by a normalizer"
        )
        return replace(conversion, notes=(*conversion.notes, note))
    cause = None if normalizations is None else _statistic_of_examples(normalizations)
    name, was = ("", "") if cause is None else (cause.module, cause.name)
    reason = (
        "no normalization that is recognised does so"
        if cause is None
        else f"{name or 'the model'} computes {was} of them"
    )
    kept = Kept(name=name, was=was or "its forward", reason=f"{seen}: {reason}")
    return replace(conversion, kept=(*conversion.kept, kept))


def _in_training(model: nn.Module, batch: Batch) -> Dataflow | None:
    """The dataflow in training mode; None where the model wants something else then, such as targets."""
    try:
        return record(model, batch, state=partial(untouched, model, "train"))
    except ValueError:
        return None


def _over_examples(normalizations: Normalizations) -> Normalization | None:
    """A normalization, or the subtraction of a mean, over the examples; the first."""
    return next((one for one in normalizations.found if one.statistic.over & _OVER_EXAMPLES), None)


def _along_first_axis(normalizations: Normalizations) -> Step | None:
    """The first operation by which the rows of the first axis see each other, other than a statistic of all."""
    return next((step for step in normalizations.flow.steps if _mixes_rows(normalizations, step)), None)


def _mixes_rows(normalizations: Normalizations, step: Step) -> bool:
    flow, examples = normalizations.flow, normalizations.examples

    def has_rows(value: object) -> bool:
        return isinstance(value, Node) and flow.shapes[value][:1] == (examples,)

    args = step.args
    if step.name in _ROWS:
        return len(args) > 1 and args[1] == 0 and any(map(has_rows, step.inputs))
    if step.name == "index":
        return has_rows(args[0]) and next(iter(args[1]), None) is not None
    if step.name in ("mm", "addmm", "_sparse_mm", "_sparse_addmm"):
        return bool(step.inputs) and isinstance(args[-1], Node) and args[-1] in step.inputs
    if step.name in ("select", "unbind"):  # of one row each, as a loop over time steps takes them
        return has_rows(args[0]) and (args[1] if len(args) > 1 else 0) == 0
    return False


def _statistic_of_examples(normalizations: Normalizations) -> Step | None:
    """The first statistic of all examples that does not normalize."""
    flow = normalizations.flow
    for step in flow.steps:
        if step.name in _STATISTICS and step.inputs and step.name not in op.NORM:
            node = step.inputs[0]
            axes = reduced_axes(step, len(flow.shapes[node]))
            if "examples" in normalizations.kinds_of_axes(node, axes):
                return step
    return None
