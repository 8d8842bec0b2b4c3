"""The plan of a fresh start: norms out, standardized layers in, every branch scaled, every input of unit variance."""

from __future__ import annotations

from torch import nn

from normfree.convert.branches import Ending, endings
from normfree.convert.input_scales import InputScale, input_scales
from normfree.convert.kinds import activation_in, class_name
from normfree.convert.maps import WeightedMap
from normfree.convert.norms import needs_copy, sorted_norms
from normfree.convert.record import Change, Kept
from normfree.convert.rewrite import AFFINE, BARE, COPY, SCALED, WITH_ACTIVATION
from normfree.convert.structure import Structure, layers_to_standardize

MEASURED = "measured"


def fresh_plan(
    structure: Structure, model: nn.Module, *, alpha: float, skip_gain: float, beta: str
) -> tuple[list[Change], list[Kept], list[str]]:
    """What to change for a variance-preserving start.

    Args:
        structure: of the model.
        model: the original.
        alpha: factor of the residual branches.
        skip_gain: initial value of their learnable factor.
        beta: "plan" (closed forms where there are any) or "measured".

    Returns:
        The changes (input scales to be measured are None), what is kept, and notes.
    """
    norms = sorted_norms(structure)
    removed = set(norms.removed)
    chosen, layers_kept = layers_to_standardize(structure, removed)
    found = endings(structure, model, removed, chosen)
    scales = input_scales(structure, chosen, removed, found, alpha)
    if beta == MEASURED:
        scales = {name: InputScale(None, "measured, as asked for") for name in scales}
    carriers = {name: ending for ending in found for name in ending.modules}
    changes = [_norm_out(structure, name) for name in norms.removed]
    changes += [_units(structure, name) for name in norms.of_the_input]
    for name in chosen:
        changes.append(_layer(structure.maps[name], name, scales[name], carriers, alpha, skip_gain))
    modules = dict(model.named_modules())
    for name, ending in carriers.items():
        if name not in scales:
            changes.append(_scaled(modules[name], name, ending, alpha, skip_gain))
    kept = [Kept(name=n, was=class_name(modules[n]), reason=reason, norm=True) for n, reason in norms.kept.items()]
    kept += [Kept(name=n, was=class_name(modules[n]), reason=reason) for n, reason in layers_kept.items()]
    notes = [
        f"branch added in {e.addition.name or 'the model'} keeps its size: {e.problem}" for e in found if e.problem
    ]
    return changes, kept, notes


def _norm_out(structure: Structure, name: str) -> Change:
    norm = structure.norms[name][0].module
    fused = activation_in(norm)
    copied = any(needs_copy(structure, call) for call in structure.norms[name])
    stays = f"; its {', '.join(class_name(part) for _, part in fused)} stays" if fused else ""
    return Change(
        name=name,
        was=class_name(norm),
        now=COPY if copied else WITH_ACTIVATION if fused else BARE,
        reason="removed" + stays + ("; what follows writes in place, so it gets a copy" if copied else ""),
    )


def _units(structure: Structure, name: str) -> Change:
    reason = "it gives the input its units: an affine map with the example's mean and variance of each channel"
    return Change(name=name, was=class_name(structure.norms[name][0].module), now=AFFINE, reason=reason)


def _layer(
    layer: WeightedMap, name: str, scale: InputScale, carriers: dict[str, Ending], alpha: float, skip_gain: float
) -> Change:
    ends = name in carriers
    correction = carriers[name].modules[name] if ends else 1.0
    place = _place(carriers[name]) + _restored(correction) if ends else ""
    bare = "; one weight a filter leaves nothing to standardize" if layer.fan_in == 1 else ""
    return Change(
        name=name,
        was=class_name(layer.module),
        now=layer.now(fresh=True),
        reason=scale.reason + place + bare,
        input_scale=None if scale.value is None else scale.value * correction,
        alpha=alpha if ends else None,
        skip_gain=skip_gain if ends and not carriers[name].learned else None,
        correction=correction if correction != 1 else None,
        weight=layer.layout,
    )


def _scaled(module: nn.Module, name: str, ending: Ending, alpha: float, skip_gain: float) -> Change:
    correction = ending.modules[name]
    what = "the gate" if correction != 1 else "the activation"
    return Change(
        name=name,
        was=class_name(module),
        now=SCALED,
        reason=f"{what}{_place(ending)}{_restored(correction)}",
        alpha=alpha,
        skip_gain=None if ending.learned else skip_gain,
        correction=correction if correction != 1 else None,
    )


def _restored(correction: float) -> str:
    """What a factor restores, for a reason; "" for none."""
    if correction == 1:
        return ""
    return f"; {correction:g} for what {'a sigmoid halves' if correction == 2 else 'sigmoids take'}"


def _place(ending: Ending) -> str:
    """Which branch a module ends, for its reason."""
    own = f", whose {ending.learned} stands for the skip gain" if ending.learned else ""
    return f"; ends the branch added in {ending.addition.name or 'the model'}{own}"
