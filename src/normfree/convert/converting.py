"""``convert``: take the normalizers out of someone else's model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normfree.convert.calibrate import keep_pace, measured_scales
from normfree.convert.checking import misunderstood, running
from normfree.convert.completing import completed
from normfree.convert.dataflow import record_all
from normfree.convert.fresh import MEASURED, fresh_plan
from normfree.convert.kinds import class_name
from normfree.convert.leaks import noted_leak
from normfree.convert.pretrained import fill, pretrained_plan
from normfree.convert.record import STARTS, Conversion
from normfree.convert.rewrite import AFFINE, exchanged, is_layer_change
from normfree.convert.structure import Structure
from normfree.nn.checks import check_choice, check_integer, check_number, invalid
from normfree.signal.inputs import Batch, check_batch, gaussian_like_input_of, placed_like, tensors_of
from normfree.signal.measure import unwrapped
from normfree.signal.nonfinite import check_finite, check_present

ALPHA, SKIP_GAIN = 0.2, 1.0
"""Of residual branches, where nothing else is asked for."""

BETAS = ("plan", MEASURED)

MOST_SEED = 2**64 - 1
"""Torch's generators take no larger one."""


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
        record = completed(record, model, structure, changes, kept, notes)
        converted = _fresh(model, record, batch, heads=heads)
    else:
        converted = _pretrained(model, record, structure, batch, heads=heads)
    record = conversion_of(converted)
    assert record is not None, "conversion leaves its record"
    converted.conversion = noted_leak(converted, record, batch)  # type: ignore[assignment]
    return converted


def _fresh(model: nn.Module, record: Conversion, batch: Batch, *, heads: bool) -> nn.Module:
    """The converted model, what is still open measured."""
    converted, replaced = exchanged(model, record)
    with running(record, model, converted, replaced):
        _measure(converted, record, batch, heads=heads)
    keep_pace(converted.get_submodule(change.name) for change in record.changes if is_layer_change(change))
    return converted


def _pretrained(model: nn.Module, record: Conversion, structure: Structure, batch: Batch, *, heads: bool) -> nn.Module:
    """The converted model, in which each norm stays that turns out to do more than its constants say."""
    staying: dict[str, str] = {}
    while True:
        changes, kept = pretrained_plan(structure, staying)
        full = completed(record, model, structure, changes, kept, [])
        converted, replaced = exchanged(model, full)
        fill(model, converted, changes, structure.constants)
        culprit = misunderstood(model, converted, replaced, full, batch, heads=heads)
        if culprit is None:
            return converted
        staying[culprit] = "what it, or something before it, does is more than its constants say"


def _check(model: nn.Module, start: str, alpha: float, skip_gain: float, beta: str, seed: int) -> None:
    check_choice("start", start, STARTS)
    check_number("alpha", alpha, 0.0)
    check_number("skip_gain", skip_gain)
    check_choice("beta", beta, BETAS)
    if check_integer("seed", seed, 0) > MOST_SEED:
        raise invalid("seed", seed, "must be an integer of 64 bits", "pass a smaller one")
    check_present(model)
    check_finite(model)
    if "conversion" in model._modules and conversion_of(model) is None:
        raise ValueError('model: its submodule "conversion" has the name of the record; give it another')
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model: {name or 'it'} is a scripted {class_name(module)}, whose modules cannot be exchanged; "
                "convert the model first, and script what normfree.fold makes of it"
            )


def _measure(converted: nn.Module, conversion: Conversion, batch: Batch, *, heads: bool) -> None:
    """Set what is still open, and enter the input scales into the record."""
    waiting = {
        change.name: change.correction or 1.0
        for change in conversion.changes
        if is_layer_change(change) and change.input_scale is None
    }
    affines = [change.name for change in conversion.changes if change.now == AFFINE]
    scales = measured_scales(converted, waiting, affines, batch, heads=heads)
    unseen = next((name for name in waiting if name not in scales), None)
    if unseen is not None:
        raise ValueError(
            f"example_input: {unseen} does not run on it in the converted model, so its scale cannot be measured; give "
            "more examples, if what runs depends on them"
        )
    changes = tuple(
        replace(change, input_scale=scales[change.name])
        if change.name in scales and is_layer_change(change)
        else change
        for change in conversion.changes
    )
    converted.conversion = replace(conversion, changes=changes)  # type: ignore[assignment]


def conversion_of(model: Any) -> Conversion | None:
    """The record of a converted model; None for any other."""
    found = getattr(model, "conversion", None)
    return found if isinstance(found, Conversion) else None
