"""``convert``: take the normalizers out of someone else's model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normfree.convert.calibrate import keep_pace, measured_scales
from normfree.convert.checking import leaks, misunderstood, running
from normfree.convert.dataflow import Dataflow, record_all
from normfree.convert.fresh import MEASURED, fresh_plan
from normfree.convert.kinds import class_name, constants_of, is_batch_norm, is_norm, is_removable
from normfree.convert.norms import NOT_FOLLOWED, leaking, norms_without_module
from normfree.convert.pretrained import fill, pretrained_plan
from normfree.convert.record import STARTS, Change, Conversion, Kept
from normfree.convert.rewrite import AFFINE, LAYERS, exchanged
from normfree.convert.structure import Structure
from normfree.nn.checks import check_choice, check_integer, check_number
from normfree.signal.inputs import Batch, check_batch, gaussian_like_input_of, placed_like, tensors_of
from normfree.signal.measure import unwrapped
from normfree.signal.nonfinite import check_present

NOT_RUN = "it did not run on the example input; if it does on another, the layer before it may have changed"

ALPHA, SKIP_GAIN = 0.2, 1.0
"""Of residual branches, where nothing else is asked for."""

BETAS = ("plan", MEASURED)


def convert(
    model: nn.Module,
    example_input: Batch | None = None,
    *,
    start: str = "fresh",
    alpha: float = ALPHA,
    skip_gain: float = SKIP_GAIN,
    beta: str = "plan",
    seed: int = 0,
    source: str | None = None,
) -> nn.Module:
    """Return a copy of a model without its normalizers, guided by its recorded dataflow.

    *fresh*: norms of convolutional networks are removed; the layers they followed become scaled-weight-standardized
    twins with new weights, their input scaled by γ / β; a residual branch f becomes ``alpha * s * f``, folded into
    its last layer. *pretrained*: each norm's constants are folded into the layer before it as gain, bias and a
    kept per-filter mean, so that the function in evaluation mode stays to rounding; where no layer can take them an
    affine map per channel stays. Both train at any batch size, and examples no longer see each other.

    Args:
        model: any module whose forward runs on the example; it is left as it is.
        example_input: a tensor, a tuple of positional or a mapping of keyword arguments; Gaussian noise of the shape
            the model suggests by default. The *fresh* start also measures with it, so give several examples.
        start: "fresh" or "pretrained".
        alpha: factor of the residual branches (*fresh*).
        skip_gain: initial value of their learnable factor s (*fresh*). 0 starts the network as its shortcuts, as the
            paper's own models do; a shallow network then learns slowly until its few gains have left zero.
        beta: "plan" takes γ and β from closed forms where there are any and measures elsewhere; "measured" measures
            every layer on the example (*fresh*).
        seed: of the new weights.
        source: how the command line builds the original, noted in the record for :func:`normfree.load`.

    Returns:
        The converted model, in the original's mode; its ``conversion`` is the record of every change.

    Raises:
        ValueError: nothing to convert, a norm inside a scripted module, a forward that fails on the example, or an
            argument that breaks its rule; the message names the remedy.

    Source: Brock, De, Smith, ICLR 2021, sections 3 and 4; the rules for foreign structures are this project's.
    """
    model = unwrapped(model)
    _check(model, start, alpha, skip_gain, beta, seed)
    if example_input is None:
        example_input = gaussian_like_input_of(model, generator=torch.Generator().manual_seed(seed))
    if isinstance(example_input, list):
        remedy = "give a tensor, a tuple of positional or a dict of keyword arguments"
        raise ValueError(f"example_input: a list is no batch; {remedy}")
    batch = placed_like(model, example_input)
    check_batch(batch, "example_input")
    flow, heads = record_all(model, batch)
    structure = Structure(flow)
    record = Conversion(
        model=class_name(model),
        start=start,
        alpha=alpha,
        beta=beta,
        seed=seed,
        input_shapes=tuple(tuple(tensor.shape) for tensor in tensors_of(batch)),
        source=source,
    )
    if start == "fresh":
        changes, kept, notes = fresh_plan(structure, model, alpha=alpha, skip_gain=skip_gain, beta=beta)
        record = _completed(record, model, structure, changes, kept, notes)
        converted = _fresh(model, record, batch, heads=heads)
    else:
        converted = _pretrained(model, record, structure, batch, heads=heads)
    if leaks(converted, batch):
        record = conversion_of(converted)
        assert record is not None
        if not any(is_batch_norm(converted.get_submodule(one.name)) for one in record.norms_left):
            kept = (*record.kept, leaking(flow))
            converted.conversion = replace(record, kept=kept)  # type: ignore[assignment]
    return converted


def _fresh(model: nn.Module, record: Conversion, batch: Batch, *, heads: bool) -> nn.Module:
    """The converted model, what is still open measured."""
    converted, replaced = exchanged(model, record)
    with running(record, replaced):
        _measure(converted, record, batch, heads=heads)
    keep_pace(converted.get_submodule(change.name) for change in record.changes if change.now in LAYERS)
    return converted


def _pretrained(model: nn.Module, record: Conversion, structure: Structure, batch: Batch, *, heads: bool) -> nn.Module:
    """The converted model, in which each norm stays that turns out to do more than its constants say."""
    staying: dict[str, str] = {}
    while True:
        changes, kept = pretrained_plan(structure, staying)
        full = _completed(record, model, structure, changes, kept, [])
        converted, replaced = exchanged(model, full)
        fill(model, converted, changes)
        with running(full, replaced):
            culprit = misunderstood(model, converted, full, batch, heads=heads)
        if culprit is None:
            return converted
        staying[culprit] = "what it, or something before it, does is more than its constants say"


def _completed(
    record: Conversion,
    model: nn.Module,
    structure: Structure,
    changes: list[Change],
    kept: list[Kept],
    notes: list[str],
) -> Conversion:
    """The record with its changes and what was kept; an error if nothing was changed."""
    kept = [*kept, *_unseen(model, structure), *norms_without_module(structure.flow)]
    if not changes:
        raise _nothing(model, kept, record.start)
    changes = _in_running_order(changes, structure.flow)
    return replace(record, changes=tuple(changes), kept=tuple(kept), notes=tuple(notes))


def _check(model: nn.Module, start: str, alpha: float, skip_gain: float, beta: str, seed: int) -> None:
    check_choice("start", start, STARTS)
    check_number("alpha", alpha, 0.0)
    check_number("skip_gain", skip_gain)
    check_choice("beta", beta, BETAS)
    check_integer("seed", seed, 0)
    check_present(model)
    if "conversion" in model._modules and conversion_of(model) is None:
        raise ValueError('model: its submodule "conversion" has the name of the record; give it another')
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model: {name or 'it'} is a scripted {class_name(module)}, whose modules cannot be exchanged; "
                "convert the model before scripting it"
            )


def _measure(converted: nn.Module, conversion: Conversion, batch: Batch, *, heads: bool) -> None:
    """Set what is still open, and enter the input scales into the record."""
    waiting = [change.name for change in conversion.changes if change.now in LAYERS and change.input_scale is None]
    affines = [change.name for change in conversion.changes if change.now == AFFINE]
    scales = measured_scales(converted, waiting, affines, batch, heads=heads)
    unseen = next((name for name in waiting if name not in scales), None)
    if unseen is not None:
        raise ValueError(
            f"example_input: {unseen} does not run on it in the converted model, so its scale cannot be measured; give "
            "more examples, if what runs depends on them"
        )
    changes = tuple(
        replace(change, input_scale=scales[change.name]) if change.name in scales and change.now in LAYERS else change
        for change in conversion.changes
    )
    converted.conversion = replace(conversion, changes=changes)  # type: ignore[assignment]


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


def conversion_of(model: Any) -> Conversion | None:
    """The record of a converted model; None for any other."""
    found = getattr(model, "conversion", None)
    return found if isinstance(found, Conversion) else None
