"""``convert``: take the normalizers out of someone else's model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normfree.convert.calibrate import keep_pace, measured_scales
from normfree.convert.dataflow import Dataflow, record_all
from normfree.convert.fresh import fresh_plan
from normfree.convert.kinds import class_name, is_norm
from normfree.convert.pretrained import fill, pretrained_plan
from normfree.convert.record import STARTS, Change, Conversion, Kept
from normfree.convert.rewrite import rewritten
from normfree.convert.structure import Structure
from normfree.nn.checks import check_choice, check_integer, check_number
from normfree.signal import operations as op
from normfree.signal.inputs import Batch, check_batch, gaussian_like_input_of, placed_like, tensors_of
from normfree.signal.nonfinite import check_present

BETAS = ("plan", "measured")


def convert(
    model: nn.Module,
    example_input: Batch | None = None,
    *,
    start: str = "fresh",
    alpha: float = 0.2,
    skip_gain: float = 1.0,
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
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    _check(model, start, alpha, skip_gain, beta, seed)
    batch = placed_like(model, gaussian_like_input_of(model) if example_input is None else example_input)
    check_batch(batch)
    flow, heads = record_all(model, batch)
    structure = Structure(flow)
    notes: list[str] = []
    folds: dict[str, str] = {}
    if start == "fresh":
        changes, kept, notes = fresh_plan(structure, model, alpha=alpha, skip_gain=skip_gain, beta=beta)
    else:
        changes, kept, folds = pretrained_plan(structure)
    kept += _unseen(model, structure)
    notes += _functional_norms(flow)
    if not changes:
        raise _nothing(model, kept, notes, start)
    conversion = Conversion(
        model=class_name(model),
        start=start,
        alpha=alpha,
        beta=beta,
        seed=seed,
        input_shapes=tuple(tuple(tensor.shape) for tensor in tensors_of(batch)),
        source=source,
        changes=_in_running_order(changes, flow),
        kept=tuple(kept),
        notes=tuple(notes),
    )
    converted = rewritten(model, conversion)
    if start == "pretrained":
        fill(model, converted, changes, folds)
        return converted
    converted = _measured(converted, conversion, batch, heads=heads)
    keep_pace(converted)
    return converted


def _check(model: nn.Module, start: str, alpha: float, skip_gain: float, beta: str, seed: int) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {type(model).__name__} is no torch.nn.Module; give a model")
    check_choice("start", start, STARTS)
    check_number("alpha", alpha, 0.0)
    check_number("skip_gain", skip_gain)
    check_choice("beta", beta, BETAS)
    check_integer("seed", seed, 0)
    check_present(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model: {name or 'it'} is a scripted {class_name(module)}, whose modules cannot be exchanged; "
                "convert the model before scripting it"
            )


def _measured(converted: nn.Module, conversion: Conversion, batch: Batch, *, heads: bool) -> nn.Module:
    """Set the input scales that are still open, and enter them into the record."""
    waiting = [change.name for change in conversion.changes if _is_layer(change) and change.input_scale is None]
    scales = measured_scales(converted, waiting, batch, heads=heads) if waiting else {}
    changes = tuple(
        replace(change, input_scale=scales[change.name]) if change.name in scales and _is_layer(change) else change
        for change in conversion.changes
    )
    converted.conversion = replace(conversion, changes=changes)  # type: ignore[assignment]
    return converted


def _is_layer(change: Change) -> bool:
    return change.now.startswith("Scaled")


def _unseen(model: nn.Module, structure: Structure) -> list[Kept]:
    """Norms that did not run on the example: auxiliary heads in evaluation mode, for instance."""
    return [
        Kept(name=name, was=class_name(module), reason="it did not run on the example input", norm=True)
        for name, module in model.named_modules()
        if is_norm(module) and name not in structure.norms
    ]


def _functional_norms(flow: Dataflow) -> list[str]:
    known = {call.name for call in flow.calls if is_norm(call.module)}
    names = sorted({step.module for step in flow.steps if step.name in op.NORM and step.module not in known})
    return [f"{name or 'the model'} normalizes in its own forward (no module); it still does" for name in names]


def _nothing(model: nn.Module, kept: list[Kept], notes: list[str], start: str) -> ValueError:
    norms = [one for one in kept if one.norm]
    if not norms:
        why = "; ".join(notes) or "it has no normalizer"
        return ValueError(f"model: {class_name(model)} has nothing to convert: {why}; use it as it is")
    first = norms[0]
    remedy = 'choose start="fresh"' if start == "pretrained" else "keep it as it is"
    return ValueError(
        f"model: {class_name(model)} has nothing to convert: all {len(norms)} normalizers stay, "
        f"such as {first.name} ({first.was}): {first.reason}; {remedy}"
    )


def _in_running_order(changes: list[Change], flow: Dataflow) -> tuple[Change, ...]:
    order: dict[str, int] = {}
    for number, call in enumerate(flow.calls):
        order.setdefault(call.name, number)
    return tuple(sorted(changes, key=lambda change: order.get(change.name, len(order))))


def conversion_of(model: Any) -> Conversion | None:
    """The record of a converted model; None for any other."""
    found = getattr(model, "conversion", None)
    return found if isinstance(found, Conversion) else None
