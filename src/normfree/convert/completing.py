"""From a plan to its record: changes in running order, everything left alone, or why there is nothing to convert."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from normfree.convert.dataflow import Dataflow
from normfree.convert.kinds import class_name, constants_of, is_norm, is_removable
from normfree.convert.norms import NOT_FOLLOWED, norms_without_module
from normfree.convert.record import Change, Conversion, Kept
from normfree.convert.structure import Structure

NOT_RUN = "it did not run on the example input; if it does on another, the layer before it may have changed"


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
    kept = [*kept, *_unseen(model, structure), *norms_without_module(structure.flow)]
    if not changes:
        raise _nothing(model, kept, record.start)
    changes = _in_running_order(changes, structure.flow)
    return replace(record, changes=tuple(changes), kept=tuple(kept), notes=tuple(notes))


def _unseen(model: nn.Module, structure: Structure) -> list[Kept]:
    """Norms that did not run on the example: auxiliary heads in evaluation mode, for instance."""
    return [
        Kept(name=name, was=class_name(module), reason=NOT_RUN, norm=True)
        for name, module in model.named_modules()
        if is_norm(module) and name not in structure.norms
    ]


def _nothing(model: nn.Module, kept: list[Kept], start: str) -> ValueError:
    norms = [one for one in kept if one.norm]
    if not norms:
        remedy = "if its signal is not healthy, the findings of normfree.spp say what to do"
        return ValueError(f"model: {class_name(model)} has nothing to convert: it has no normalizer; {remedy}")
    first = norms[0]
    module = model.get_submodule(first.name)
    remedy = "keep it as it is"
    if first.reason == NOT_FOLLOWED:
        remedy = "convert the part of it that takes a batch of images, such as detector.backbone"
    elif start == "pretrained" and is_norm(module) and is_removable(module) and constants_of(module) is None:
        remedy = 'choose start="fresh"'
    stay = f"all {len(norms)} normalizers stay, such as" if len(norms) > 1 else "its normalizer stays,"
    return ValueError(
        f"model: {class_name(model)} has nothing to convert: {stay} {first.name or 'the model'} ({first.was}): "
        f"{first.reason}; {remedy}"
    )


def _in_running_order(changes: list[Change], flow: Dataflow) -> list[Change]:
    order: dict[str, int] = {}
    for number, call in enumerate(flow.calls):
        order.setdefault(call.name, number)
    return sorted(changes, key=lambda change: order.get(change.name, len(order)))
