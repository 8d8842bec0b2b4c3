"""The plan of a pretrained start: every norm's constants into the layer before it, the function kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normfree.convert.apply import fold_affine, learns
from normfree.convert.carriers import unknown_weight
from normfree.convert.dataflow import Call, Dataflow, activation_in, channels_of, class_name, is_layer, passes_unchanged
from normfree.convert.norms import AffineMap, why_not_followed, why_unknown
from normfree.convert.record import AFFINE, BARE, WITH_ACTIVATION, Change, Kept
from normfree.convert.structure import Structure, unseen_norms
from normfree.nn import ChannelAffine
from normfree.trace import operations as op


def pretrained_plan(
    model: nn.Module, structure: Structure, training: Structure | None, misunderstood: Mapping[str, str]
) -> tuple[list[Change], list[Kept]]:
    """What to change so that the function stays, in evaluation mode and in training with frozen statistics.

    Args:
        model: the model.
        structure: of the model in evaluation mode.
        training: of it in training mode; None where it does not run in it.
        misunderstood: norms that stay, and why.
    """
    changes: list[Change] = []
    kept: list[Kept] = []
    alternatives = _alternatives(model, structure)
    for name, calls in structure.norms.items():
        norm = calls[0].module
        reason = misunderstood.get(name) or why_unknown(structure.flow, calls[0])
        if not reason and name not in structure.constants:
            reason = "it normalizes by its own input in evaluation mode, too: it has no constants to fold"
        if reason:
            kept.append(Kept(name=name, was=class_name(norm), reason=reason, norm=True))
            continue
        layer, reason = _layer_before(structure, name)
        if layer is not None:
            reason = _in_between(training, name, layer) or _read_by_another(structure, alternatives, name, layer)
        if layer is None or reason:
            changes.append(Change(name=name, was=class_name(norm), now=AFFINE, reason=f"stays an affine map: {reason}"))
            continue
        found = structure.maps[layer]
        now, reason = WITH_ACTIVATION if activation_in(norm) else BARE, f"folded into {layer}"
        changes.append(
            Change(
                name=layer,
                was=class_name(found.module),
                now=found.now(fresh=False),
                reason=f"carries {name}",
                input_scale=found.plain_scale,
                weight=found.layout,
            )
        )
        changes.append(Change(name=name, was=class_name(norm), now=now, reason=reason, into=layer))
    modules = {name: calls[0].module for name, calls in structure.layers.items()}
    carriers = {change.into for change in changes}
    kept += [
        Kept(name=name, was=class_name(module), reason="no normalizer folds into it")
        for name, module in modules.items()
        if name not in carriers
    ]
    return changes, kept


def _layer_before(structure: Structure, norm: str) -> tuple[str | None, str]:
    """The layer a norm folds into, or None and why there is none."""
    calls = structure.norms[norm]
    if reason := why_not_followed(calls):
        return None, reason
    producers = [structure.producing_layer(call.input, alone=False) for call in calls]
    layers = {call.name for call in producers if call is not None}
    if not any(structure.has_layer_before(call.input) for call in calls if call.input is not None):
        return None, "it takes the input itself, which no layer comes before"
    if None in producers:
        call = calls[producers.index(None)]
        return None, unknown_weight(
            structure, call
        ) or f"it follows no layer alone, but {_made_by(structure.flow, call)}"
    if any(structure.producing_layer(call.input, alone=True) is None for call in calls):
        return None, f"the output of {', '.join(sorted(layers))} before it is read elsewhere, too"
    if len(layers) > 1:
        return None, f"several layers share it ({', '.join(sorted(layers))})"
    layer = layers.pop()
    if layer in structure.shared:
        return None, f"{structure.shared[layer]} reads a parameter of {layer} before it, too"
    if problem := structure.maps[layer].why_not(fresh=False):
        return None, f"{layer} before it {problem}"
    in_order = all(
        structure.keeps_order(before, call.input)
        for before, call in zip(producers, calls, strict=True)
        if before is not None and call.input is not None
    )
    if not in_order or channels_of(calls[0].module) != structure.maps[layer].outputs:
        return None, f"the channels of {layer} before it are regrouped in between"
    if len(structure.layers[layer]) != len(calls):
        return None, f"{layer} before it is used elsewhere, too"
    if not structure.maps[layer].own_weight().requires_grad and learns(calls[0].module, "weight"):
        return None, f"{layer} before it is frozen, and it is not"
    return layer, ""


def _made_by(flow: Dataflow, call: Call) -> str:
    """The operation that made what a norm takes, but for its layout, and where it ran."""
    node = call.input
    while node is not None and (step := flow.made_by.get(node)) is not None:
        if not passes_unchanged(step):
            return f"{op.plain_name(step.name)} in {step.module or 'the model'}"
        node = step.inputs[0]
    return "something else"


def _in_between(training: Structure | None, norm: str, layer: str) -> str:
    """What stands between a layer and its norm in training alone, such as a dropout; "" for nothing."""
    for call in training.norms.get(norm, ()) if training is not None else ():
        producer = training.producing_layer(call.input, alone=True)  # type: ignore[union-attr]
        if producer is None or producer.name != layer:
            what = _made_by(training.flow, call)  # type: ignore[union-attr]
            return f"in training {what} comes between {layer} and it, or reads what {layer} made"
    return ""


def _alternatives(model: nn.Module, structure: Structure) -> list[tuple[str, str, int]]:
    """Norms that did not run and may read a layer that did: the name, the container they share with it, the channels.

    Such are the norms of other domains. One that has a layer of its own in front of it, in the part of the model that
    did not run (an auxiliary head), reads that.
    """
    modules = dict(model.named_modules())
    ran = {""}
    for call in structure.flow.calls:
        parts = call.name.split(".")
        ran |= {".".join(parts[: end + 1]) for end in range(len(parts))}
    found = []
    for name, norm in unseen_norms(model, structure).items():
        parts = name.split(".")
        depth = next(end for end in range(len(parts), -1, -1) if ".".join(parts[:end]) in ran)
        container, alone = ".".join(parts[:depth]), ".".join(parts[: depth + 1])
        inside = [each for each in modules if f"{each}.".startswith(f"{alone}.")]
        if not any(is_layer(modules[each]) for each in inside[: inside.index(name)]):
            found.append((name, container, channels_of(norm)))
    return found


def _read_by_another(structure: Structure, alternatives: Iterable[tuple[str, str, int]], norm: str, layer: str) -> str:
    """Why a layer must not change for a norm, as another may read it on other inputs; "" if none may."""
    outputs = structure.maps[layer].outputs
    for name, container, channels in alternatives:
        if channels == outputs and (not container or f"{norm}.".startswith(f"{container}.")):
            return f"{name}, which did not run on the example, may read {layer}, too"
    return ""


@torch.no_grad()
def fill_constants(
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
        old, new = original.get_submodule(change.into), converted.get_submodule(change.into)
        fold_affine(old, new, scale, shift)


def _finite(constants: AffineMap, change: Change) -> tuple[Tensor, Tensor]:
    if not all(bool(torch.isfinite(each).all()) for each in (constants.scale, constants.shift)):
        raise ValueError(
            f"model: {change.name} ({change.was}) has statistics or weights that are not finite; "
            "load a sound checkpoint"
        )
    return constants.scale, constants.shift
