"""From a plan to its record: changes in running order, everything left alone, or why there is nothing to convert."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from normfree.convert.dataflow import Dataflow
from normfree.convert.kinds import class_name, is_norm, is_removable
from normfree.convert.normalization import LOOKED_FOR, norms_without_module
from normfree.convert.norms import NOT_FOLLOWED
from normfree.convert.record import Change, Conversion, Kept
from normfree.convert.structure import Structure

NOT_RUN = {
    "fresh": "it did not run on the example input; if it does on another, the layer before it may have changed",
    "pretrained": "it did not run on the example input; on another it does what it did",
}


def completed(
    record: Conversion,
    model: nn.Module,
    structure: Structure,
    changes: list[Change],
    kept: list[Kept],
    notes: list[str],
) -> Conversion:
    """The record with a plan's changes in the order the modules ran, and everything that was left alone.

    Raises:
        ValueError: nothing was changed; why, and what to do.
    """
    kept = [
        *kept,
        *_unseen(model, structure, record.start),
        *norms_without_module(structure.normalizations, structure.norms),
    ]
    if not changes:
        raise _nothing(model, structure, kept, record.start)
    changes = _in_running_order(changes, structure.flow)
    return replace(record, changes=tuple(changes), kept=tuple(kept), notes=tuple(notes))


def _unseen(model: nn.Module, structure: Structure, start: str) -> list[Kept]:
    """Norms that did not run on the example: auxiliary heads in evaluation mode, for instance."""
    return [
        Kept(name=name, was=class_name(module), reason=NOT_RUN[start], norm=True)
        for name, module in unseen_norms(model, structure).items()
    ]


def unseen_norms(model: nn.Module, structure: Structure) -> dict[str, nn.Module]:
    """The norms of a model that did not run: of torch's classes, or of a class that is one elsewhere in the model."""
    classes = {type(calls[0].module) for calls in structure.norms.values()}
    ran = structure.norms.keys() | {call.name for call in structure.flow.calls}
    return {
        name: module
        for name, module in model.named_modules()
        if name not in ran and (is_norm(module) or type(module) in classes)
    }


def _nothing(model: nn.Module, structure: Structure, kept: list[Kept], start: str) -> ValueError:
    norms = [one for one in kept if one.norm]
    if not norms:
        remedy = "if its signal is not healthy, the findings of normfree.spp say what to do"
        return ValueError(
            f"model: {class_name(model)} has nothing to convert: it has no normalizer that is recognised (looked for: "
            f"{LOOKED_FOR}); {remedy}"
        )
    first = norms[0]
    remedy = "keep it as it is"
    if first.reason == NOT_FOLLOWED:
        remedy = "convert the part of it that takes a batch of images, such as detector.backbone"
    elif start == "pretrained" and first.name in structure.norms and first.name not in structure.constants:
        remedy = 'choose start="fresh"' if is_removable(model.get_submodule(first.name)) else remedy
    stay = f"all {len(norms)} normalizers stay, such as" if len(norms) > 1 else "its normalizer stays,"
    error = ValueError(
        f"model: {class_name(model)} has nothing to convert: {stay} {first.name or 'the model'} ({first.was}): "
        f"{first.reason}; {remedy}"
    )
    for one in norms if len(norms) > 1 else ():  # a traceback shows them all; the message stays one line
        error.add_note(f"{one.name or 'the model'} ({one.was}): {one.reason}")
    return error


def _in_running_order(changes: list[Change], flow: Dataflow) -> list[Change]:
    order: dict[str, int] = {}
    for number, call in enumerate(flow.calls):
        order.setdefault(call.name, number)
        order.setdefault(call.place, number)
    return sorted(changes, key=lambda change: order.get(change.name, len(order)))
