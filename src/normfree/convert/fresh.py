"""The plan of a fresh start: norms out, standardized layers in, every branch scaled, every input of unit variance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from normfree.convert.answers import Norms, Ways, sorted_norms, unanswered
from normfree.convert.branches import Ending, Places, endings
from normfree.convert.input_scales import InputScale, input_scales
from normfree.convert.kinds import activation_in, class_name, is_batch_norm
from normfree.convert.maps import WeightedMap
from normfree.convert.record import Change, Kept
from normfree.convert.rewrite import BARE, SCALED, UNITS, WITH_ACTIVATION
from normfree.convert.structure import Structure, layers_to_standardize
from normfree.convert.variances import planned_variances
from normfree.trace.graph import Node

MEASURED = "measured"

NEAR_UNIT = 0.25, 4.0
"""Planned variances at a removed norm's place that need nothing to restore 1 there."""


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """The arguments of a fresh start that the ends of branches get."""

    alpha: float
    skip_gain: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a fresh start changes and keeps.

    Attributes:
        changes: the modules to be exchanged; input scales to be measured are None.
        kept: what is left alone.
        notes: branches that could not be scaled.
        replaceable: the norms behind aggregations that go, in whose place an affine map could stand.
    """

    changes: list[Change]
    kept: list[Kept]
    notes: list[str]
    replaceable: frozenset[str]


def fresh_plan(
    structure: Structure,
    model: nn.Module,
    *,
    alpha: float,
    skip_gain: float,
    beta: str,
    uncarried: Mapping[str, str],
) -> Plan:
    """What to change for a variance-preserving start.

    Args:
        structure: of the model.
        model: the original.
        alpha: factor of the residual branches.
        skip_gain: initial value of their learnable factor.
        beta: "plan" (closed forms where there are any) or "measured".
        uncarried: norms whose variance was measured not to be carried by the layers near them, and how.
    """
    norms = sorted_norms(structure)
    chosen, layers_kept = layers_to_standardize(structure, norms.removed)
    removed = set(norms.removed)
    found = endings(structure, model, removed, chosen)
    variance = planned_variances(structure, set(chosen), removed, found, alpha)
    restored = _restored(structure, norms, set(chosen), found, variance)
    restored |= {name: _affine(structure, name, reason) for name, reason in uncarried.items()}
    scales = input_scales(structure, chosen, removed - set(restored), found, alpha)
    for name in {name for ending in found for name in ending.absorbing}:
        scales[name] = InputScale(None, "measured, for what it reads is scaled by the end of a branch, too")
    if beta == MEASURED:
        scales = {name: InputScale(None, "measured, as asked for") for name in scales}
    factors = _Factors(alpha=alpha, skip_gain=skip_gain)
    carriers = {name: ending for ending in found for name in ending.modules}
    modules, places = dict(model.named_modules(remove_duplicate=False)), Places(structure.flow, model)
    changes = []
    for name, layers in norms.removed.items():
        if name in carriers:
            changes.append(_scaled(modules[name], name, carriers[name], factors, carried_by=layers))
        else:
            changes.append(restored.get(name) or _norm_out(structure, name, layers))
    changes += [_affine(structure, name, reason) for name, reason in norms.affine.items()]
    changes += [_layer(structure.maps[n], n, scales[n], carriers, factors) for n in chosen]
    for name, ending in carriers.items():
        if name not in scales and name not in norms.removed:
            is_shared = places.calls[name][0].name in places.shared
            within = name.rpartition(".")[0] if is_shared else None
            changes.append(_scaled(modules[name], name, ending, factors, within=within))
    kept = [Kept(name=n, was=class_name(modules[n]), reason=reason, norm=True) for n, reason in norms.kept.items()]
    kept += [Kept(name=n, was=class_name(modules[n]), reason=reason) for n, reason in layers_kept.items()]
    notes = [
        f"branch added in {e.addition.name or 'the model'} keeps its size: {e.problem}" for e in found if e.problem
    ]
    without = unanswered(structure, norms, {change.name for change in changes if change.name not in removed})
    assert not without, f"nothing carries the variance of {without}"
    passed = {name for ending in found if ending.modules for name in ending.passed}
    replaceable = {
        name
        for name in norms.aggregated - passed - set(restored)
        if len(structure.norms[name]) == 1 and is_batch_norm(structure.norms[name][0].module)
    }
    return Plan(changes=changes, kept=kept, notes=notes, replaceable=frozenset(replaceable))


def _restored(
    structure: Structure, norms: Norms, chosen: set[str], found: list[Ending], variance: dict[Node, float]
) -> dict[str, Change]:
    """What stands in the place of a norm where the layers before it do not leave a variance near 1 there.

    Nothing is needed where a standardized layer takes over before anything but homogeneous functions sees it, nor where
    a branch's end before it has been scaled by alpha. Else it is an affine map, or a factor where a norm is by example.
    """
    passed = {name for ending in found if ending.modules for name in ending.passed}
    absorbing = Ways(structure, chosen).absorbing if norms.between - passed else {}
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
            restored[name] = _affine(structure, name, f"what lies between it and {layers} changes the variance")
        else:
            restored[name] = Change(
                name=name,
                was=class_name(calls[0].module),
                now=SCALED,
                reason=f"a measured factor: what lies between it and {layers} changes the variance",
                carried_by=(*norms.removed[name], name),
            )
    return restored


def _norm_out(structure: Structure, name: str, layers: tuple[str, ...]) -> Change:
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


def _affine(structure: Structure, name: str, reason: str) -> Change:
    return Change(
        name=name,
        was=class_name(structure.norms[name][0].module),
        now=UNITS,
        reason=f"an affine map with the example's mean and variance of each channel: {reason}",
        carried_by=(name,),
    )


def _layer(layer: WeightedMap, name: str, scale: InputScale, carriers: dict[str, Ending], factors: _Factors) -> Change:
    ends = name in carriers
    correction = carriers[name].modules[name] if ends else 1.0
    place = _place(carriers[name]) + _correction_reason(correction) if ends else ""
    bare = "; one weight a filter leaves nothing to standardize" if layer.fan_in == 1 else ""
    return Change(
        name=name,
        was=class_name(layer.module),
        now=layer.now(fresh=True),
        reason=scale.reason + place + bare,
        input_scale=None if scale.value is None else scale.value * correction,
        alpha=factors.alpha if ends else None,
        skip_gain=_skip_gain(carriers[name], factors) if ends else None,
        correction=correction if correction != 1 else None,
        weight=layer.layout,
    )


def _scaled(
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
        alpha=factors.alpha,
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
