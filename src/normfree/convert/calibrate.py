"""Measure what has no closed form on the example, in one pass, and size the raw weights by the scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normfree.convert.dataflow import resting
from normfree.convert.record import Change, Conversion
from normfree.convert.rewrite import SCALED, UNITS, is_layer_change
from normfree.convert.weights import MapOutput
from normfree.nn import Standardization, standardization_of
from normfree.nn.scaled_ws import BranchEnd, StandardizedFilters
from normfree.nn.small_layers import ChannelUnits
from normfree.nn.standardized_module import raw_name
from normfree.trace.inputs import Batch, call, copy_of

EPS = 1e-5
"""Added to the variance of a channel of the input, as BatchNorm does."""

LEAST_VALUES = 16
"""Values of a channel whose variance says something of the signal (its relative error is sqrt(2 / 16) = 0.35)."""

MOST_OFF = 100.0
"""The variance that a norm gave may be off by so much where standardized layers before it carry it instead."""

LEAST_SEEN = 1e-10
"""Share of its input's mean square that a layer must pass on: filters of mean zero turn an input that does not vary
into rounding, of about 1e-14 in float32."""


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]

FEW_VALUES = "Expected more than 1 value per channel"
"""How torch's own message begins where a norm in training mode gets one value of each channel."""


@dataclass(frozen=True)
class Measured:
    """What one pass over the example gave.

    Attributes:
        scales: the input scale of each layer that had none.
        factors: the factor of each norm's place that had none.
        units: the mean and the standard deviation of each channel in the place of each affine map.
        lost: the mean square at each norm's place where the layers before it do not carry the variance.
        shares: of the variance within channels and that of their means, at each norm's place, the share of the first.
    """

    scales: dict[str, float] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    units: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)


def measure(model: nn.Module, conversion: Conversion, batch: Batch, *, heads: bool) -> Measured:
    """Set what a record leaves open on a converted model, and check at each norm's place what carries its variance.

    A layer's input scale is the one under which its output has a mean square of 1, times a correction of its own. The
    filters sum to zero, so the mean square is the variance plus what differing channel means bring; of features pooled
    to one position it is the quantity that does not depend on how alike the examples are. An affine map gives each
    channel mean 0 and variance 1, a factor in a norm's place the whole a variance of 1. They are set one after another
    as the signal reaches them, in the mode in which the network will be trained: norms that stay on the statistics of
    the batch, branches awake (skip gains of one), dropout off. What runs several times is set by its first input.

    Args:
        model: the converted model; it keeps what is found.
        conversion: its record.
        batch: what to measure with.
        heads: run what runs in training alone, too.

    Raises:
        ValueError: a layer's filters see a constant, so that no scale gives its output a variance; or a norm that stays
            has one value of each channel.
    """
    modules, found = dict(model.named_modules()), Measured()
    ran, scaled = set[str](), {change.name for change in conversion.changes if change.alpha is not None}
    handles = []
    for change in conversion.changes:
        handles += [
            modules[name].register_forward_pre_hook(hook, with_kwargs=True)
            for name, hook in _hooks(change, conversion, scaled, found, ran)
        ]
    gains = [m.skip_gain for m in model.modules() if isinstance(m, BranchEnd) and m.skip_gain is not None]
    kept = [gain.detach().clone() for gain in gains]
    try:
        with torch.no_grad(), resting(model, heads=heads, statistics="batch"):
            for gain in gains:
                gain.fill_(1)
            call(model, copy_of(batch))
    except ValueError as error:
        if not str(error).startswith(FEW_VALUES):
            raise
        raise ValueError(
            "example_input: a norm that stays takes its statistics over the batch, as it will in training, and has one "
            "value of each channel there; give several examples"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for gain, value in zip(gains, kept, strict=True):
                gain.copy_(value)
    for name, scale in found.scales.items():
        _rule_of(modules[name]).input_scale = scale
    for name, factor in found.factors.items():
        modules[name][0].correction = factor  # type: ignore[index]
    for name, (mean, deviation) in found.units.items():  # buffers, which the pass leaves as they were
        _set_units(modules[name], mean, deviation)
    return found


def _hooks(
    change: Change, conversion: Conversion, scaled: set[str], found: Measured, ran: set[str]
) -> Iterator[tuple[str, Hook]]:
    """What to do before the first run of an exchanged module, and its name; ``scaled`` are the ends of branches."""
    name = change.name
    if is_layer_change(change):
        yield name, lambda module, inputs, named: ran.add(name)
        if change.input_scale is None:
            yield name, _at_first(_setter(name, change.correction or 1.0, found.scales))
    elif change.now == UNITS:
        yield name, _at_first(_units_setter(name, found.units))
    elif change.now == SCALED and change.carried_by and change.alpha is None:
        yield name, _at_first(_factor_setter(name, found.factors))
    elif change.carried_by:
        size = conversion.alpha if not scaled.isdisjoint(change.carried_by) else 1.0
        yield name, _at_first(_checker(change, size, found, ran))


def _at_first(hook: Hook) -> Hook:
    """The hook at a module's first run alone."""
    ran: list[nn.Module] = []

    def once(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not ran:
            ran.append(module)
            hook(module, inputs, named)

    return once


def _factor_setter(name: str, found: dict[str, float]) -> Hook:
    def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        variance = float(_tensor_in(inputs, named).double().var(correction=0))
        module[0].correction = found[name] = (variance + EPS) ** -0.5

    return hook


def _checker(change: Change, size: float, found: Measured, ran: set[str]) -> Hook:
    """Note a mean square at a norm's place that is far from ``size`` squared, and what channels of [N, C, …] share."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = _tensor_in(inputs, named).double()
        mean_square = float(given.square().mean())
        if not ran.isdisjoint(change.carried_by) and not size**2 / MOST_OFF <= mean_square <= MOST_OFF:
            found.lost[change.name] = mean_square
        channels = given.transpose(0, 1).flatten(1) if given.dim() > 1 else given[None]
        if channels.shape[1] >= LEAST_VALUES:
            variance, mean = torch.var_mean(channels, 1, correction=0)
            within = float(variance.mean())
            found.shares[change.name] = within / max(within + float(mean.var(correction=0)), torch.finfo().tiny)

    return hook


def _units_setter(name: str, found: dict[str, tuple[Tensor, Tensor]]) -> Hook:
    """Have a :class:`ChannelUnits` give each channel of its input [N, C, …] mean 0 and variance 1."""

    def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = _tensor_in(inputs, named)
        channels = given.transpose(0, 1).flatten(1).double()
        if channels.shape[1] < 2:
            raise ValueError(
                f"example_input: one value of each channel at {name} has no variance, which the affine map in the "
                "place of the norm needs; give several examples"
            )
        variance, mean = torch.var_mean(channels, 1, correction=0)
        found[name] = mean, (variance + EPS).sqrt()
        _set_units(module, *found[name])

    return hook


def _set_units(place: Any, mean: Tensor, deviation: Tensor) -> None:
    """Enter the constants of a :class:`ChannelUnits`, which an activation may follow in its place."""
    constants: Any = (place if isinstance(place, ChannelUnits) else place[0])[0]
    constants.mean.copy_(mean)
    constants.deviation.copy_(deviation)


def _tensor_in(inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    return next(leaf for leaf in (*inputs, *named.values()) if isinstance(leaf, Tensor))


def _setter(name: str, factor: float, found: dict[str, float]) -> Hook:
    def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = _tensor_in(inputs, named)
        mean_square = float(_plain_output(module, inputs, named).double().square().mean())
        if not mean_square > LEAST_SEEN * float(given.double().square().mean()):
            raise ValueError(
                f"example_input: all that a filter of {name} sees at once is the same (a constant, or grey images seen "
                "pixel by pixel), and filters that sum to zero make nothing of it, so its scale cannot be measured; "
                "give a batch of several different examples, in colour"
            )
        found[name] = _rule_of(module).input_scale = factor * mean_square**-0.5

    return hook


def _rule_of(module: nn.Module) -> Any:
    """What has the factors of a layer: itself, or its child where its weight is standardized in place."""
    return standardization_of(module) or module


def _plain_output(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """What the layer's map makes with an input scale of 1, no bias and no branch factor."""
    rule = _rule_of(module)
    before: Mapping[str, Any] = {"input_scale": rule.input_scale, "alpha": rule.alpha}
    gain, rule._parameters["skip_gain"] = rule._parameters["skip_gain"], None
    rule.input_scale = rule.alpha = 1.0
    try:
        if rule is module:
            bias, module._parameters["bias"] = module._parameters["bias"], None
            try:
                return module.forward(*inputs, **named)
            finally:
                module._parameters["bias"] = bias
        with MapOutput(rule) as found:
            module.forward(*copy_of(inputs), **copy_of(named))
        return found.output
    finally:
        vars(rule).update(before)
        rule._parameters["skip_gain"] = gain


@torch.no_grad()
def keep_pace(layers: Iterable[nn.Module]) -> None:
    """Scale up the raw weights of standardized layers so that they train at the pace of plain ones.

    Standardization undoes the size of the raw weights, but their gradient is inverse to it. With a raw weight of the
    size of the effective one, a step of gradient descent moves the effective weight as far as it would move a plain
    layer's, so that a learning rate found for the original fits. Without, a constant c of the input makes the step c²
    times as long: three times behind a ReLU. Layers that shrink their input (c < 1) are left at their own, slower pace.
    """
    for module in layers:
        rule = _rule_of(module)
        if isinstance(rule, StandardizedFilters) and rule.constant > 1:
            in_place = isinstance(rule, Standardization)
            module.get_parameter(raw_name(rule.layout.weight) if in_place else "weight").mul_(rule.constant)
