"""The plan of a fresh start: norms out, standardized layers in, every branch scaled, every input of unit variance.

In the order of this file: the plan, and the changes it is made of; input scales; variances; what begins a stream.

*Input scales.* A layer fed by an elementwise function of a Gaussian activation of variance β² has input scale γ / β.
Every other input (a pool, a gate's product, a stream that was rectified before) has no closed form and is measured.

*Variances.* The plan knows Gaussian activations: a standardized layer gives variance 1 (alpha² where it ends a branch),
a sum with constant factors the sum of its independent operands, a concatenation the mean over its channels. So inside a
stage the residual stream climbs by alpha² a block and a projection shortcut resets it, as in the variance plan of our
own networks.

*Streams.* A branch is scaled to alpha², and adds that share to a stream of unit variance: to one of variance 1000 it
adds nothing, and one of 0.001 it drowns. A layer that is standardized gives unit variance. So does one that keeps its
weight (of few weights a filter, say) with a constant factor, which is measured: in whatever units its input is, it
gives the same and learns at the same pace. Its bias takes out what all examples have in common. Where something else
begins a stream (the input itself, a lookup, weights that are computed) nothing carries such a factor, and what enters
the first block is measured for a note. In a model without norms the first layers get such a factor where no stream
follows, too.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from normfree.convert.carriers import (
    INPUT,
    Ending,
    NormGroups,
    Places,
    SignalPaths,
    find_endings,
    find_loops,
    sort_norms,
    uncarried_norms,
)
from normfree.convert.dataflow import (
    Call,
    Dataflow,
    Step,
    activation_in,
    class_name,
    factors_of,
    is_batch_norm,
    passes_unchanged,
)
from normfree.convert.functions import Functions
from normfree.convert.record import BARE, RESCALED, SCALED, UNITS, WITH_ACTIVATION, Beta, Change, Kept
from normfree.convert.structure import Structure, WeightedMap, layers_to_standardize
from normfree.convert.unnormalized import LAST, Unnormalized, biases_of_rows, find_unnormalized
from normfree.nn import WeightLayout
from normfree.trace import operations as op
from normfree.trace.graph import Node

NEAR_UNIT = 0.25, 4.0
"""Planned variances at a removed norm's place that need nothing to restore 1 there."""


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """The arguments of a fresh start that the ends of branches get."""

    alpha: float
    skip_gain: float


@dataclass(frozen=True, kw_only=True)
class FreshPlan:
    """What a fresh start changes and keeps.

    Attributes:
        changes: the modules to be exchanged; input scales to be measured are None.
        kept: what is left alone.
        notes: branches that could not be scaled.
        replaceable: the norms after aggregations that go, in whose place an affine map could stand.
        unnormalized: what of it no norm asks for.
        unscaled: what gives a residual stream its scale, whatever that is, and carries no factor, in words.
        loops: the modules that run on what came of their own output, and the removed norms that each has to do without.
    """

    changes: list[Change]
    kept: list[Kept]
    notes: list[str]
    replaceable: frozenset[str]
    unnormalized: Unnormalized
    unscaled: tuple[str, ...]
    loops: Mapping[str, frozenset[str]]


def fresh_plan(
    structure: Structure,
    model: nn.Module,
    *,
    alpha: float,
    skip_gain: float,
    beta: Beta,
    uncarried: Mapping[str, str],
    staying: Mapping[str, str],
) -> FreshPlan:
    """What to change for a variance-preserving start.

    Args:
        structure: of the model.
        model: the original.
        alpha: factor of the residual branches.
        skip_gain: initial value of their learnable factor.
        beta: "plan" (closed forms where there are any) or "measured".
        uncarried: norms whose variance was measured not to be carried by the layers near them, and how.
        staying: norms without which the signal was measured to leave its size, and how.
    """
    ways = SignalPaths(structure)
    norms = sort_norms(structure, ways, staying)
    carrying, layers_kept = layers_to_standardize(structure, norms.removed, norms.affine.keys() | norms.factored)
    bare = find_unnormalized(structure, ways, carrying)
    chosen = [name for name in structure.layers if name in bare.layers or name in carrying]
    layers_kept = {n: reason for n, reason in {**layers_kept, **bare.kept}.items() if n not in bare.layers}
    removed = set(norms.removed)
    endings = find_endings(structure, model, removed, chosen, bare.branches, norms.affine.keys() | norms.factored)
    variance = plan_variances(structure, set(chosen), removed, endings, alpha)
    restored = _restore_variance(structure, norms, set(chosen), endings, variance)
    restored |= {name: _affine_change(structure, name, reason) for name, reason in uncarried.items()}
    gone = removed - set(restored)
    made_by = structure.flow.made_by
    variance = plan_variances(structure, set(chosen), gone, endings, alpha)  # again: what restores one passes none on
    # A multiple of what is Gaussian is a function of it, as any other.
    other = structure.flow.dropped | {node for node in variance if _is_multiple(made_by.get(node))}
    planned = {node: value for node, value in variance.items() if node not in other}
    functions = Functions(structure, gone, planned)
    biases = biases_of_rows(structure, functions, chosen)
    scales = input_scales(structure, chosen, functions, biases)
    dropped = [name for name in chosen if scales[name].with_dropout]
    for name in {name for ending in endings for name in ending.absorbing}:
        scales[name] = InputScale(None, "measured, for what it reads is scaled by the end of a branch, too")
    if beta == "measured":
        scales = {name: InputScale(None, "measured, as asked for") for name in scales}
    factors = _Factors(alpha=alpha, skip_gain=skip_gain)
    ending_of = {name: ending for ending in endings for name in ending.modules}
    modules, places = dict(model.named_modules(remove_duplicate=False)), Places(structure.flow, model)
    changes = []
    for name, layers in norms.removed.items():
        if name in ending_of:
            changes.append(_scale_change(modules[name], name, ending_of[name], factors, carried_by=layers))
        else:
            changes.append(restored.get(name) or _removal(structure, name, layers))
    changes += [_affine_change(structure, name, reason) for name, reason in norms.affine.items()]
    changes += [_factor_change(structure, name, reason) for name, reason in norms.factored.items()]
    changes += [_layer_change(structure.maps[n], n, scales[n], ending_of, factors, biases.get(n)) for n in chosen]
    for name, ending in ending_of.items():
        if name not in scales and name not in norms.removed:
            is_shared = places.calls[name][0].name in places.shared
            within = name.rpartition(".")[0] if is_shared else None
            changes.append(_scale_change(modules[name], name, ending, factors, within=within))
    ends = [node for ending in endings for node in (ending.addition.ancestor, ending.addition.shortcut)]
    streams = find_stream_starts(structure, ways, ends, gone)
    scalable = {name for name in bare.scalable if layers_kept[name] != LAST}
    first = set() if bare.beside_norms else first_layers(structure, ways, scalable, gone)
    rescaled = [name for name in structure.layers if name in first | (streams.layers & bare.scalable)]
    changes += [_rescaled_change(structure, name, layers_kept.pop(name)) for name in rescaled]
    others = [name for name in structure.layers if name in streams.layers - {*chosen, *rescaled}]
    kept = [Kept(name=n, was=class_name(modules[n]), reason=reason, norm=True) for n, reason in norms.kept.items()]
    kept += [Kept(name=n, was=class_name(modules[n]), reason=reason) for n, reason in layers_kept.items()]
    notes = [
        f"branch added in {e.addition.name or 'the model'} keeps its size: {e.problem}" for e in endings if e.problem
    ]
    if dropped:
        notes.append(
            f"dropout acts in front of {dropped[0]}"
            + (f" and {len(dropped) - 1} more layers" if len(dropped) > 1 else "")
            + ", so their scales are those of training; in evaluation the signal is smaller: plot it with mode='train'"
        )
    without = uncarried_norms(structure, norms, {change.name for change in changes if change.name not in removed})
    assert not without, f"nothing carries the variance of {without}"
    passed = {name for ending in endings if ending.modules for name in ending.passed}
    replaceable = {
        name
        for name in norms.aggregated - passed - set(restored)
        if len(structure.norms[name]) == 1 and is_batch_norm(structure.norms[name][0].module)
    }
    return FreshPlan(
        changes=changes,
        kept=kept,
        notes=notes,
        replaceable=frozenset(replaceable),
        unnormalized=bare,
        unscaled=(*others, *streams.others),
        loops=find_loops(structure, norms),
    )


def _restore_variance(
    structure: Structure, norms: NormGroups, chosen: set[str], found: list[Ending], variance: dict[Node, float]
) -> dict[str, Change]:
    """What stands in the place of a norm where the layers before it do not leave a variance near 1 there.

    Nothing is needed where a standardized layer takes over before anything but homogeneous functions sees it, nor where
    a branch's end before it has been scaled by alpha. Else it is an affine map, or a factor where a norm is by example.
    """
    passed = {name for ending in found if ending.modules for name in ending.passed}
    absorbing = SignalPaths(structure, chosen).absorbing if norms.between - passed else {}
    least, most = NEAR_UNIT
    restored = {}
    for name in norms.between - passed:
        calls = structure.norms[name]
        missing = [
            call
            for call in calls
            if not least <= variance.get(call.input, 0.0) <= most and call.output not in absorbing  # type: ignore[arg-type]
        ]
        if not missing:
            continue
        layers = ", ".join(norms.removed[name])
        if len(calls) == 1 and is_batch_norm(calls[0].module):
            restored[name] = _affine_change(structure, name, f"what lies between it and {layers} changes the variance")
        else:
            reason = f"what lies between it and {layers} changes the variance"
            restored[name] = _factor_change(structure, name, reason, norms.removed[name])
    return restored


def _factor_change(structure: Structure, name: str, reason: str, layers: tuple[str, ...] = ()) -> Change:
    """A measured factor in a norm's place, which carries its variance together with the layers."""
    return Change(
        name=name,
        was=class_name(structure.norms[name][0].module),
        now=SCALED,
        reason=f"a measured factor: {reason}",
        carried_by=(*layers, name),
    )


def _removal(structure: Structure, name: str, layers: tuple[str, ...]) -> Change:
    norm = structure.norms[name][0].module
    fused = activation_in(norm)
    stays = f"; its {', '.join(class_name(part) for _, part in fused)} stays" if fused else ""
    return Change(
        name=name,
        was=class_name(norm),
        now=WITH_ACTIVATION if fused else BARE,
        reason=f"removed{stays}",
        carried_by=layers,
    )


def _affine_change(structure: Structure, name: str, reason: str) -> Change:
    return Change(
        name=name,
        was=class_name(structure.norms[name][0].module),
        now=UNITS,
        reason=f"an affine map with the example's mean and variance of each channel: {reason}",
        carried_by=(name,),
    )


def _rescaled_change(structure: Structure, name: str, reason: str) -> Change:
    """The change by which a layer gets a measured input scale, and keeps its weight; ``reason`` it is kept for."""
    layer = structure.maps[name]
    kind = class_name(layer.module)
    why = f"measured, for unit variance of what it gives; it keeps its weight: {reason}"
    layout = WeightLayout() if layer.layout is None else layer.layout
    return Change(name=name, was=kind, now=f"{RESCALED} {kind}", reason=why, weight=layout)


def _layer_change(
    layer: WeightedMap,
    name: str,
    scale: InputScale,
    carriers: dict[str, Ending],
    factors: _Factors,
    bias: float | None,
) -> Change:
    ends = name in carriers
    correction = carriers[name].modules[name] if ends else 1.0
    place = _place(carriers[name]) + _correction_reason(correction) if ends else ""
    bare = "; one weight a filter leaves nothing to standardize" if layer.fan_in == 1 else ""
    row = "" if bias is None else "; in a long row, so that gradients do not explode"
    return Change(
        name=name,
        was=class_name(layer.module),
        now=layer.now(fresh=True),
        reason=scale.reason + place + bare + row,
        bias=bias,
        input_scale=None if scale.value is None else scale.value * correction,
        alpha=carriers[name].alpha(factors.alpha) if ends else None,
        skip_gain=_skip_gain(carriers[name], factors) if ends else None,
        correction=correction if correction != 1 else None,
        weight=layer.layout,
    )


def _scale_change(
    module: nn.Module,
    name: str,
    ending: Ending,
    factors: _Factors,
    *,
    carried_by: tuple[str, ...] = (),
    within: str | None = None,
) -> Change:
    correction = ending.modules[name]
    what = "removed" if carried_by else "the gate" if correction != 1 else "the activation"
    return Change(
        name=name,
        was=class_name(module),
        now=SCALED,
        reason=f"{what}{_place(ending)}{_correction_reason(correction)}",
        alpha=ending.alpha(factors.alpha),
        skip_gain=_skip_gain(ending, factors),
        correction=correction if correction != 1 else None,
        carried_by=carried_by,
        within=within,
    )


def _skip_gain(ending: Ending, factors: _Factors) -> float | None:
    return None if ending.learned or ending.constant else factors.skip_gain


def _correction_reason(correction: float) -> str:
    """What a factor restores, for a reason; "" for none."""
    if correction == 1:
        return ""
    return f"; {correction:g} for what {'a sigmoid halves' if correction == 2 else 'sigmoids take'}"


def _place(ending: Ending) -> str:
    """Which branch a module ends, for its reason."""
    own = f", whose {ending.learned} stands for the skip gain" if ending.learned else ""
    fixed = ", by alpha alone" if ending.constant and not ending.learned else ""
    return f"; ends the branch added in {ending.addition.name or 'the model'}{own}{fixed}"


@dataclass(frozen=True)
class InputScale:
    """The constant factor of one layer's input.

    Attributes:
        value: the factor; None if it has to be measured.
        reason: where it comes from, in words.
        with_dropout: it is measured with dropout on.
    """

    value: float | None
    reason: str
    with_dropout: bool = False


def input_scales(
    structure: Structure, chosen: Iterable[str], functions: Functions, biases: Mapping[str, float]
) -> dict[str, InputScale]:
    """The input scale of every layer to be standardized; ``biases`` are those that layers start with."""
    scales = {}
    for name in chosen:
        each = [_scale_of(call, functions, biases) for call in structure.layers[name]]
        alike = all(scale.value == each[0].value for scale in each)
        scales[name] = each[0] if alike else InputScale(None, "measured on the first of several signals")
    return scales


def _is_multiple(step: Step | None) -> bool:
    return step is not None and step.name in op.SCALING


def _scale_of(call: Call, functions: Functions, biases: Mapping[str, float]) -> InputScale:
    if call.input is None:
        return InputScale(None, "measured")
    variance = functions.planned.get(call.input)
    if variance is not None:
        beta = math.sqrt(variance)
        return InputScale(1 / beta, "fed by unit variance" if beta == 1 else f"1/β, β = {beta:.4g} by the plan")
    function = functions.function_before(call.input)
    bias = biases.get(functions.layer_before(function.base) or "", 0.0) if function is not None else 0.0
    constant = None if function is None else functions.gamma(function, bias)
    if function is None or constant is None:
        if call.input in functions.after_dropout:
            return InputScale(None, "measured, with dropout on", with_dropout=True)
        return InputScale(None, "measured: no closed form for what feeds it")
    beta = math.sqrt(functions.planned[function.base])
    of_beta = "" if beta == 1 else f" / β, β = {beta:.4g} by the plan"
    of_bias = f" after a bias of {bias:g}" if bias else ""
    return InputScale(constant / beta, f"γ = {constant:.4g} of {function.name}{of_bias}{of_beta}")


def plan_variances(
    structure: Structure, chosen: set[str], removed: set[str], found: list[Ending], alpha: float
) -> dict[Node, float]:
    """The variance of every activation that is expected to be Gaussian.

    Args:
        structure: of the model.
        chosen: names of the layers to be standardized.
        removed: names of the norms to be passed as if they were not there.
        found: the endings of the branches. A branch of which the plan knows no variance (it ends in a gate or an
            activation) is taken to have what its factor is for, alpha².
        alpha: of the branches.
    """
    carried = {name: ending.alpha(alpha) for ending in found for name in ending.modules}
    variance: dict[Node, float] = {}
    for name in chosen:
        for call in structure.layers[name]:
            if call.output is not None:
                variance[call.output] = carried.get(name, 1.0) ** 2
    sums = {ending.addition.output: ending for ending in found if ending.modules}
    for step in structure.flow.steps:
        for node in step.outputs[:1]:
            if node in variance or not step.inputs:
                continue
            if node in sums:
                whole = sums[node].alpha(alpha) * sums[node].factor
                variance.setdefault(sums[node].addition.branch, whole**2 * sums[node].square)
            through = structure.is_plain_norm(node, removed) or (step.name in op.NORM and step.module in removed)
            value = _after(step, variance, structure.flow, through=through)
            if value is not None:
                variance[node] = value
    return variance


def _after(step: Step, variance: Mapping[Node, float], flow: Dataflow, *, through: bool) -> float | None:
    """The variance of what an operation makes, or None; ``through`` an operation that is not left in the model."""
    known = [variance[node] for node in step.inputs if node in variance]
    if len(known) < len(step.inputs):
        return None
    if len(step.inputs) == 1 and step.inputs[0] in flow.dropped:
        return None
    if through or passes_unchanged(step):
        return known[0]
    if step.name == "cat":
        sizes = [math.prod(flow.shapes[node]) for node in step.inputs]
        return sum(size * value for size, value in zip(sizes, known, strict=True)) / sum(sizes)
    factors = factors_of(step)
    if factors is None or len({flow.shapes[node] for node in step.inputs}) > 1:
        return None
    if len(factors) != len(step.inputs):  # a constant is added, which moves the mean: what follows is measured
        return None
    total = dict.fromkeys(step.inputs, 0.0)  # an activation added to itself is twice as large
    for node, factor in zip(step.inputs, factors, strict=True):
        total[node] += factor
    return sum(variance[node] * factor**2 for node, factor in total.items())


@dataclass
class StreamStarts:
    """What some activations come from.

    Attributes:
        layers: the nearest layers on the way back along the shortcuts, by name.
        others: what else, in words.
    """

    layers: set[str] = field(default_factory=set)
    others: dict[str, None] = field(default_factory=dict)


def find_stream_starts(
    structure: Structure, ways: SignalPaths, nodes: Iterable[Node | None], gone: Container[str]
) -> StreamStarts:
    """What gives some activations their size; of a residual sum it is what gives it to the shortcut.

    Args:
        structure: of the model.
        ways: through it.
        nodes: the activations.
        gone: the norms in whose place nothing gives unit variance.
    """
    flow, found = structure.flow, StreamStarts()
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
        name: find_stream_starts(structure, ways, [call.input for call in calls], gone)
        for name, calls in structure.layers.items()
        if name in scalable
    }
    found = set[str]()
    while new := {n for n, b in before.items() if b.layers <= found and b.others.keys() <= {INPUT}} - found:
        found |= new
    return found
