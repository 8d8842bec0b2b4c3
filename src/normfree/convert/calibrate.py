"""Measure what has no closed form on the example, in one pass, and size the raw weights by the scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normfree.convert.dataflow import resting
from normfree.convert.weights import MapOutput
from normfree.nn import Standardization, standardization_of
from normfree.nn.branch_end import BranchEnd
from normfree.nn.scaled_ws_conv import StandardizedFilters
from normfree.signal.inputs import Batch, call, copy_of

EPS = 1e-5
"""Added to the variance of a channel of the input, as BatchNorm does."""

LEAST_SEEN = 1e-10
"""Share of its input's mean square that a layer must pass on: filters of mean zero turn an input that does not vary
into rounding, of about 1e-14 in float32."""


def measured_scales(
    model: nn.Module, layers: Mapping[str, float], affines: Iterable[str], batch: Batch, *, heads: bool
) -> dict[str, float]:
    """The input scale of each named layer under which its output has a mean square of 1, times a factor of its own.

    The filters sum to zero, so the mean square is the variance plus what differing channel means bring; of
    features pooled to one position it is the quantity that does not depend on how alike the examples are. Layers
    are set one after another as the signal reaches them, with branches awake (skip gains of one); a layer that runs
    several times, by its first input, and so are affine maps, so that each channel leaves them with mean 0 and
    variance 1.

    Args:
        model: the converted model; its layers keep the scales found.
        layers: names of the layers to measure, and the factor of each: what restores what gates take behind it.
        affines: names of the :class:`ChannelAffine` maps.
        batch: what to measure with.
        heads: run what runs in training alone, too.

    Raises:
        ValueError: a layer's filters see a constant, so that no scale gives its output a variance.
    """
    modules = dict(model.named_modules())
    found: dict[str, float] = {}
    hooks = {name: _at_first(_setter(name, factor, found)) for name, factor in layers.items()}
    hooks |= {name: _at_first(_standardize_channels) for name in affines}
    handles = [modules[name].register_forward_pre_hook(hook, with_kwargs=True) for name, hook in hooks.items()]
    gains = [m.skip_gain for m in model.modules() if isinstance(m, BranchEnd) and m.skip_gain is not None]
    kept = [gain.detach().clone() for gain in gains]
    try:
        with torch.no_grad(), resting(model, heads=heads):
            for gain in gains:
                gain.fill_(1)
            call(model, copy_of(batch))
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for gain, value in zip(gains, kept, strict=True):
                gain.copy_(value)
    for name, scale in found.items():
        _rule_of(modules[name]).input_scale = scale
    return found


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


def _at_first(hook: Hook) -> Hook:
    """The hook at a module's first run alone."""
    ran: list[nn.Module] = []

    def once(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not ran:
            ran.append(module)
            hook(module, inputs, named)

    return once


def _standardize_channels(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Have a :class:`ChannelAffine` give each channel of its input [N, C, …] mean 0 and variance 1."""
    channels = _tensor_in(inputs, named).transpose(0, 1).flatten(1).double()
    variance, mean = torch.var_mean(channels, 1, correction=0)
    scale = (variance + EPS).rsqrt()
    module.weight.copy_(scale)
    module.bias.copy_(-mean * scale)


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
            raw: Any = module._parameters[rule.layout.weight if isinstance(rule, Standardization) else "weight"]
            raw.mul_(rule.constant)
