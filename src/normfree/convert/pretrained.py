"""The plan of a pretrained start: every norm's constants into the layer before it, the function kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from normfree.convert.constants import AffineMap
from normfree.convert.frozen import learns
from normfree.convert.kinds import (
    KEPT_TWINS,
    activation_in,
    base_of,
    channels_of,
    class_name,
    fan_in,
    outputs_of,
    why_no_twin,
)
from normfree.convert.norms import NOT_FOLLOWED, why_unknown
from normfree.convert.record import Change, Kept
from normfree.convert.rewrite import AFFINE, BARE, WITH_ACTIVATION
from normfree.convert.structure import Structure
from normfree.nn import ChannelAffine, KeptMean, ScaledConv2d


def pretrained_plan(structure: Structure, misunderstood: Mapping[str, str]) -> tuple[list[Change], list[Kept]]:
    """What to change so that the function in evaluation mode stays, and what is kept.

    Args:
        structure: of the model.
        misunderstood: norms that stay, and why.
    """
    changes: list[Change] = []
    kept: list[Kept] = []
    for name, calls in structure.norms.items():
        norm = calls[0].module
        reason = misunderstood.get(name) or why_unknown(structure.flow, calls[0])
        if not reason and name not in structure.constants:
            reason = "it normalizes by its own input in evaluation mode, too: it has no constants to fold"
        if reason:
            kept.append(Kept(name=name, was=class_name(norm), reason=reason, norm=True))
            continue
        layer, reason = _layer_before(structure, name)
        if layer is None:
            changes.append(Change(name=name, was=class_name(norm), now=AFFINE, reason=f"stays an affine map: {reason}"))
            continue
        module = structure.layers[layer][0].module
        now, reason = WITH_ACTIVATION if activation_in(norm) else BARE, f"folded into {layer}"
        was, twin, scale = class_name(module), _twin(module), _plain_scale(module)
        changes.append(Change(name=layer, was=was, now=twin, reason=f"carries {name}", input_scale=scale))
        changes.append(Change(name=name, was=class_name(norm), now=now, reason=reason, into=layer))
    modules = {name: calls[0].module for name, calls in structure.layers.items()}
    carriers = {change.into for change in changes}
    kept += [
        Kept(name=name, was=class_name(module), reason="no normalizer folds into it")
        for name, module in modules.items()
        if name not in carriers
    ]
    return changes, kept


def _plain_scale(module: nn.Module) -> float | None:
    """The input scale at which a twin has no constant, so that its gain trains at the pace of a plain weight, too.

    That of a transposed convolution's twin restores what its stride leaves out, which a trained weight has done.
    """
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    return prod(module.stride) ** -0.5 if transposed else None


def _twin(module: nn.Module) -> str:
    base = base_of(module, fresh=False)
    assert base is not None
    return ScaledConv2d.__name__ if fan_in(module) == 1 else KEPT_TWINS[base].__name__


def _layer_before(structure: Structure, norm: str) -> tuple[str | None, str]:
    """The layer a norm folds into, or None and why there is none."""
    calls = structure.norms[norm]
    if any(call.input is None for call in calls):
        return None, NOT_FOLLOWED
    behind = [structure.directly_behind(call.input, alone=False) for call in calls]
    layers = {call.name for call in behind if call is not None}
    if not any(structure.has_layer_behind(call.input) for call in calls if call.input is not None):
        return None, "it takes the input itself, which no layer comes before"
    if None in behind:
        return None, "it follows no layer alone, but a sum, a concatenation, a pool or an activation"
    if any(structure.directly_behind(call.input, alone=True) is None for call in calls):
        return None, f"the output of {', '.join(sorted(layers))} before it is read elsewhere, too"
    if len(layers) > 1:
        return None, f"several layers share it ({', '.join(sorted(layers))})"
    layer = layers.pop()
    if layer in structure.shared:
        return None, f"{structure.shared[layer]} reads a parameter of {layer} before it, too"
    regrouped = any(call.input is not None and call.input.note.axis != 1 for call in calls)
    if regrouped or channels_of(calls[0].module) != outputs_of(structure.layers[layer][0].module):
        return None, f"the channels of {layer} before it are regrouped in between"
    module = structure.layers[layer][0].module
    if len(structure.layers[layer]) != len(calls):
        return None, f"{layer} before it is used elsewhere, too"
    if base_of(module, fresh=False) is None:
        return None, f"{layer} before it {why_no_twin(module)}"
    if not module.get_parameter("weight").requires_grad and learns(calls[0].module, "weight"):
        return None, f"{layer} before it is frozen, and it is not"
    if fan_in(module) == 1 and not isinstance(module, nn.Conv2d):
        return None, f"{layer} before it has one weight a filter"
    return layer, ""


@torch.no_grad()
def fill(
    original: nn.Module, converted: nn.Module, changes: Iterable[Change], constants: Mapping[str, AffineMap]
) -> None:
    """Give the converted modules the numbers that keep the function.

    Args:
        original: the model.
        converted: its copy, modules exchanged.
        changes: the plan.
        constants: what each norm computes in evaluation mode, by name.

    Raises:
        ValueError: a norm's constants are not finite.
    """
    for change in changes:
        if change.now != AFFINE and change.into is None:
            continue
        scale, shift = _finite(constants[change.name], change)
        if change.into is None:
            affine: Any = converted.get_submodule(change.name)
            affine = affine if isinstance(affine, ChannelAffine) else affine[0]
            affine.weight.copy_(scale)
            affine.bias.copy_(shift)
            continue
        old: Any = original.get_submodule(change.into)
        new: Any = converted.get_submodule(change.into)
        scale, shift = scale.to(old.weight.device), shift.to(old.weight.device)
        bias = shift if old.bias is None else shift + scale * old.bias.double()
        if isinstance(new, KeptMean):
            new.become(old.weight, bias, scale)
        else:
            new.weight.copy_(old.weight.double() * scale.view(-1, 1, 1, 1))
            new.bias.copy_(bias)


def _finite(constants: AffineMap, change: Change) -> tuple[Tensor, Tensor]:
    if not all(bool(torch.isfinite(each).all()) for each in (constants.scale, constants.shift)):
        raise ValueError(
            f"model: {change.name} ({change.was}) has statistics or weights that are not finite; "
            "load a sound checkpoint"
        )
    return constants.scale, constants.shift
